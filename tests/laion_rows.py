"""Synthetic metadata with the columns and the quirks of LAION's tables: nulls, NaN, odd tags, values on boundaries."""

from pathlib import Path

# A number in [0, 1) that depends on the row `i` and a salt alone.
_UNIFORM = "(hash(i * 1000 + {salt}) >> 11)::double / 9007199254740992.0"
_SIDES = "[0, 1, 255, 256, 300, 320, 400, 500, 511, 512, 513, 640, 650, 651, 768, 1023, 1024, 1280, 1920, 4000]"
_TAGS = "['UNLIKELY', 'UNLIKELY', 'UNLIKELY', 'UNSURE', 'NSFW', ' nsfw ', 'LIKELY', 'likely', '', '0.31', NULL]"
_LANGUAGES = "['en', 'en', 'EN', 'de', 'zh-Latn', 'nolang', NULL]"
_WORDS = (
    "['a', 'red', 'fox', 'harbour', 'at', 'dusk', 'old', 'photograph', 'of', 'the', 'house', 'winter', 'forest', "
    "'poster', 'print', 'vintage', 'mountain', 'lake', 'café', '東京', '🎨', 'naïve', 'ΦΟΡΟΣ', 'İstanbul', "
    "'quux''ite', 'grok nik', 'market', 'portrait', 'oil', 'canvas', 'blue', 'sunset']"
)


def _uniform(salt: int) -> str:
    return _UNIFORM.format(salt=salt)


def _pick(values: str, salt: int) -> str:
    return f"{values}[1 + (hash(i * 1000 + {salt}) % len({values}))::int]"


def _with_gaps(value: str, salt: int, edges: str) -> str:
    """2 % null, 2 % NaN, 2 % on a boundary."""
    u = _uniform(salt)
    return (
        f"case when {u} < 0.02 then null when {u} < 0.04 then 'nan'::double when {u} < 0.06 then {_pick(edges, salt)} "
        f"else {value} end"
    )


def write_rows(path: str | Path, rows: int, first: int = 0, slur_share: float = 0.01) -> None:
    """Write rows `first` ... `first + rows - 1` as Parquet; row i is the same whatever file it comes in.

    Columns: those of the joined tables, with SAMPLE_ID (the row's number), NSFW and LANGUAGE beside them.
    """
    import duckdb

    caption = " || ' ' || ".join(_pick(_WORDS, salt) for salt in range(100, 108))
    normal = " + ".join(_uniform(salt) for salt in range(20, 32))  # of mean 6 and variance 1
    sql = f"""
        select i::bigint as SAMPLE_ID,
            'https://images.example.org/' || md5(i::varchar) || '/' || (i % 977)::varchar || '.jpg' as "URL",
            case when {_uniform(1)} < 0.01 then null when {_uniform(1)} < 0.02 then ''
                when {_uniform(1)} < {0.02 + slur_share} then {caption} || ' Zorblatting'
                else {caption} end as "TEXT",
            case when {_uniform(2)} < 0.01 then null else {_pick(_SIDES, 3)} end::int as "WIDTH",
            case when {_uniform(4)} < 0.01 then null else {_pick(_SIDES, 5)} end::int as "HEIGHT",
            ({_with_gaps(f"0.28 + 0.15 * {_uniform(6)}", 7, "[0.3, 0.28]")})::double as similarity,
            {_pick(_LANGUAGES, 8)} as "LANGUAGE",
            {_pick(_TAGS, 9)} as "NSFW",
            case when {_uniform(10)} < 0.01 then null
                when {_uniform(10)} < 0.05 then (hash(i // 50 * 1000 + 11) >> 1)::bigint
                else (hash(i * 1000 + 12) >> 1)::bigint - 4611686018427387904 end as hash,
            ({_with_gaps(f"pow({_uniform(13)}, 3)", 14, "[0.5, 0.49999999, 0.0, 1.0]")})::float as punsafe,
            ({_with_gaps(f"pow({_uniform(15)}, 2)", 16, "[0.8, 0.79999999, 0.5]")})::float as pwatermark,
            ({_with_gaps(f"5.4 + 1.3 * ({normal} - 6)", 17, "[5.0, 7.0, 8.0, 7.0000005, 11.3, -1.0]")})::float
                as aesthetic
        from range({first}, {first + rows}) as numbers(i)
    """
    with duckdb.connect(config={"threads": 2, "memory_limit": "1GB"}) as connection:
        connection.execute(f"copy ({sql}) to '{path}' (format parquet, compression snappy)")
