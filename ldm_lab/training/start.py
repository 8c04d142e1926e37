"""What a run lacks is found out before anything is downloaded, encoded or built, and told all at once."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm_lab.checkpoints.gap_files import read_gap
from ldm_lab.checkpoints.parts import part_downloads
from ldm_lab.config import PartConfig, RunConfig
from ldm_lab.data.cache_files import META, read_meta
from ldm_lab.data.source import Source
from ldm_lab.data.varied_texts import CAPTIONS, texts_of
from ldm_lab.downloads import Download, raise_refusals, refusals
from ldm_lab.errors import UserError
from ldm_lab.evaluation.inception import RELEASED
from ldm_lab.evaluation.perceptual import features_download
from ldm_lab.interfaces import Objective
from ldm_lab.metrics import spaces_of
from ldm_lab.pretrained.resolve import announce, offline, to_download
from ldm_lab.sampling.needs import option_downloads
from ldm_lab.training.best import Best
from ldm_lab.training.captioned_grids import CaptionedGrids
from ldm_lab.training.demo import Demo
from ldm_lab.training.evaluate import Evaluate
from ldm_lab.training.gap import FILE, gap_options
from ldm_lab.training.lora import WITHOUT_PEFT
from ldm_lab.training.sharding import FSDP2
from ldm_lab.training.tensorboard import WITHOUT_TENSORBOARD, has_tensorboard

Finding = Callable[[], list[Download] | None]


def check_start(config: RunConfig, folder: Path) -> Source | None:
    """Look for all that a run reads, and say what will be downloaded.

    Returns:
        The data, opened, if they are there already and trained on as they are.

    Args:
        config: checked.
        folder: the run's.

    Raises:
        UserError: data, prompts, images or weights that are not there, with all of them; networks that do not go
            together; weights that cannot be downloaded.
    """
    sources: list[Source] = []
    _tell(_findings(config, folder, sources))
    return sources[0] if sources and "cache" not in config else None


def check_encoding(config: RunConfig, roles: Iterable[str]) -> None:
    """Look for the images and the frozen parts of some roles, and say what will be downloaded. Raises UserError."""
    findings: list[Finding] = [partial(part_downloads, role, config[role], role) for role in roles if role in config]
    if "data" in config:
        findings.append(partial(_open_data, replace(config, sections={"data": config["data"]}), []))
    _tell(findings)


def _tell(findings: Iterable[Finding]) -> None:
    """Raise UserError with all that is missing; say what will be downloaded."""
    problems: list[str] = []
    downloads: list[Download] = []
    for find in findings:
        try:
            downloads += find() or []
        except UserError as error:
            problems.append(str(error))
    raise_refusals(problems + refusals(downloads, offline()) if problems else ())
    rank_zero_only(announce)(downloads)


def _findings(config: RunConfig, folder: Path, sources: list[Source]) -> list[Finding]:
    """Return what has to be looked for, each by itself, so that all of it is found; opened data go into `sources`."""
    trained = config.task_class().PART
    findings: list[Finding] = [partial(_check_network, config), partial(_check_strategy, config)]
    findings.append(partial(_check_logging, config))
    if "lora" in config:
        findings.append(partial(_check_lora, config))
    for role in ("autoencoder", "conditioner"):
        if role in config and role != trained:
            findings.append(partial(part_downloads, role, config[role], role))
    if "conditioner" in config and "lora" not in config:  # which keeps the means of the model that it adds to
        findings.append(partial(_check_gap, config["conditioner"], folder))
    if "perceptual" in config:
        findings.append(features_download)
    if "discriminator" in config and (weights := config["discriminator"].options.get("weights")):
        findings.append(partial(_of_file, str(weights), "discriminator.weights"))
    if config.init_from:
        findings.append(partial(_of_file, config.init_from, "init_from"))
    findings.append(partial(_open_data, config, sources))
    for role in ("demo", "enlargements", "inpaintings", "evaluate"):
        if role in config:
            findings.append(partial(_pictures, config, role, folder))
    if "evaluate" in config:
        findings.append(partial(_networks, config["evaluate"]))
    findings.append(partial(_check_best, config, folder))
    return findings


def _of_file(text: str, where: str) -> list[Download]:
    download = to_download(text, where)
    return [] if download is None else [download]


def _check_network(config: RunConfig) -> None:
    """Raise UserError for an objective and a denoiser that do not go together, as far as their classes tell."""
    if "objective" in config and "denoiser" in config:
        objective: Objective = config["objective"].build()
        objective.check_denoiser(config["denoiser"].load())


def _check_logging(config: RunConfig) -> None:
    """Raise UserError for a logger whose package is not installed."""
    if config.part("logging").option("tensorboard") and not has_tensorboard():
        raise UserError(WITHOUT_TENSORBOARD)


def _check_lora(config: RunConfig) -> None:
    """Raise UserError for a section lora without a model to add to, or without the library for it."""
    problems = [] if config.init_from else ["init_from: lora needs a model that it adds to: a file, a released name"]
    if importlib.util.find_spec("peft") is None:
        problems.append(WITHOUT_PEFT)
    raise_refusals(problems)


def _check_strategy(config: RunConfig) -> None:
    """Raise UserError for what does not go with the way in which several devices work together."""
    trainer = config.part("trainer")
    ddp = trainer.option("ddp")
    if isinstance(ddp, dict) and ddp.get("static_graph") and trainer.option("accumulate_grad_batches") > 1:
        raise UserError(
            "trainer.ddp.static_graph: does not go with trainer.accumulate_grad_batches, torch fails in the first step"
        )
    if "trainer" not in config or config["trainer"].get("strategy") != FSDP2:
        return
    if config.task != "diffusion":
        raise UserError(f"trainer.strategy: {FSDP2} is for the denoiser of task=diffusion; {config.task} runs with ddp")
    if "optim" in config and (state := config["optim"].get("state", "32bit")) != "32bit":
        raise UserError(f"optim.state: {state} does not go with trainer.strategy={FSDP2}, which takes 32bit")
    if "lora" in config:
        raise UserError(f"trainer.strategy: {FSDP2} is for networks that are trained as a whole; lora runs with ddp")


def _open_data(config: RunConfig, sources: list[Source]) -> None:
    """List what is trained on. Raises UserError where it is not there. What makes its data itself is not asked."""
    if "cache" in config:
        folder = config["cache"].build().folder
        if (folder / META).is_file() and read_meta(folder).complete:  # whether it is this config's is asked later:
            return  # that needs the weights
    source: Source = config["data"].build()
    if type(source).prepare is Source.prepare:
        source.open()
        sources.append(source)


def _check_gap(conditioner: PartConfig, folder: Path) -> None:
    """Raise UserError for means of embeddings that are not there, or no texts to measure them on."""
    options = gap_options(conditioner)
    if options is None or not options.needs_means:
        return
    if options.means is not None and Path(options.means) != folder / FILE:
        read_gap(options.means)  # whose they are is asked later: that needs the weights
    elif options.texts not in (None, CAPTIONS):
        texts_of(options.texts)


def _pictures(config: RunConfig, role: str, folder: Path) -> list[Download]:
    """Read what is drawn during the run. Raises UserError for a missing file, or options that make no sense."""
    try:
        drawn: Demo | CaptionedGrids | Evaluate = config[role].build(folder)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(role) else f"{role}: {error}") from None
    return option_downloads(drawn.options, f"{role}.sampling")


def _networks(evaluate: PartConfig) -> list[Download]:
    """Return what has to be downloaded for what looks at pictures. Raises UserError for what is not there."""
    found: list[Download] = []
    if "inception" in spaces_of(evaluate.option("metrics")):
        found += _of_file(evaluate.option("inception") or RELEASED, "evaluate.inception")
    if section := evaluate.option("clip"):
        found += part_downloads("conditioner", PartConfig.from_dict("conditioner", section), "evaluate.clip")
    return found


def _check_best(config: RunConfig, folder: Path) -> None:
    """Raise UserError for a metric by which the best weights are to be kept that the run does not measure."""
    Best(folder, config.part("checkpoint").option("best")).choose(config)
