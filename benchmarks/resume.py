"""What it costs to find one's place again: an index of 1,000 against one of a million, step 10 against step 10 million.

    python benchmarks/resume.py

Each time is the median of several: from a saved position to the first batch (decoding left out), shards from the disk.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm_lab.config import build
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.order import Order
from ldm_lab.data.rank_state import RankState
from ldm_lab.data.samples import Sample
from ldm_lab.data.shares import Stretch, deal
from ldm_lab.data.source import Source
from ldm_lab.data.tar import write_shard
from ldm_lab.training.timesteps import SobolTimesteps

BATCH = 16


class Index(Source):
    """So many samples, each of which is its number."""

    def __init__(self, count: int) -> None:
        super().__init__(batch_size=BATCH, workers=0)
        self.count = count

    def decode(self, item: int, order: Order) -> Sample:
        return Sample(str(item))


def median_ms(what: Callable[[], None], times: int = 15) -> float:
    """Return how long something takes, milliseconds."""
    what()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def state_at(data: DataModule, step: int, batch_size: int) -> RankState:
    """Return the state of a single reader after so many steps over whole epochs and a part."""
    epoch, place = divmod(step * batch_size, data.source.count or 1)
    state = data.rank_state()
    state["left"] = [[list(Stretch(epoch, place, data.source.count or 0))]]
    return state


def go_on(source: Source, state: RankState) -> None:
    """Read the first batch from a position on."""
    data = DataModule(source, seed=0)
    data.load_rank_states([state], 0)
    data.setup()
    next(iter(data.train_dataloader()))


def indices() -> None:
    """Print what the size of the index costs."""
    print("an index of ... samples, in mid-epoch: to the first batch; a permutation drawn as a whole")
    for count in (1_000, 1_000_000, 100_000_000):
        source = Index(count)
        data = DataModule(source, seed=0)
        epochs = iter(range(10**6))
        states = [state_at(data, (1 + next(epochs)) * count // BATCH + count // 2 // BATCH, BATCH) for _ in range(20)]
        places = iter(states)
        ours = median_ms(lambda source=source, places=places: go_on(source, next(places)))
        drawn = median_ms(lambda count=count: np.random.RandomState(0).permutation(count), 3 if count < 10**7 else 1)
        print(f"  {count:>11,}: {ours:7.2f} ms; {drawn:9.2f} ms")


def steps() -> None:
    """Print what the number of steps done costs."""
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(200):
            parts = {"png": bytes(2000), "txt": b"a"}
            write_shard(Path(folder) / f"{shard:03d}.tar", [(f"{shard:03d}{n:03d}", parts) for n in range(50)])
        section = {
            "name": "webdataset",
            "shards": f"{folder}/*.tar",
            "image_size": 16,
            "batch_size": BATCH,
            "workers": 0,
        }
        source = build("data", {**section, "shuffle_buffer": 100})
        source.decode = lambda item, order: Sample(item.key)
        source.to_device_format, source.found = lambda batch: batch, list
        source.open()
        print("10,000 samples in 200 shards, groups of 8: to the first batch, in the midst of a group")
        for step in (10, 10_000_000):
            data = DataModule(source, seed=0)
            state = data.rank_state()
            epoch = step * BATCH // 10_000
            state["left"] = [[list(Stretch(epoch, 96, 200, 1, 8, 200))]]
            taken = median_ms(lambda state=state: go_on(source, state))
            print(f"  step {step:>10,}: {taken:7.2f} ms")
    print("timesteps of a batch of 64")
    for step in (10, 10_000_000):
        taken = median_ms(lambda step=step: SobolTimesteps(0, 0, 1)(64 * step, 64))
        print(f"  step {step:>10,}: {taken:7.2f} ms")


def sizes() -> None:
    """Print how large the position is, for many readers and after many changes of their number."""
    left: list[list[Stretch]] = [[Stretch(7, 10_000 + reader, 10**8, 512, 1, 40)] for reader in range(512)]
    print("numbers in the position of all readers, and milliseconds to deal it out anew")
    for change in range(4):
        readers = (512, 448, 512, 64)[change]
        taken = median_ms(lambda left=left, readers=readers: deal(left, readers, 10**8), 3)
        left = deal(left, readers, 10**8)
        left = [[its[0]._replace(begun=1, offset=9), *its[1:]] for its in left]
        print(f"  {readers:>4} readers: {sum(6 * len(its) for its in left):>6,} numbers; {taken:7.2f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    indices()
    steps()
    sizes()
