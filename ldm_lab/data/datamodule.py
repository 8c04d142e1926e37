"""The data of a run for Lightning, with a position that can be saved and gone back to."""

from collections import Counter
from collections.abc import Callable

import torch
from pytorch_lightning import LightningDataModule

from ldm_lab.data.counts import Counts
from ldm_lab.data.loader import Loader, Progress
from ldm_lab.data.rank_state import RankState, go_on
from ldm_lab.data.samples import as_utf8
from ldm_lab.data.source import Source
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch


class DataModule(LightningDataModule):
    """Batches of a source, distinct on every rank and loader process, in an order that resuming continues.

    The training loop hands every batch to `consumed`; what the loader has prepared ahead does not count. `rank_state`
    is then where this rank stands. Each rank has its own, so a checkpoint holds the list of all ranks' states, and
    `load_rank_states` takes that list. The same world size and number of loader processes then deliver exactly the
    batches that an uninterrupted run would have delivered. Others share what is left of the epoch: every sample comes
    once in it. Other data, or another seed, go on at the beginning of the next epoch.

    Args:
        source: a part of role "data".
        seed: of the order and of random crops and flips.
        rank, world_size: for use without a Trainer, which knows them otherwise.
        epochs: passes over the data; None is without end, as training wants it. With a number, the last batch of a
            reader may be smaller.

    Attributes:
        told_to_stop: whether the run is to end; whoever trains with the batches sets it.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        rank: int | None = None,
        world_size: int | None = None,
        epochs: int | None = None,
    ):
        super().__init__()
        self.source, self.seed, self.epochs = source, seed, epochs
        self._rank, self._world_size = rank, world_size
        self._progress = Progress([[]] * self.workers)
        self._is_described = False
        self._contents = ""  # of the source, as the first rank found it
        self._loader: Loader | None = None
        self.told_to_stop: Callable[[], bool] = lambda: False
        self._restored: tuple[list[RankState], int] | None = None

    @property
    def workers(self) -> int:
        """Readers per rank: loader processes, or the training process itself."""
        return max(self.source.workers, 1)

    @property
    def rank(self) -> int:
        """This process among those of the run."""
        return self.trainer.global_rank if self._rank is None and self.trainer else self._rank or 0

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.trainer.world_size if self._world_size is None and self.trainer else self._world_size or 1

    @property
    def lost(self) -> str | None:
        """How a loader process of this rank died, in words, if one did and another one reads on for now."""
        return self._loader.lost if self._loader is not None else None

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for batches so far."""
        return self._loader.waited if self._loader is not None else 0.0

    @property
    def skipped(self) -> Counter:
        """Samples of this rank that had to be skipped so far, by reason."""
        return Counter(self._progress.counts.skipped)

    @property
    def filtered(self) -> Counter:
        """Samples of this rank that were left out as the config asks so far, by rule; "no caption" is one."""
        return Counter(self._progress.counts.filtered)

    def summary(self, states: list[RankState] | None = None) -> str:
        """Return one line: samples read so far, and those skipped by reason with examples.

        Args:
            states: all ranks' `rank_state()`; by default this rank's alone is counted.
        """
        counts = Counts()
        for state in states or [self.rank_state()]:
            counts.add(Counts.of(state["counts"]))
        return f"data: {counts}"

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """List the data. Raises UserError if there is none, or too little for the number of readers."""
        if self.source.count is None:
            self.source.open()
        if self.rank == 0 and not self._is_described:
            self._is_described = True
            for line in self.source.found():
                print(f"data: {as_utf8(line)}")
        readers, count, unit = self.workers * self.world_size, self.source.count or 0, self.source.unit
        if count < readers:
            most = count // self.world_size
            remedy = f"set data.workers to at most {most}" if most else f"use at most {count} processes"
            raise UserError(
                f"data: {count} {unit} are too few for {readers} readers ({self.world_size} processes x {self.workers} "
                f"workers), each of which needs its own: {remedy}, or bring more {unit}"
            )
        self._contents = self._contents or self._looked_at()
        if self._restored is not None:
            self._restore(*self._restored)
            self._restored = None

    def _looked_at(self) -> str:
        """Return what stands for the data; one rank looks for all of a run, so that all of them decide alike."""
        alone = self.trainer is None or self.world_size == 1
        if alone:
            return self.source.contents()
        contents: str = self.trainer.strategy.broadcast(self.source.contents() if self.rank == 0 else "")
        return contents

    def train_dataloader(self) -> Loader:
        """Return the batches from where this rank stands on.

        A Trainer brings them to its device as bytes, and hands them on as floats (`on_after_batch_transfer`); without
        one they come as floats.
        """
        trainer = self.trainer
        self._loader = Loader(
            self.source,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            progress=self._progress,
            epochs=self.epochs,
            told_to_stop=lambda: self.told_to_stop(),
            as_made=trainer is not None,
            pinned=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )
        return self._loader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.source.to_device_format(batch)

    def consumed(self, batch: Batch) -> None:
        """Note that a batch was trained on."""
        self._progress.advance(batch)

    def rank_state(self) -> RankState:
        """Return where this rank stands."""
        return RankState(
            seed=self.seed,
            processes=self.world_size,
            workers=self.workers,
            unit=self.source.unit,
            count=self.source.count or 0,
            turn=self._progress.turn,
            items=self.source.items_key,
            contents=self._contents,
            left=[[list(stretch) for stretch in reader] for reader in self._progress.left],
            counts=self._progress.counts.state(),
        )

    def load_rank_states(self, states: list[RankState], rank: int) -> None:
        """Go back to where the ranks stood. May be called before or after `setup`.

        Args:
            states: all ranks' `rank_state()`, in the order of the ranks.
            rank: this process among those of the run.
        """
        if self.source.count is not None:
            self._restore(states, rank)
        else:
            self._restored = states, rank

    def _restore(self, states: list[RankState], rank: int) -> None:
        self._progress, lines = go_on(states, self.rank_state(), rank)
        for line in lines if rank == 0 else []:
            print(f"data: {line}")
