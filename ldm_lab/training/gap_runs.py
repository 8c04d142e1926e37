"""Means that are measured: by `python -m ldm_lab gap`, or when a run starts whose config names none."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ldm_lab.checkpoints.embedders import embedder_of, same
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.gap_files import GapFile, read_gap, split_gap
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import has_weights, load_part, weights_sha256
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.gap import Gap
from ldm_lab.config import ConditionerUse, PartConfig, RunConfig
from ldm_lab.data.cache_files import META
from ldm_lab.data.jobs import PassOptions
from ldm_lab.data.passes import run_pass
from ldm_lab.data.source import Source
from ldm_lab.data.varied_texts import CAPTIONS, texts_of
from ldm_lab.data.work_items import SourceItems
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.processes import wait_for_each_other
from ldm_lab.training.caching import cache_options, encoder_differences, encoder_facts, is_complete, options_of_run
from ldm_lab.training.gap import FILE, GapOptions, gap_options
from ldm_lab.training.gap_measuring import GapJob, GapReport, GapWanted, say
from ldm_lab.training.logs import print_rank_zero


def with_own_means(config: RunConfig, folder: Path) -> RunConfig:
    """Return a run's config with the file named that its means go into, if it has to measure them itself.

    A run that adds to a model (LoRA) keeps the model's.

    Args:
        config: checked.
        folder: the run's.
    """
    section = config.sections.get("conditioner")
    if section is None or not isinstance(section.use, ConditionerUse) or section.use.gap is None:
        return config
    options = gap_options(section)
    if options is None or options.means is not None or not options.needs_means or "lora" in config:
        return config
    return config.with_part("conditioner", section.with_use(gap={**section.use.gap, "means": str(folder / FILE)}))


def own_means(config: RunConfig, folder: Path) -> GapOptions | None:
    """Return the section `gap` of a run whose means are its own (`with_own_means`); None of any other."""
    section = config.sections.get("conditioner")
    if section is None or not isinstance(section.use, ConditionerUse):
        return None
    options = gap_options(section)
    return options if options is not None and options.means == str(folder / FILE) else None


def needs_means(config: RunConfig, folder: Path, resumed: Path | None) -> Literal["measured", "from checkpoint", ""]:
    """Return where a run would get its means from when it starts; "" where they are there, or are not its own.

    Args:
        config: with `with_own_means`.
        folder: the run's.
        resumed: the checkpoint that it goes on with; None begins anew.
    """
    options, path = own_means(config, folder), folder / FILE
    if options is None or (path.exists() and resumed is not None):
        return ""
    if path.exists():
        return "measured" if outdated(config, options, path, opened(config)) else ""
    return "measured" if resumed is None or not kept_means(resumed) else "from checkpoint"


def kept_means(checkpoint: Path) -> dict[str, Tensor]:
    """Return the state of the means in a run's checkpoint; empty without any."""
    return split_gap(read_pickled(checkpoint, mmap=True).get("state_dict", {}))[1]


def few_means(config: RunConfig, images: int) -> RunConfig:
    """Return a run like another one that measures its means itself, on a few images."""
    section = config["conditioner"]
    gap = {key: value for key, value in (section.use_as(ConditionerUse).gap or {}).items() if key != "means"}
    return config.with_part("conditioner", section.with_use(gap={**gap, "images": images}))


def prepare_means(config: RunConfig, folder: Path, resumed: Path | None) -> None:
    """Measure the means of a run whose config names none, if they are not there or are of something else; say so.

    Args:
        config: with `with_own_means`.
        folder: the run's.
        resumed: the checkpoint that it goes on with; None begins anew.

    Raises:
        UserError: data that cannot be read, what `measure_gap` raises.
    """
    options, path = own_means(config, folder), folder / FILE
    if options is None:
        return
    if resumed is not None and path.exists():
        return  # the checkpoint's hold in any case
    if resumed is not None and (state := kept_means(resumed)):
        about = Section(about=f"as of {resumed}")
        GapFile(Gap.from_state(state, str(resumed)), embedder_of(config["conditioner"]), about).save(path)
        return
    source = opened(config)
    if path.exists():
        if not (other := outdated(config, options, path, source)):
            return
        print_rank_zero(f"conditioner.gap: {path} is of {other}; it is measured anew")
    print_rank_zero(f"conditioner.gap: no means are named; they are measured, into {path}")
    wanted = GapWanted(path, options.texts, options.map or "none", description(config, options, source))
    passing = replace(options_of_run(config), devices=devices_of_run(config))
    say(measure_gap(config, source, wanted, options.images, passing))
    wait_for_each_other()  # the processes of the pass go on training


def devices_of_run(config: RunConfig) -> str:
    """Return the devices of a run whose processes are there already; else one."""
    many = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
    return str(config.part("trainer").option("devices")) if many else "1"


def outdated(config: RunConfig, options: GapOptions, path: Path, source: Source) -> str:
    """Return of what else a file of means is than a run would measure, in words; "" if they are the same."""
    file = read_gap(path)
    if not same(file.embedder, embedder_of(config["conditioner"])):
        return "another conditioner"
    return "" if file.facts.get("about") == description(config, options, source) else "other images or texts"


def description(config: RunConfig, options: GapOptions, source: Source) -> str:
    """Return what means are of, in a line: the conditioner, the data, how many, which texts, which map.

    Other files under the same name have another checksum.
    """
    texts = "" if options.texts == CAPTIONS else f" ({_checksum(chr(10).join(texts_of(options.texts)))})"
    return (
        f"{config['conditioner'].architecture()}, {of_data(config, source)}, {options.images} images, "
        f"texts {options.texts}{texts}, map {options.map}"
    )


def of_data(config: RunConfig, source: Source) -> str:
    """Return which data are measured, in a line: their section, and a checksum of what was found (`opened`)."""
    loading = ("batch_size", "workers", "timeout", "max_skipped", "shuffle_buffer")
    data = {key: value for key, value in config["data"].to_dict().items() if key not in loading}
    return f"{data} ({_checksum(source.contents())})"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]


def opened(config: RunConfig) -> Source:
    """Return the data that are measured, opened. Raises UserError."""
    source: Source = data_to_measure(config).build()
    source.prepare()
    source.open()
    return source


def data_to_measure(config: RunConfig) -> PartConfig:
    """Return the data section whose images, or cached embeddings, are measured."""
    data = config["data"]
    if "cache" not in config:
        return data
    folder = cache_options(config).folder
    if not (folder / META).is_file() or not is_complete(folder, config):
        return data
    loading = {key: data[key] for key in ("batch_size", "workers", "timeout", "max_skipped") if key in data}
    return PartConfig("data", "cache", {"path": str(folder), **loading})


@told_in_one_line(lambda: "measuring the gap", "a smaller data.batch_size needs less")
def measure_gap(
    config: RunConfig, source: Source, wanted: GapWanted, images: int, options: PassOptions
) -> GapReport | None:
    """Measure the means of a config's images, or of its cache, and of texts; an interrupted pass goes on.

    Args:
        config: with sections data and conditioner.
        source: its data (`opened`).
        wanted: what is measured, and where it goes.
        images: how many, evenly spread over the data.
        options: of the pass.

    Returns:
        What was found, on the first process; None on all others.

    Raises:
        UserError: a conditioner that does not embed images and texts alike, or without weights; data that cannot be
            reached, without a usable image, or a cache of another conditioner.
    """
    section = config.part("conditioner")
    conditioner = load_part("conditioner", section)
    if not isinstance(conditioner, EmbeddingConditioner):
        raise UserError(f"conditioner.name: {section.name} does not embed images and texts alike")
    if not has_weights("conditioner", section):
        raise UserError("conditioner.weights: has to be given; an untrained conditioner's embeddings say nothing")
    for role, there in source.encoded_by.items():
        here = encoder_facts(section, weights_sha256("conditioner", section)) if role == "conditioner" else there
        if other := encoder_differences(role, there, here):
            raise UserError(f"data.path: this cache was made with another {', '.join(other)}")
    job = GapJob(conditioner, embedder_of(section), source, wanted)
    items = SourceItems(source, job.folder(options.precision), images)
    report = run_pass(job, items, replace(options, max_skipped=source.max_skipped))
    if report is not None and report.unreached:
        raise UserError(
            f"conditioner.gap: {len(report.unreached)} of {report.items} shards could not be read, such as "
            f"{report.unreached[0]}; the same command tries again"
        )
    return job.report
