"""A pass that stores the states of all captions of some data, and of the prompts that a run draws, once each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from torch import Tensor

from ldm_lab.conditioners.t5 import T5
from ldm_lab.config import PartConfig, RunConfig
from ldm_lab.data.cache_files import ENDING, ShardFacts, size_of
from ldm_lab.data.cache_items import DONE, ItemDone
from ldm_lab.data.contents import contents_of, file_entries
from ldm_lab.data.jobs import Fingerprint, Finished, Job, PassOptions, PassReport
from ldm_lab.data.passes import run_pass
from ldm_lab.data.samples import Captioned, SkippedSample, as_utf8
from ldm_lab.data.source import Item, Source
from ldm_lab.data.text_store import SHARD, TextStore
from ldm_lab.data.work_items import SourceItems, WorkItem
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.estimate import in_units
from ldm_lab.training.texts import load_conditioner, prompts_of, store_of

LOADING = ("batch_size", "workers", "timeout", "max_skipped")  # options of the data that no caption depends on


class TextBatch(NamedTuple):
    """Some samples: keys, and of each all its captions."""

    keys: list[str]
    texts: list[list[str]]


@dataclass(frozen=True)
class TextPreparation:
    """From a source's items to their captions, in the loader processes."""

    unique_keys: ClassVar[bool] = False

    source: Source

    def prepare(self, sample: Item) -> Captioned:
        """Return what is said of a sample. Raises SkippedSample."""
        return self.source.captions_of(sample)

    def collate(self, samples: list[Captioned]) -> TextBatch:
        """Return the batch of some samples."""
        return TextBatch([sample.key for sample in samples], [sample.texts for sample in samples])


@dataclass
class EmbeddedTexts:
    """What has become of a batch.

    Attributes:
        texts: those that were stored nowhere.
        states: of them, [l, D] each.
        cut: how many of them were too long.
        skipped: samples with a caption whose states cannot be stored.
    """

    texts: list[str] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    cut: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)


class TextJob(Job[Item, Captioned, TextBatch, EmbeddedTexts]):
    """Encodes each caption that the store lacks; writes a shard of it for each work item that has any."""

    task, results, unit = "embed", "text states", "sample"

    def __init__(self, conditioner: T5, source: Source, store: TextStore, prompts: Sequence[str]) -> None:
        """Take what encodes, the opened source of the captions, the store, and further texts."""
        super().__init__()
        self.conditioner, self.source, self.store, self.prompts = conditioner, source, store, prompts
        self.preparation = TextPreparation(source)
        self.claimed: set[str] = set()  # what this process has encoded and not yet written

    def describe(self, items: Sequence[WorkItem[Item]]) -> list[str]:
        return self.source.found()

    def fingerprint(self, precision: str) -> Fingerprint:
        return self.store.fingerprint

    def files(self, item: WorkItem[Item]) -> list[Path]:
        return [item.file(DONE)]  # an item whose captions are all stored has no shard

    def finished(self, item: WorkItem[Item]) -> Finished | None:
        done = ItemDone.read(item.file(DONE))
        if done is not None and done.shard is not None:
            shard = self.store.folder / done.shard.name
            done = done if shard not in self.store.damaged and size_of(shard) == done.shard.bytes else None
        return None if done is None else done.finished

    def process(self, batch: TextBatch) -> EmbeddedTexts:
        known, made = self.store.known, EmbeddedTexts()
        texts = dict.fromkeys(text for its in batch.texts for text in its)
        new = [text for text in texts if text not in known and text not in self.claimed]
        before = self.conditioner.cut
        states, problems = self.conditioner.encode_each(new, once=True)
        made.cut = self.conditioner.cut - before
        refused = {new[place]: problem for place, problem in problems.items()}
        for key, its in zip(batch.keys, batch.texts):
            if problem := next((refused[text] for text in its if text in refused), None):
                made.skipped.append(SkippedSample(problem, as_utf8(key)))
        for text, of_text in zip(new, states):
            if text not in refused:
                made.texts.append(text)
                made.states.append(of_text.to("cpu", copy=True))
        self.claimed.update(made.texts)
        return made

    def write(self, item: WorkItem[Item], rows: list[EmbeddedTexts], done: Finished) -> None:
        for problem in (problem for made in rows for problem in made.skipped):
            done.counts.skip(problem)
        if cut := sum(made.cut for made in rows):
            place = f"cut to {self.conditioner.text_size} tokens"
            done.counts.captions[place] = done.counts.captions.get(place, 0) + cut
        facts = self.keep(rows)
        self.store.begin()
        ItemDone(done, self.store.columns, facts, drawn=False).write(item.file(DONE))

    def leave(self, rows: list[EmbeddedTexts]) -> None:
        self.keep(rows)  # other items have left these texts to this one

    def keep(self, rows: list[EmbeddedTexts]) -> ShardFacts | None:
        """Write texts as a shard of the store, and return what it is; None without any. Raises UserError."""
        texts = [text for made in rows for text in made.texts]
        states = [its for made in rows for its in made.states]
        facts = self.store.write(texts, states) if texts else None
        self.claimed.difference_update(texts)
        return facts

    def finish(self, items: Sequence[WorkItem[Item]], report: PassReport) -> None:
        """Add what a run needs beside its captions."""
        self.store.refresh()
        self.conditioner.states(self.prompts)
        self.store.flush()


@told_in_one_line(lambda: "embedding captions", "a smaller --batch-size needs less")
def embed_texts(config: RunConfig, options: PassOptions) -> tuple[TextStore, PassReport | None]:
    """Store the states of a config's captions, held-out ones too, and prompts in its `conditioner.store`, with a bar.

    What is there already is not made again: an interrupted pass goes on, other data add to it.

    Returns:
        The store, and what was done, on the first process; None on all others.

    Raises:
        UserError: a conditioner that reads no text, a store of another one, data that are not there.
    """
    section = config["conditioner"].with_use(missing="encode")
    conditioner = load_conditioner(config.with_part("conditioner", section))
    store = store_of(conditioner)
    if not isinstance(conditioner, T5) or store is None:
        raise UserError("conditioner.store: has to be given")
    prompts, whole = prompts_of(config), None
    for section in captioned(config):
        report = run_pass_over(section, conditioner, store, prompts, options)
        if report is not None:
            whole = report if whole is None else whole.with_that_of(report)
    return store, whole


def captioned(config: RunConfig) -> list[PartConfig]:
    """Return the sections of the data whose captions a run reads: those that it trains on, and those it measures by."""
    measured = [config[role].option("data") for role in ("held_out", "evaluate") if role in config]
    return [config["data"], *(PartConfig.from_dict("data", section) for section in measured if section)]


def run_pass_over(
    section: PartConfig, conditioner: T5, store: TextStore, prompts: Sequence[str], options: PassOptions
) -> PassReport | None:
    """Store the states of some data's captions, and of further texts. As `embed_texts`."""
    source: Source = section.build()
    source.prepare()
    source.open()
    tag = tag_of(section, source)
    items = [
        replace(item, target=item.target.with_name(f"{tag}-{item.target.name}"))
        for item in SourceItems(source, store.folder)
    ]
    job = TextJob(conditioner, source, store, prompts)
    return run_pass(job, items, replace(options, max_skipped=source.max_skipped))


def tag_of(data: PartConfig, source: Source) -> str:
    """Return what names the work items of some data, so that other data may add to the same store.

    It is the same one in all processes, each of which finds it out by itself: so nothing of it is asked of servers,
    which answer one process and not another.
    """
    options = {key: value for key, value in data.to_dict().items() if key not in LOADING}
    found = contents_of(
        source.unit, file_entries([(name, str(path) if path else None) for name, path in source.files()])
    )
    told = json.dumps([found or source.contents(), options], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=6).hexdigest()


def summary(store: TextStore, report: PassReport) -> str:
    """Return what is stored, in words, and what was read and skipped."""
    store.refresh()
    size = in_units(sum(path.stat().st_size for path in store.folder.glob(f"{SHARD}*{ENDING}")))
    return f"{store.folder}: {len(store):,} texts of {store.tokens:,} tokens, {size}. data: {report.counts}"
