"""Selecting from metadata: wall time, CPU time and peak memory against pandas, and a shuffle and a join beyond memory.

    python benchmarks/select_memory.py --rows 5000000 --folder /scratch/rows

Synthetic rows with LAION's columns (tests/laion_rows.py) are written to the folder first, unless they are there. Each
line of the table is a process of its own; the memory is the peak of what was resident in it, imports included. pandas
does what its users write: reads the table, applies the same rules with masks, counts them, writes the kept rows. Both
have to keep the same number. They run in turn, several times; the fastest counts, and the highest memory of ours with
the lowest of pandas. The shuffle and the join have less memory than their rows take, and
then more, which shows what that would be.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to run from a checkout that is not installed

SLURS = ["zorblat", "grok nik", "quux'ite"] + [f"nonsense{i}" for i in range(27)]
RULES = {
    "aesthetic > 7": {"punsafe": {"below": 0.5}, "pwatermark": {"below": 0.8}, "aesthetic": {"above": 7}},
    "aesthetic > 5": {"punsafe": {"below": 0.5}, "pwatermark": {"below": 0.8}, "aesthetic": {"above": 5}},
    "laionide v2": {
        "nsfw": {"drop": ["NSFW", "LIKELY"]},
        "aspect_ratio": {"at_least": 0.8, "at_most": 1.3},
        "size": {"min_side": 256},
        "slurs": {"file": "???"},
    },
}


def ours(task: str, table: str, out: str, limit: str, tags: str, slurs: str) -> dict:
    """Select with the program's own class; return what it did."""
    from ldm_lab.config import build

    rules = {name: dict(options) for name, options in RULES.get(task, RULES["aesthetic > 7"]).items()}
    if "slurs" in rules:
        rules["slurs"]["file"] = slurs
    section = {"input": table, "out": out, "rules": rules, "overwrite": True}
    section["engine"] = {"name": "duckdb", "memory_limit": limit, "threads": 2}
    if task == "shuffle of all":
        section |= {"rules": {}, "shuffle": 0}
    if task == "join with tags":
        section["tags"] = {"aesthetic": tags}
    return {"kept": build("selection", section).run().kept}


def pandas(task: str, table: str, out: str, limit: str, tags: str, slurs: str) -> dict:
    """Do the same with pandas."""
    import re

    import pandas as pd

    frame = pd.read_parquet(table)
    if task == "shuffle of all":
        kept = frame.sample(frac=1, random_state=0)
    else:
        if task == "join with tags":
            best = pd.read_parquet(tags).dropna()
            best = best[best.aesthetic > 7].sort_values("aesthetic").drop_duplicates("hash", keep="last")
            frame = frame.drop(columns="aesthetic").merge(best, on="hash", how="left")
        if task == "laionide v2":
            ratio = frame.WIDTH / frame.HEIGHT
            small = (frame.WIDTH < 256) | (frame.HEIGHT < 256) | frame.WIDTH.isna() | frame.HEIGHT.isna()
            words = "|".join(map(re.escape, SLURS))
            masks = {
                "nsfw": frame.NSFW.str.strip().str.lower().isin(["nsfw", "likely"]),
                "aspect_ratio": (ratio < 0.8) | (ratio > 1.3),
                "size": small,
                "slurs": frame.TEXT.str.lower().str.contains(words, regex=True, na=False),
            }
        else:
            above = 5 if task == "aesthetic > 5" else 7
            masks = {
                "punsafe": ~(frame.punsafe < 0.5),
                "pwatermark": ~(frame.pwatermark < 0.8),
                "aesthetic": ~(frame.aesthetic > above),
            }
        broken = None
        for mask in masks.values():
            mask.sum()  # the report
            broken = mask if broken is None else broken | mask
        kept = frame[~broken]
    Path(out).mkdir(exist_ok=True)
    kept.to_parquet(Path(out) / "part-00000.parquet", index=False)
    return {"kept": len(kept)}


def in_process(arguments: list[str]) -> None:
    """Run one task in this process and print how it went."""
    program, task, *rest = arguments
    begin = time.perf_counter()
    result = {"ldm_lab": ours, "pandas": pandas}[program](task, *rest)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result |= {"wall": time.perf_counter() - begin, "cpu": usage.ru_utime + usage.ru_stime}
    print(json.dumps(result | {"memory": usage.ru_maxrss / 1024}))


def best_of(times: int, program: str, task: str, *rest: str) -> list[dict]:
    """Return the results of processes of their own."""
    results = []
    for _ in range(times):
        command = [sys.executable, __file__, "--process", program, task, *rest]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        if done.returncode:
            sys.exit(f"{program}, {task}: {done.stderr.strip().splitlines()[-1]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "select_benchmark")
    parser.add_argument("--limit", default="400MB", help="DuckDB's memory_limit")
    parser.add_argument("--small-limit", default="300MB", help="the same for the shuffle and the join beyond memory")
    parser.add_argument("--times", type=int, default=2, help="runs of each; the fastest counts")
    parser.add_argument("--tasks", nargs="*", help="only these")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    table, tags = (args.folder / f"{name}{args.rows}.parquet" for name in ("rows", "tags"))
    slurs = args.folder / "slurs.txt"
    slurs.write_text("\n".join(SLURS))
    if not table.is_file():
        from laion_rows import write_rows

        write_rows(table, args.rows)
    if not tags.is_file():
        import duckdb

        duckdb.sql(f"copy (select hash, aesthetic from '{table}' where hash is not null) to '{tags}'")
    megabytes = table.stat().st_size / 2**20
    print(f"{args.rows:,} rows, {megabytes:,.0f} MB; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    head = f"{'task':16} {'program':8} {'limit':>6} {'wall s':>7} {'cpu s':>7} {'MB':>6}"
    print(f"{head}  {'faster':>6} {'memory':>6}  kept")
    tasks = [(task, args.limit, True) for task in RULES]
    beyond = ("shuffle of all", "join with tags")
    tasks += [(task, limit, False) for task in beyond for limit in (args.small_limit, "16GB")]
    for task, limit, compared in tasks:
        if args.tasks and task not in args.tasks:
            continue
        rows: dict[str, list[dict]] = {"ldm_lab": [], "pandas": []}
        for _ in range(args.times if compared else 1):
            for program in rows if compared else ["ldm_lab"]:
                out = str(args.folder / f"out_{program}")
                rows[program] += best_of(1, program, task, str(table), out, limit, str(tags), str(slurs))
        best = {program: min(results, key=lambda one: one["wall"]) for program, results in rows.items() if results}
        for program, one in best.items():
            ratio = ""
            if compared and program == "ldm_lab":
                most = max(result["memory"] for result in rows["ldm_lab"])
                least = min(result["memory"] for result in rows["pandas"])
                ratio = f"{best['pandas']['wall'] / one['wall']:5.1f}x {most / least:5.2f}"
            memory = limit if program == "ldm_lab" else ""
            numbers = f"{one['wall']:7.1f} {one['cpu']:7.1f} {one['memory']:6.0f}"
            print(f"{task:16} {program:8} {memory:>6} {numbers}  {ratio:>13}  {one['kept']:,}", flush=True)
        if compared and best["ldm_lab"]["kept"] != best["pandas"]["kept"]:
            sys.exit(f"{task}: they keep different numbers of rows")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        in_process(sys.argv[2:])
    else:
        main()
