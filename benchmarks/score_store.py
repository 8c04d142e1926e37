"""The score store against the published reader and writer of its format: memory to build, look-ups per second.

    python benchmarks/score_store.py
    python benchmarks/score_store.py --entries 50_000_000 --folder /data/tmp

The published program is static_ondisk_kv 1.1.2: a bisection in Python over a memory map, with a slice and an unpacking
per probe, and one packing per row. Its ways are written out again here. Both read the same file, warm, in the same run,
by turns; of several rounds the best counts. Memory is the peak of a fresh process.
"""

import argparse
import bisect
import mmap
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile, ParquetWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.curation.store.build import build_store
from ldm_lab.curation.store.format import ScoreStore
from ldm_lab.errors import run_program

ABSENT = 0.3  # share of the look-ups
ROWS = 1_000_000  # per row group


class PublishedReader:
    """The published reader's access: every probe of `bisect` is a method call, a slice and an unpacking."""

    def __init__(self, path: Path):
        self.count = os.path.getsize(path) // 10
        self.file = open(path, "rb")  # noqa: SIM115
        self.map = mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ)
        self.by_place = _ByPlace(self)

    def get_key(self, place: int) -> int:
        return struct.unpack("q", self.map[10 * place : 10 * place + 8])[0]

    def get_value(self, place: int) -> tuple[float]:
        return struct.unpack("e", self.map[10 * place + 8 : 10 * place + 10])

    def __getitem__(self, key: int) -> tuple[float]:
        place = bisect.bisect_left(self.by_place, key, lo=0, hi=self.count)
        if place == self.count or self.get_key(place) != key:
            raise ValueError(f"{key} not found")
        return self.get_value(place)


class _ByPlace:
    def __init__(self, reader: PublishedReader):
        self.reader = reader

    def __getitem__(self, place: int) -> int:
        return self.reader.get_key(place)


def write_tags(path: Path, entries: int) -> None:
    """Write a table of random hashes and scores."""
    rng = np.random.default_rng(0)
    with ParquetWriter(path, pa.schema({"hash": pa.int64(), "aesthetic": pa.float32()})) as writer:
        for begin in range(0, entries, ROWS):
            n = min(ROWS, entries - begin)
            hashes, scores = rng.integers(-(2**63), 2**63, n), rng.normal(5, 1, n).astype(np.float32)
            writer.write_table(pa.table({"hash": hashes, "aesthetic": scores}))


def build(tags: Path, store: Path, memory: str) -> None:
    build_store([tags], store, memory=memory)


def build_as_published(tags: Path, store: Path, _: str) -> None:
    """Sort in memory (the published way has Spark do it), then pack row by row."""
    table = ParquetFile(tags).read().sort_by("hash")
    with open(store, "wb") as file:
        for batch in table.to_batches():
            for key, score in zip(*(column.to_pylist() for column in batch.columns)):
                file.write(struct.pack("q", key) + struct.pack("e", score))


def measured(job: Callable[..., None], *args: object) -> tuple[float, float]:
    """Return the seconds and the peak memory in MiB of a job in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_measure, args=(results, job, *args))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{job.__name__} failed")
    return results.get()


def _measure(results: multiprocessing.SimpleQueue, job: Callable[..., None], *args: object) -> None:
    begin = time.perf_counter()
    job(*args)
    seconds = time.perf_counter() - begin
    results.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def one_by_one(reader: PublishedReader | ScoreStore, keys: list[int]) -> int:
    """Return how many keys are there."""
    found = 0
    for key in keys:
        try:
            reader[key]
        except (KeyError, ValueError):
            continue
        found += 1
    return found


def in_batches(store: ScoreStore, keys: np.ndarray, size: int) -> int:
    return sum(int(store.get(keys[begin : begin + size])[1].sum()) for begin in range(0, len(keys), size))


def rate(count: int, look_up: Callable[[], int], expected: int) -> float:
    """Return look-ups per second of one round, which has to find what is there."""
    begin = time.perf_counter()
    found = look_up()
    seconds = time.perf_counter() - begin
    assert found == expected, f"{found} found, {expected} are there"
    return count / seconds


def main() -> None:
    """Parse the command line, build, look up, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--entries", type=int, default=5_000_000, metavar="N", help="default: %(default)s")
    add("--look-ups", type=int, default=1_000_000, metavar="N", help="in batches; default: %(default)s")
    add("--singles", type=int, default=50_000, metavar="N", help="one by one; default: %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="the best counts; default: %(default)s")
    add("--memory", default="512MB", metavar="SIZE", help="held while sorting; default: %(default)s")
    add(
        "--folder",
        metavar="DIR",
        help="for some files of 10 to 40 bytes per entry; default: the system's temporary one",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tags, store, other = (Path(folder) / name for name in ("tags.parquet", "store", "published"))
        write_tags(tags, args.entries)
        print(f"{args.entries:,} entries\n\n{'build':28}{'seconds':>10}{'peak MiB':>10}")
        for name, job, out in (("ours", build, store), ("row by row, sorted in RAM", build_as_published, other)):
            seconds, peak = measured(job, tags, out, args.memory)
            print(f"{name:28}{seconds:10.1f}{peak:10.0f}", flush=True)
        assert store.read_bytes() == other.read_bytes(), "the two stores differ"

        rng = np.random.default_rng(1)
        hashes = ParquetFile(tags).read(["hash"])["hash"].to_numpy()
        absent = int(args.look_ups * ABSENT)
        keys = np.concatenate(
            [rng.choice(hashes, args.look_ups - absent), rng.integers(-(2**63), 2**63, absent)]  # chance hits: 1e-12
        )
        rng.shuffle(keys)
        singles = keys[: args.singles].tolist()
        ours, published = ScoreStore(store), PublishedReader(store)
        present = one_by_one(published, singles)
        batched = in_batches(ours, keys, 10_000)
        assert batched == args.look_ups - absent
        ways: dict[str, tuple[int, Callable[[], int], int]] = {
            "published, one by one": (len(singles), lambda: one_by_one(published, singles), present),
            "ours, one by one": (len(singles), lambda: one_by_one(ours, singles), present),
        }
        for size in (256, 10_000, args.look_ups):
            ways[f"ours, batches of {size:,}"] = (len(keys), lambda n=size: in_batches(ours, keys, n), batched)
        best = dict.fromkeys(ways, 0.0)
        for _ in range(args.rounds):
            for name, way in ways.items():
                best[name] = max(best[name], rate(*way))
        print(f"\n{'look-ups, 30 % absent':28}{'a second':>12}{'ratio':>8}")
        baseline = best["published, one by one"]
        for name, speed in best.items():
            print(f"{name:28}{speed:12,.0f}{speed / baseline:8.1f}")


if __name__ == "__main__":
    run_program(main)
