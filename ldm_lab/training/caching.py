"""Latents and conditions computed once and kept, so that training skips the frozen networks: the section `cache`."""

import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.checkpoints.parts import has_weights, load_part, weights_sha256
from ldm_lab.config import PartConfig, PositiveInt, RunConfig, register, signature_options
from ldm_lab.config.uses import EncoderPrecision
from ldm_lab.data.cache import ENCODERS, encoders_of
from ldm_lab.data.cache_files import META, CacheMeta, read_meta
from ldm_lab.data.cache_items import DONE
from ldm_lab.data.cache_places import LocalCache
from ldm_lab.data.file_facts import Files, differences, digest, facts_of, read_facts, write_facts
from ldm_lab.data.jobs import PassOptions, PassReport
from ldm_lab.data.passes import run_pass
from ldm_lab.data.samples import RawSample, as_utf8
from ldm_lab.data.shard_source import ShardSource
from ldm_lab.data.shard_urls import is_remote, scheme_of
from ldm_lab.data.source import ImageSource, Source
from ldm_lab.data.work_items import SourceItem, SourceItems
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.io.atomic import PARTIAL
from ldm_lab.processes import wait_for_each_other
from ldm_lab.training.disk import check_room
from ldm_lab.training.encoders import Encoders
from ldm_lab.training.encoding import SEED, CacheJob, CacheTarget, Variants, expected_row_bytes
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.texts import load_conditioner, store_of, watch

PATHS = ("path", "shards", "folder")  # options that say where data are
PROBE = 100  # samples of a shard that tell how many there are in all
TAR = 1024  # bytes of a file in a tar beside its own, about
OPEN_CHOICES = ("crops", "flip", "precision", "limit")  # those that a config leaves open are as the cache has them
AGAIN = "the same command tries again"


@register("cache")
class CacheOptions:
    """Encode the data once, at the first start, and train on what was encoded."""

    def __init__(
        self,
        *,
        folder: str,
        check: Literal["time", "size", "none"] = "time",
        crops: PositiveInt | None = None,
        flip: bool | None = None,
        precision: Literal["32-true", "bf16-mixed"] | None = None,
        limit: PositiveInt | None = None,
    ) -> None:
        """Set where it lies and what is in it. What is left out is as an existing cache has it.

        Args:
            folder: made at first use, and read from then on.
            check: how images are told from those that it was made of: by names, sizes and times of the last change;
                without the times, as copies have others; or not at all.
            crops: random crops of each image, for data.crop=random; null makes 1. Each epoch takes the next one.
            flip: keep each crop mirrored, too; null does not, and data.flip mirrors it once or not at all.
            precision: of the encoders' arithmetic; null makes it with 32-true, or with bf16-mixed if autoencoder and
                conditioner are both of precision bf16.
            limit: encode so many images alone, evenly spread; null encodes all.
        """
        self.folder, self.compared = Path(folder).expanduser(), check
        self.crops, self.flip, self.precision, self.limit = crops, flip, precision, limit

    @staticmethod
    def check(*, folder: str) -> list[str]:
        """Return what is wrong with the folder."""
        if scheme_of(folder):
            return [
                f"folder: a cache is made in a folder; `data: {{name: cache, path: {folder}}}` reads one from there"
            ]
        return []

    @property
    def variants(self) -> Variants:
        """Of each image."""
        return Variants(self.crops or 1, self.flip or False)


def cache_options(config: RunConfig) -> CacheOptions:
    """Return the section `cache` of a config; one that says nothing if there is none."""
    options: CacheOptions = config["cache"].build() if "cache" in config else CacheOptions(folder="")
    return options


def training_data(config: RunConfig) -> PartConfig:
    """Return the data section to train with: the config's own, or that of its cache, which is made if need be.

    Raises:
        UserError: the folder holds a cache of other data or other weights, or not all of it could be made.
    """
    if "cache" not in config:
        return config.part("data")
    folder = cache_options(config).folder
    data = config["data"]
    if not is_complete(folder, config):
        print_rank_zero(f"encoding the data once, into {folder}/")
        report = make_cache(config, options_of_run(config))
        wait_for_each_other()  # the processes of the pass, which go on training, had to wait much longer
        if report is not None:
            print(summary(folder, report))
            if report.unreached:
                raise UserError(f"{folder}: {unreached(report)}, so the cache is not complete; {AGAIN}")
    loading = {key: data[key] for key in ("batch_size", "workers", "timeout", "max_skipped") if key in data}
    return PartConfig("data", "cache", {"path": str(folder), **loading})


def options_of_run(config: RunConfig) -> PassOptions:
    """Return how a run makes its cache: with all processes if they are there already, or else alone."""
    data, trainer = config["data"], config.part("trainer")
    options = PassOptions(data.option("batch_size"), data.option("workers"), accelerator=trainer.option("accelerator"))
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) == 1:
        return options
    return replace(options, devices=str(trainer.option("devices")), num_nodes=trainer.option("num_nodes"))


# ------------------------------------------------------------------------------------------------- is it the right one


def is_complete(folder: Path, config: RunConfig) -> bool:
    """Return whether a folder holds the whole cache of this config. Raises UserError if it is that of another one."""
    if not (folder / META).is_file() or not read_meta(folder).complete:
        return False
    data: Source = config["data"].build()
    try:
        data.prepare()
        data.open()
    except UserError as error:
        print_rank_zero(f"cache: {folder} is taken as it is, the images cannot be compared with it: {error}")
        files = read_facts(folder) or {}
    else:
        files = facts_of(data.files())
    check_cache(folder, config, files)
    return True


def check_cache(folder: Path, config: RunConfig, files: Files) -> None:
    """Raise UserError if a folder has a cache of another config or of other files."""
    remedy = "delete it, or take another folder"
    options, before = cache_options(config), read_facts(folder)
    other = description_differences(read_meta(folder).description, description(config, files))
    if other:
        raise UserError(f"{folder}: this cache was made with another {', '.join(other)}; {remedy}")
    if options.compared == "none" or before is None:
        return
    if found := differences(before, files, times=options.compared == "time"):
        only_times = options.compared == "time" and not differences(before, files, times=False)
        hint = "; cache.check=size if they are mere copies" if only_times else ""
        raise UserError(f"{folder}: this cache was made of other files: {as_utf8(found)}; {remedy}{hint}")


def description(config: RunConfig, files: Files) -> dict[str, str]:
    """Return what a cache is made with, each as JSON: the images, the parts that encode them, their weights' checksums.

    Args:
        config: of the run.
        files: of its data, which tell more than how their folder is written.
    """
    data, cache = config["data"], config.part("cache").options
    left_out = {"batch_size", "max_skipped", "workers", "timeout", "shuffle_buffer", *(PATHS if files else ())}
    found = {"image_size": json.dumps(data["image_size"]), "data.name": json.dumps(data.name)}
    for key in signature_options(data.load()):
        if key not in left_out:
            found[f"data.{key}"] = json.dumps(data.option(key), sort_keys=True)
    found |= {"files": json.dumps(digest(files)), SEED: json.dumps(config.seed)}
    found |= {key: json.dumps(cache.get(key)) for key in OPEN_CHOICES}
    for role in ENCODERS:
        if role == "conditioner" or has_weights(role, config[role]):  # an autoencoder without weights encodes nothing
            facts = encoder_facts(config[role], weights_sha256(role, config[role]))
            found |= {f"{role}.{name}": value for name, value in facts.items()}
    return found


def encoder_facts(part: PartConfig, checksum: str | None) -> dict[str, str]:
    """Return what tells a part that encodes from others, as JSON; a file need not say it all, such as activations.

    Args:
        part: its section.
        checksum: of its weights.
    """
    options = {name: json.dumps(value, sort_keys=True) for name, value in part.options.items()}
    return {"name": json.dumps(part.name), "sha256": json.dumps(checksum), **options}


def description_differences(there: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Return the names of what is another one in an existing cache; choices that are left open are the cache's."""
    left_open = [key for key in OPEN_CHOICES if wanted.get(key) == "null"]
    undrawn = [SEED] if there.get(SEED) == "null" else []  # nothing was drawn: any seed would have made it
    compared = [key for key in wanted if key not in ("files", *left_open, *undrawn)]
    before, now = encoders_of(there), encoders_of(wanted)
    before_all = {key: "null" for key in wanted if key not in there}  # options that came later, and were not in use
    own = [
        key for key in compared if key.partition(".")[0] not in ENCODERS and {**before_all, **there}[key] != wanted[key]
    ]
    others = [encoder_differences(role, before.get(role, {}), now.get(role, {})) for role in ENCODERS]
    return [f"cache.{key}" if key in OPEN_CHOICES else key for key in own] + [key for keys in others for key in keys]


def encoder_differences(role: str, there: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Return how a part differs from that of a cache: its role, or its options; nothing if it does not."""
    if any(there.get(key) != wanted.get(key) for key in ("sha256", "name")):
        return [role]
    return [f"{role}.{key}" for key in {**there, **wanted} if there.get(key) != wanted.get(key)]


# ----------------------------------------------------------------------------------------------------------- making it


@told_in_one_line(lambda: "encoding the data", "a smaller --batch-size, or data.batch_size, needs less")
def make_cache(config: RunConfig, options: PassOptions, without_unreached: bool = False) -> PassReport | None:
    """Encode the data of a diffusion config, with a progress bar; an interrupted pass goes on with what is left.

    Args:
        config: with a section `cache`.
        options: of the pass; precision and max_skipped are the config's.
        without_unreached: the cache is complete even without shards that cannot be reached.

    Returns:
        What was done, on the first process; None on all others.

    Raises:
        UserError: frozen parts without weights, data that are a cache already or without a usable image, a folder that
            holds something else, or the whole cache.
    """
    if "image_size" not in config["data"]:
        raise UserError("data: images are needed to make a cache, and this is one already")
    config = with_choices(config)
    encoders = load_encoders(config)
    cache = cache_options(config)
    source: Source = config["data"].build()
    check_variants(source, cache.variants)
    source.prepare()
    source.open()
    files = facts_of(source.files())
    wanted = description(config, files)
    begin(config, files, wanted)
    if isinstance(source, ImageSource) and cache.variants.flip:
        source.flip = False  # both are kept
    items = SourceItems(source, cache.folder, cache.limit)
    row = expected_row_bytes(encoders, config["data"]["image_size"])
    check_room(cache.folder, samples_left(source, items) * cache.variants.count * row, "this cache")
    job = CacheJob(encoders, source, cache.variants, CacheTarget(cache.folder, wanted, config.seed, without_unreached))
    precision, max_skipped = cache.precision or PassOptions.precision, source.max_skipped
    watch(source, encoders.conditioner)
    report = run_pass(job, items, replace(options, precision=precision, max_skipped=max_skipped))
    if (store := store_of(encoders.conditioner)) is not None:
        store.flush()
    return report


def with_choices(config: RunConfig) -> RunConfig:
    """Return a config in whose section `cache` nothing is left open: a cache that was begun is ended as it began."""
    folder, given = cache_options(config).folder, config.part("cache").options
    begun = read_meta(folder).description if (folder / META).is_file() else {}
    both_in_bf16 = all(role in config and config[role].get("precision") == "bf16" for role in ENCODERS)
    precision = "bf16-mixed" if both_in_bf16 else PassOptions.precision
    choices = {"crops": 1, "flip": False, "precision": precision, "limit": None}
    for key in choices:
        if given.get(key) is not None:
            choices[key] = given[key]
        elif key in begun:
            choices[key] = json.loads(begun[key])
    return config.with_part("cache", PartConfig("cache", "cache", {**given, **choices}))


def load_encoders(config: RunConfig) -> Encoders:
    """Return the frozen parts that encode, in the cache's precision. Raises UserError if one lacks its weights."""
    parts = []
    for role in ENCODERS:
        if role not in config:
            raise UserError(f"{role}: this section has to be given")
        part = load_part(role, config[role]) if role != "conditioner" else load_conditioner(config, later=False)
        if any(True for _ in part.parameters()) and not has_weights(role, config[role]):
            raise UserError(f"{role}.weights: has to be given; a cache is made with trained parts")
        parts.append(part)
    precision: EncoderPrecision = "bf16" if cache_options(config).precision == "bf16-mixed" else "fp32"
    autoencoder, conditioner = parts
    return Encoders(autoencoder, conditioner, precision, precision)


def check_variants(source: Source, variants: Variants) -> None:
    """Raise UserError for several crops that would be one and the same."""
    if variants.crops > 1 and not (isinstance(source, ImageSource) and source.crop == "random"):
        raise UserError(f"cache.crops: {variants.crops} crops need data.crop=random; those of the center are the same")


def begin(config: RunConfig, files: Files, wanted: dict[str, str]) -> None:
    """Make the cache's folder, or find the one that was begun. Raises UserError if it holds something else."""
    folder = cache_options(config).folder
    if (folder / META).is_file():
        meta = read_meta(folder)
        check_cache(folder, config, files)
        if meta.complete:
            try:
                LocalCache(folder, meta).check()
            except UserError as error:
                print_rank_zero(f"cache: made again: {str(error).partition('; ')[0]}")
            else:
                raise UserError(f"{folder}: this cache is complete already ({meta.samples:,} samples)")
    elif holds_something(folder) and not (folder / META).is_file():  # the first process may begin it meanwhile
        raise UserError(f"{folder}: neither empty nor a cache; take another folder")
    if rank_zero_only.rank == 0:
        CacheMeta(wanted).write(folder)
        write_facts(folder, files)


def holds_something(folder: Path) -> bool:
    """Return whether there is a folder with something in it, beside what an interrupted start may have left."""
    return folder.is_dir() and any(path.suffix != PARTIAL for path in folder.iterdir())


def summary(folder: Path, report: PassReport) -> str:
    """Return a line that says what was encoded and skipped."""
    return f"{folder}: {report.counts.used:,} samples. data: {report.counts}"


def unreached(report: PassReport) -> str:
    """Return which shards could not be read, in words."""
    return f"{len(report.unreached)} of {report.items} shards could not be read, such as {report.unreached[0]}"


def samples_left(source: Source, items: list[SourceItem]) -> int:
    """Return about how many samples are still to be encoded; 0 where nobody can tell without reading all of them."""
    left = [item for item in items if not item.file(DONE).exists()]
    if not isinstance(source, ShardSource):
        return sum(item.units if item.most is None else min(item.units, item.most) for item in left)
    local = [item for item in left if not is_remote(item.address) and not scheme_of(item.address)]
    sizes = [os.path.getsize(item.address) for item in local]
    sample: list[int] = []
    for raw in islice(local[0].samples() if local else [], PROBE):
        if isinstance(raw, RawSample):
            sample.append(sum(len(part) + TAR for part in (raw.image, raw.text, raw.json) if part is not None))
    if not sample:
        return 0
    counts = [max(1, size * len(sample) // sum(sample)) for size in sizes]
    return sum(count if item.most is None else min(count, item.most) for item, count in zip(local, counts))
