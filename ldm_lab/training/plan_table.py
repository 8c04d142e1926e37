"""A table of recipes by the size of the GPU in a Markdown file, counted by `plan`: what the file asks for, it shows.

<!-- plan table
8 GB | RTX 3070 | configs/own_images_8gb.yaml data.path=photos
-->
| GPU | recipe | ...
<!-- end of plan table -->
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.config import RunConfig, load
from ldm_lab.errors import UserError
from ldm_lab.estimate import in_short, in_units
from ldm_lab.io.atomic import atomic_write, existing_file
from ldm_lab.training.planning import days_in_words, plan, rate_in_words

TABLE = re.compile(r"(<!-- plan table\n)(?P<rows>.*?)(-->\n)(?P<table>.*?)(<!-- end of plan table -->)", re.DOTALL)
ROW = re.compile(r"(\d+) GB \| ([^|]+) \| ([^|]+)")
PLACES = ("data.path=", "data.shards=")  # overrides that only say where the data are


@dataclass(frozen=True)
class Asked:
    """A row that a file asks for.

    Attributes:
        gigabytes: of the card, GiB.
        card: as `ldm_lab.estimate.CARDS` has it.
        config: path of the recipe.
        overrides: `key=value` words.
    """

    gigabytes: int
    card: str
    config: Path
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> str:
        """The recipe with its options, as Markdown."""
        options = [f"`{word}`" for word in self.overrides if not word.startswith(PLACES)]
        return " ".join([f"`{self.config.name}`", *options])


def asked_rows(text: str, where: str) -> list[Asked]:
    """Return the rows that a file asks for. Raises UserError: it has no table, or a line that is no row."""
    found = TABLE.search(text)
    if found is None:
        raise UserError(f"{where}: has no <!-- plan table ... --> with <!-- end of plan table --> behind it")
    rows = []
    for line in found["rows"].splitlines():
        parts = ROW.fullmatch(line.strip())
        if parts is None:
            raise UserError(f"{where}: a line such as '8 GB | RTX 3070 | CONFIG key=value' is needed, not {line!r}")
        try:
            config, *overrides = shlex.split(parts[3])
        except ValueError as error:  # a quote without an end
            raise UserError(f"{where}: {str(error).lower()} in the line {line!r}") from None
        rows.append(Asked(int(parts[1]), parts[2].strip(), Path(config), tuple(overrides)))
    return rows


def table_lines(rows: list[Asked], mfu: float) -> Iterator[str]:
    """Yield the lines of the table. Raises UserError: a recipe that does not fit its card, a card that is not known."""
    heads = ("GPU", "recipe, options", "trained", "memory of a step", "largest batch", f"images/s at {mfu:.0%}")
    yield f"| {' | '.join(heads)} | the whole run |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: |"
    for row in rows:
        config = load(row.config, row.overrides)
        found = plan(config)
        most, batch = found.fits([row.gigabytes])[0].batch, found.cost.batch_size
        if most < batch:
            raise UserError(
                f"{row.config}: takes {found.cost.in_words()}, and does not fit {row.gigabytes} GB; "
                + (f"data.batch_size={most} would" if most else "nor would a smaller batch")
            )
        (speed,) = found.speeds([row.card], mfu)
        days = "" if speed.days is None else days_in_words(speed.days)
        cells = (
            f"{row.gigabytes} GB, {row.card}",
            row.recipe,
            _trained(config, found.cost.trained),
            f"{in_units(found.cost.peak)} for {batch}",
            f"{most:,}",
            rate_in_words(speed.images),
            days,
        )
        yield f"| {' | '.join(cells)} |"


def _trained(config: RunConfig, count: int) -> str:
    if "lora" in config:
        return f"{in_short(count)}, LoRA of {config.init_from}"
    return f"{in_short(count)}, {f'from {config.init_from} on' if config.init_from else 'from scratch'}"


def with_table(text: str, where: str, mfu: float) -> str:
    """Return a file's text with its table counted anew."""
    table = "".join(f"{line}\n" for line in table_lines(asked_rows(text, where), mfu))
    return TABLE.sub(lambda found: found[1] + found["rows"] + found[3] + table + found[5], text, count=1)


def write_table(path: str, mfu: float) -> None:
    """Count the table in a file anew. Raises UserError for a file without one, or a row that cannot be counted."""
    file = existing_file(path, "--table")
    try:
        before = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text (byte {error.start}); --table takes a Markdown file") from None
    text = with_table(before, path, mfu)
    with atomic_write(file) as target:
        target.write(text.encode())
