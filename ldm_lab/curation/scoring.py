"""Shards in, Parquet with scores out: every image is embedded once, then asked by every head.

Lightning's Trainer predicts, so that its devices, nodes, torchrun and SLURM work. What is dealt out to the processes
are whole shards (`units`), and a batch never mixes two of them: so a shard's Parquet does not depend on how many
processes there were. A shard is done when its Parquet is there, which is written last and whole; whoever begins anew
skips those that are done.
"""

import json
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from ldm_lab.checkpoints import embedders
from ldm_lab.curation import score_files
from ldm_lab.curation.heads.head import Loaded
from ldm_lab.curation.store import hash_of
from ldm_lab.curation.units import Block, Shard
from ldm_lab.data.loader import Counts
from ldm_lab.data.shards import read_parts, write_shard
from ldm_lab.data.source import Raw, Skip, caption_of
from ldm_lab.embed import Encoder, Prepare
from ldm_lab.errors import UserError, first_line
from ldm_lab.io.images import BadImage, decode_image, to_rgb
from ldm_lab.training.logs import quiet_lightning

Unit = Shard | Block
SIMILARITY = "similarity"
LONGEST_WAIT = timedelta(days=30)  # of one process for another one that has more to do
REFRESH = 0.5  # seconds between updates of the bar


class Wanted(NamedTuple):
    """What is asked of every shard.

    Attributes:
        similarity: also the cosine of an image's and its caption's embedding.
        embeddings: also write the images' embeddings.
        rewrite: the folder of new shards whose json has the scores; None for none.
        batch_size: images that are embedded at once.
        workers: loader processes per device.
    """

    similarity: bool = True
    embeddings: bool = False
    rewrite: Path | None = None
    batch_size: int = 64
    workers: int = 2


# ------------------------------------------------------------------------------------------------------------ reading


class Batches(IterableDataset):
    """The prepared images of some units, batch by batch, each within its unit.

    A batch is {"unit": index, "pixels": [B, 3, S, S], "text", "key", "url", "hash": lists}. Behind a unit's last one
    comes {"unit": index, "counts": what was read and skipped, as plain values}. Every loader process has its own units.
    """

    def __init__(self, units: dict[int, Unit], prepare: Prepare, batch_size: int) -> None:
        self.units, self.prepare, self.batch_size = units, prepare, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        process = get_worker_info()
        mine = list(self.units.items())
        for index, unit in mine[process.id :: process.num_workers] if process else mine:
            yield from self.read(index, unit)

    def read(self, index: int, unit: Unit) -> Iterator[dict[str, Any]]:
        """Yield the batches of a unit and its counts."""
        counts, seen, samples = Counts(), set(), []
        for item in unit.items():
            counts.read += 1
            try:
                if isinstance(item, Skip):
                    raise item
                if item.key in seen:
                    raise Skip("duplicate key", item.key)
                seen.add(item.key)
                samples.append(self.sample(item))
            except Skip as problem:
                counts.skip(Skip(problem.reason, _text(problem.key)))
                continue
            if len(samples) == self.batch_size:
                yield {"unit": index, **_collate(samples)}
                samples = []
        if samples:
            yield {"unit": index, **_collate(samples)}
        yield {"unit": index, "counts": counts.state()}

    def sample(self, item: Raw) -> dict[str, Any]:
        """Return a sample's prepared image, its caption and what its json says of it. Raises Skip."""
        if item.image is None:
            raise Skip("no image", item.key)
        try:
            pixels = self.prepare(to_rgb(decode_image(item.image)))  # [3, S, S]
        except BadImage as problem:
            raise Skip(str(problem), item.key) from None
        fields = json_fields(item.json)
        named = {name.lower(): value for name, value in fields.items()}
        url = named.get("url")
        return {
            "pixels": pixels,
            "text": caption_of(item),
            "key": _text(item.key),
            "url": _text(url) if isinstance(url, str) else None,
            "hash": _hash(named),
        }


def _hash(fields: dict[str, Any]) -> int | None:
    """Return LAION's hash of a sample: its own, or that of the url and caption that img2dataset notes of each."""
    number, url, caption = fields.get("hash"), fields.get("url"), fields.get("caption", False)
    if isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63:
        return number
    if not isinstance(url, str) or not isinstance(caption, str | None):
        return None
    try:
        return hash_of(url, caption)
    except UserError:  # half a surrogate pair
        return None


def json_fields(data: bytes | None) -> dict[str, Any]:
    """Return what a sample's json says; nothing where it is missing or none."""
    try:
        fields = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _text(written: str) -> str:
    """Return a text that can be written as UTF-8, whatever bytes a name was made of."""
    return written.encode(errors="surrogateescape").decode(errors="replace") if not written.isascii() else written


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {**batch, "pixels": torch.stack(batch["pixels"])}  # [B, 3, S, S]


class Loader:
    """The batches of one process's units, in loader processes of its own."""

    def __init__(self, batches: Batches, workers: int) -> None:
        self.batches, self.workers = batches, min(workers, len(batches.units))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(
            DataLoader(
                self.batches,
                batch_size=None,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_ignore_interrupts,
            )
        )


def _ignore_interrupts(process: int) -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the process that stops this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------------------ scoring


class Scoring(LightningModule):
    """Scores units and writes their files."""

    def __init__(self, units: list[Unit], encoder: Encoder, heads: dict[str, Loaded], wanted: Wanted) -> None:
        """Take everything that a run needs.

        Args:
            units: all of them, in the same order in every process.
            encoder: of all heads' embeddings.
            heads: column -> head.
            wanted: what to write.

        Raises:
            UserError: a head of another embedder, or of another width.
        """
        super().__init__()
        self.units, self.encoder, self.heads, self.wanted = units, encoder, heads, wanted
        for column, loaded in heads.items():
            embedders.check_same(f"head {loaded.source}", loaded.head.embedder, encoder.embedder)
            loaded.head.check_width(encoder.embed_dim)
            if column in ("key", "url", "hash", SIMILARITY):
                raise UserError(
                    f"--head {column}={loaded.source}: the column {column} is another one; name it otherwise"
                )
        if wanted.rewrite is not None:
            for unit in units:
                if isinstance(unit, Block):
                    raise UserError("--rewrite: writes shards anew, and these are files of their own")
                if self.rewritten(unit).resolve() == Path(unit.address).resolve():
                    raise UserError(f"--rewrite {wanted.rewrite}: would overwrite {unit.address}; take another folder")
        self.models = torch.nn.ModuleDict({f"head_{i}": loaded.head for i, loaded in enumerate(heads.values())})
        self.held: dict[int, dict[str, list[Any]]] = {}

    def identity(self) -> dict[str, Any]:
        """Return what makes the scores what they are, as plain values; files that say otherwise have other scores."""
        return {
            "embedder": self.encoder.embedder,
            "precision": str(self.trainer.precision),
            "predictors": {column: loaded.sha256 for column, loaded in self.heads.items()},
            "similarity": self.wanted.similarity,
        }

    # ------------------------------------------------------------------------------------------------ what is left

    def is_done(self, unit: Unit) -> bool:
        """Return whether a unit's files are all there.

        Raises:
            UserError: there is a Parquet that has other scores: it is not overwritten.
        """
        path = _with(unit.target, score_files.SCORES)
        if not path.exists():
            return False
        facts = score_files.read_facts(path)
        if facts is None:
            return False  # damaged: a name like this is nobody else's
        for what, ours in self.identity().items():
            if facts.get(what) != ours:
                raise UserError(f"{path}: has scores of another {what}; take another --out, or delete it")
        if facts.get("content") != unit.content():
            return False
        others = [_with(unit.target, score_files.EMBEDDINGS)] if self.wanted.embeddings else []
        others += [self.rewritten(unit)] if self.wanted.rewrite is not None else []
        return all(other.exists() for other in others)

    def rewritten(self, unit: Unit) -> Path:
        """Return the path of a unit's new shard."""
        return self.wanted.rewrite / unit.name.with_name(f"{unit.name.name}.tar")

    def predict_dataloader(self) -> Loader:
        """Return this process's share of what is not done. The first process looks; the others may see more already."""
        left: list[int] | str = []
        if self.trainer.is_global_zero:
            try:
                left = [index for index, unit in enumerate(self.units) if not self.is_done(unit)]
            except UserError as error:
                left = str(error)  # for the others, too: they would wait
        left = self.trainer.strategy.broadcast(left)
        if isinstance(left, str):
            raise UserError(left)
        mine = left[self.global_rank :: self.trainer.world_size]
        batches = Batches({index: self.units[index] for index in mine}, self.encoder.prepare, self.wanted.batch_size)
        return Loader(batches, self.wanted.workers)

    # ------------------------------------------------------------------------------------------------ one batch

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> dict:
        if "pixels" in batch:
            batch["pixels"] = batch["pixels"].to(device, non_blocking=True)  # [B, 3, S, S]
        return batch

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> int:
        """Score a batch, or write the files of a unit whose last batch it was. Returns how many images were scored."""
        if "counts" in batch:
            self.close(batch["unit"], Counts(**batch["counts"]))
            return 0
        embeds = self.encoder.images(batch["pixels"])  # [B, D]
        with torch.autocast(embeds.device.type, enabled=False):  # heads are too small to save anything
            scores = {column: head(embeds) for column, head in zip(self.heads, self.models.values())}  # [B] each
        if self.wanted.similarity:
            scores[SIMILARITY] = self.similarity(embeds, batch["text"])  # [B]
        held = self.held.setdefault(batch["unit"], {})
        for name in ("key", "url", "hash"):
            held.setdefault(name, []).extend(batch[name])
        held.setdefault("embeds", []).append(embeds.half().cpu() if self.wanted.embeddings else None)
        held.setdefault("finite", []).append(embeds.isfinite().all(dim=1).cpu())
        for column, values in scores.items():
            held.setdefault(f"score {column}", []).append(values.float().cpu())
        return len(batch["key"])

    def similarity(self, embeds: Tensor, texts: list[str]) -> Tensor:
        """Return the cosines of images [B, D] and their captions, [B], NaN where there is no caption."""
        similar = embeds.new_full((len(texts),), torch.nan)  # [B]
        at = [i for i, text in enumerate(texts) if text]
        if at:
            similar[at] = (embeds[at] * self.encoder.texts([texts[i] for i in at])).sum(dim=1)  # [captions]
        return similar

    def close(self, index: int, counts: Counts) -> None:
        """Write a unit's files, the Parquet last; a unit that could not be reached is left for another time."""
        unit, held = self.units[index], self.held.pop(index, {})
        if "unreachable shard" in counts.skipped or (unit.is_remote and "broken shard" in counts.skipped):
            return
        rows = {name: held.get(name, []) for name in ("key", "url", "hash")}
        finite = torch.cat(held["finite"]).numpy() if held else np.ones(0, dtype=bool)  # [N]
        for key in np.array(rows["key"], dtype=object)[~finite]:
            counts.skip(Skip("non-finite embedding", key))
        rows = {name: [value for value, good in zip(values, finite) if good] for name, values in rows.items()}
        columns = [*self.heads, *[SIMILARITY] * self.wanted.similarity]
        scores = {c: _joined(held.get(f"score {c}"))[finite].astype(np.float32) for c in columns}  # [N] each
        if self.wanted.embeddings:
            width = (0, self.encoder.embed_dim)
            embeds = torch.cat(held["embeds"])[torch.from_numpy(finite)] if held else torch.zeros(width)  # [N, D]
            path = _with(unit.target, score_files.EMBEDDINGS)
            score_files.write_embeddings(path, embeds, rows["key"], self.encoder.embedder)
        if self.wanted.rewrite is not None:
            rewrite(unit.address, self.rewritten(unit), rows["key"], scores)
        sources = {
            column: {"source": loaded.source, "kind": loaded.head.part_name, "trained": loaded.trained}
            for column, loaded in self.heads.items()
        }
        facts = {**self.identity(), "heads": sources, "content": unit.content(), **counts.state()}
        score_files.write_scores(_with(unit.target, score_files.SCORES), rows, scores, facts)


def _with(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _joined(parts: list[Tensor] | None) -> np.ndarray:
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)  # [N]


def rewrite(address: str, path: Path, keys: list[str], scores: dict[str, np.ndarray]) -> None:
    """Write a copy of a shard in which each sample's json has its scores too; samples without scores are left out.

    Raises:
        UserError: the folder cannot be written.
    """
    rows = {key: i for i, key in enumerate(keys)}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for item in read_parts(address):
            if isinstance(item, Skip) or (row := rows.pop(_text(item[0]), None)) is None:
                continue
            key, parts = item
            given = {column: float(values[row]) for column, values in scores.items() if not np.isnan(values[row])}
            fields = {**json_fields(parts.get("json")), **given}
            yield key, {**parts, "json": json.dumps(fields).encode()}

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, samples())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------------------- the run


class Bar(Callback):
    """A progress bar of images, with images per second over all processes, on the first one."""

    def on_predict_start(self, trainer: Trainer, module: Scoring) -> None:
        self.bar = tqdm(desc="score", unit="image", dynamic_ncols=True, disable=not trainer.is_global_zero)
        self.images = self.units = 0
        self.seen_at = 0.0

    def on_predict_batch_end(
        self, trainer: Trainer, module: Scoring, outputs: int, batch: dict[str, Any], index: int, loader: int = 0
    ) -> None:
        self.images += outputs
        self.units += "counts" in batch
        now = time.monotonic()
        if now - self.seen_at > REFRESH or "counts" in batch:
            self.bar.set_postfix(shards=self.units * trainer.world_size, refresh=False)
            self.bar.update(self.images * trainer.world_size - self.bar.n)
            self.seen_at = now

    def on_predict_end(self, trainer: Trainer, module: Scoring) -> None:
        self.bar.close()

    def on_exception(self, trainer: Trainer, module: Scoring, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def run(
    scoring: Scoring,
    *,
    devices: str | int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> tuple[str, list[str]]:
    """Score, with a progress bar.

    Args:
        scoring: what to do.
        devices, num_nodes, accelerator, precision: as Lightning's Trainer takes them.

    Returns:
        On the first process a line that says what was scored and skipped, by this run and those before, and the
        addresses that could not be reached; elsewhere nothing.

    Raises:
        UserError: no image was scored at all, a device that is not there, files that cannot be written.
    """
    quiet_lightning()
    torch.set_float32_matmul_precision("high")
    for folder in {unit.target.parent for unit in scoring.units}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from None
    alone = str(devices) == "1" and num_nodes == 1
    try:
        trainer = Trainer(
            accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision,
            strategy="auto" if alone else DDPStrategy(timeout=LONGEST_WAIT), callbacks=[Bar()], logger=False,
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"--devices {devices}: {first_line(error)}") from None
    try:
        trainer.predict(scoring, return_predictions=False)
    except BaseException:
        if hasattr(trainer.strategy.launcher, "kill"):  # the other processes would go on without this one
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return "", []
    return report(scoring)


def report(scoring: Scoring) -> tuple[str, list[str]]:
    """Return what the Parquet files say was scored and skipped, in a line, and which units have none."""
    total, done, left = Counts(), 0, []
    for unit in scoring.units:
        facts = score_files.read_facts(_with(unit.target, score_files.SCORES))
        if facts is None:
            left.append(unit.address)
            continue
        total.add(Counts(facts["read"], facts["skipped"], facts["examples"]))
        done += 1
    scored = total.read - sum(total.skipped.values())
    if not scored and not left:
        raise UserError(f"no image could be scored: {total}")
    return f"{scored:,} images scored in {done:,} of {len(scoring.units):,} shards: {total}", left
