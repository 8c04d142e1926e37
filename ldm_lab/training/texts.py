"""A run with a store of text states: the conditioner that reads from it, the captions that it lacks, what is added."""

import json
from collections.abc import Sequence

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm_lab.checkpoints.parts import load_part, weights_sha256
from ldm_lab.checkpoints.stored_texts import encodes_missing, store_folder, with_known_width
from ldm_lab.conditioners.t5 import T5, quoted
from ldm_lab.config import ConditionerUse, RunConfig
from ldm_lab.data.cache_files import Column
from ldm_lab.data.source import Source
from ldm_lab.data.text_store import ENCODER, KIND, OF_TEXTS, SHA256, TextStore, store_columns
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner
from ldm_lab.prompts import read_prompts
from ldm_lab.sampling.prompts import parse_mix
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.run_state import Checkpoint

DRAWN = ("demo", "enlargements", "inpaintings", "evaluate")  # sections that sample


def load_conditioner(config: RunConfig, read_weights: bool = True, later: bool | None = None) -> Conditioner:
    """Return the frozen conditioner of a run, with the store that its section names.

    A language model is loaded where captions are encoded in every step; with a store, or a cache of the images, not
    before a text has to be encoded that is in neither.

    Args:
        config: of the run.
        read_weights: False builds the architecture alone.
        later: whether a model waits without a store until it is needed; None: where the data are a cache.

    Raises:
        UserError: a store of another text encoder; a conditioner that has none; its weights are not there.
    """
    section = config["conditioner"]
    use, folder = section.use_as(ConditionerUse), store_folder(section)
    if use.missing is not None and folder is None:
        raise UserError(f"conditioner.missing: {use.missing} is of what conditioner.store lacks, and none is given")
    later = ("cache" in config or config["data"].name == "cache") if later is None else later
    part: Conditioner = load_part(
        "conditioner", with_known_width(section), read_weights, later=later or folder is not None
    )
    if isinstance(part, T5):
        part.rounds = True
        if use.precision is not None:
            print_rank_zero("conditioner.precision: without effect: conditioner.dtype is how t5 computes")
    elif folder is not None:
        raise UserError(f"conditioner.store: has the states of texts, which {section.name} does not make; t5 does")
    if isinstance(part, T5) and folder is not None:
        part.has_model = encodes_missing(section)
        if read_weights:
            checksum = weights_sha256("conditioner", section)
            part.store = TextStore(folder, described_by(part, checksum), columns_of(part))
    return part


def described_by(part: T5, checksum: str | None) -> dict[str, str]:
    """Return what a store of a text encoder's states says of itself, each as JSON."""
    return {
        KIND: OF_TEXTS,
        SHA256: json.dumps(checksum),
        **{f"{ENCODER}{name}": its for name, its in part.facts().items()},
    }


def columns_of(part: T5) -> dict[str, Column]:
    """Return the columns of a store of a text encoder's states."""
    return store_columns(part.stored_name, part.text_size, part.width)


def store_of(conditioner: Conditioner) -> TextStore | None:
    """Return the store that a conditioner reads from; None without one."""
    store = conditioner.store if isinstance(conditioner, T5) else None
    return store if isinstance(store, TextStore) else None


def watch(source: Source, conditioner: Conditioner) -> None:
    """Have a source leave out, and count, samples whose caption has no states and may not be encoded."""
    store = store_of(conditioner)
    if store is not None and isinstance(conditioner, T5) and not conditioner.has_model and not source.encoded_by:
        source.accept = store.known.check


def prompts_of(config: RunConfig) -> list[str]:
    """Return the texts that a run needs beside its captions: no text, the prompts that it draws, negative ones."""
    texts = [""]
    files = [config[role].option("prompts") for role in ("demo", "evaluate") if role in config]
    texts += [its.text for file in files if file for line in read_prompts(file) for its in parse_mix(line)]
    for role in DRAWN:
        sampling = (config[role].option("sampling") or {}) if role in config else {}
        texts += [sampling["negative"]] if isinstance(sampling.get("negative"), str) else []
    return list(dict.fromkeys(texts))


class StoredTexts(Callback):
    """Writes what a run adds to its store of text states whenever it saves, so that a resumed run reads the same.

    Attributes:
        writes: whether it may; a run that is tried out must not.
    """

    def __init__(self, conditioner: T5, store: TextStore, prompts: Sequence[str]) -> None:
        """Take the conditioner that reads from a store, and the texts that it will need beside captions."""
        self.conditioner, self.store, self.prompts = conditioner, store, prompts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what there is. Raises UserError for prompts that lack and may not be encoded."""
        lacking = [text for text, its in zip(self.prompts, self.store.read(self.prompts)) if its is None and text]
        encodes = self.conditioner.has_model
        if lacking and not encodes:
            raise UserError(
                f"conditioner.store: {self.store.folder} has no states of the prompt {quoted(lacking[0])}; "
                "python -m ldm_lab embed-text adds those of a config's prompts, too"
            )
        then = (
            f"encoded by {self.conditioner.model_name} and added" if encodes else "left out with its image, and counted"
        )
        print_rank_zero(
            f"conditioner.store: {self.store.folder}: {len(self.store):,} texts; a caption that lacks is {then}"
        )
        if encodes and self.store.writes:
            self.store.begin()  # now, so that a run with another text encoder does not begin the same one meanwhile

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        self.store.flush()
        trainer.strategy.barrier()
        self.store.refresh()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.store.flush()
        if self.store.added and self.store.writes:
            print_rank_zero(
                f"conditioner.store: {self.store.folder}: {self.store.added:,} texts added by the first process"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.store.flush()


def text_callbacks(config: RunConfig, conditioner: Conditioner) -> list[Callback]:
    """Return what a run with a store of text states needs; nothing without one."""
    store = store_of(conditioner)
    if store is None or not isinstance(conditioner, T5):
        return []
    return [StoredTexts(conditioner, store, prompts_of(config))]


def cut_summary(conditioner: Conditioner) -> list[str]:
    """Return a line that says how many captions were too long; nothing where none was."""
    if not isinstance(conditioner, T5) or not conditioner.cut:
        return []
    return [
        f"conditioner.text_size: {conditioner.cut:,} captions of the first process were cut to "
        f"{conditioner.text_size} tokens"
    ]
