"""What a run will need and how long it will take, counted before anything is paid for: `python -m ldm_lab plan`.

No weights are read and no step is made (`ldm_lab.estimate`); the data are listed, and of local shards one is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_lab.checkpoints.parts import read_part
from ldm_lab.checkpoints.stored_texts import store_folder
from ldm_lab.config import RunConfig
from ldm_lab.data.cache import ENCODERS
from ldm_lab.data.shard_source import ShardSource
from ldm_lab.data.source import Unusable
from ldm_lab.errors import UserError
from ldm_lab.estimate import StepCost, images_per_second, in_short, in_units, peak_flops
from ldm_lab.training.caching import cache_options
from ldm_lab.training.checkpointing import Checkpointing
from ldm_lab.training.cost import postponed_bytes, task_cost
from ldm_lab.training.disk import best_bytes, checkpoint_bytes, export_bytes
from ldm_lab.training.encoders import Encoders
from ldm_lab.training.encoding import expected_row_bytes
from ldm_lab.training.going_on import with_options
from ldm_lab.training.guard import Guard
from ldm_lab.training.runner import RUNS
from ldm_lab.training.sharding import FSDP2
from ldm_lab.training.task import Task
from ldm_lab.training.trainer import TrainerOptions

SIZES = (8, 12, 16, 24, 40, 80)  # of cards, GiB
LAUNCHING = 0.02  # seconds that the kernels of a small U-Net's step take to launch, about
OWN = 10**9  # bytes that CUDA and the demo pictures want beside what is counted


@dataclass(frozen=True)
class DataFound:
    """What the data hold.

    Attributes:
        said: in words.
        images: about how many there are; None if nobody can tell without reading all of them.
    """

    said: str
    images: int | None = None


@dataclass(frozen=True)
class Fit:
    """The largest batch that goes into a card's memory.

    Attributes:
        gigabytes: of the card, GiB.
        batch: images per device as the config has it; 0 if not even one fits.
        with_checkpointing: the same with `gradient_checkpointing`; None if it is on, or there is no such option.
    """

    gigabytes: int
    batch: int
    with_checkpointing: int | None


@dataclass(frozen=True)
class Speed:
    """How fast a run is expected to be.

    Attributes:
        card: its name.
        images: per second, over all devices.
        days: for the whole run; None if it has no end.
        is_small: whether the network is so small that its kernels' launching takes longer than their work.
    """

    card: str
    images: float
    days: float | None
    is_small: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        run: its name.
        cost: of a batch on one device.
        checkpointed: the same with `gradient_checkpointing`, where it is off and the denoiser has it.
        devices: that train together.
        images_per_step: of an optimizer step, over all devices.
        max_steps: of the run; -1 without end.
        precision: `trainer.precision`.
        tf32: whether products in single precision may be rounded to TF32.
        checkpoint, exported, best: bytes of a checkpoint, of the exported model and of the best weights; 0 for none.
        kept: checkpoints that lie on the disk at most.
        cached_image: bytes of an image in the run's cache, with all its crops; None without a cache.
        data: what the data hold.
        note: what is to be said of the text encoder's memory; "" for nothing.
    """

    run: str
    cost: StepCost
    checkpointed: StepCost | None
    devices: int
    images_per_step: int
    max_steps: int
    precision: str
    tf32: bool
    checkpoint: int
    exported: int
    best: int
    kept: int
    cached_image: int | None
    data: DataFound
    note: str = ""

    @property
    def images(self) -> int | None:
        """Images that the run trains on, each as often as it comes; None without end."""
        return None if self.max_steps < 0 else self.max_steps * self.images_per_step

    @property
    def on_disk(self) -> int:
        """Bytes that the run's checkpoints and weights take at most, one more of each while it is written."""
        return (self.kept + 1) * self.checkpoint + 2 * self.exported + self.best

    def fits(self, sizes: Sequence[int] = SIZES) -> list[Fit]:
        """Return the largest batches for cards of so many GiB."""
        rooms = [(size, size * 2**30 - OWN) for size in sizes]
        return [
            Fit(
                size,
                self.cost.batch_that_fits(room),
                None if self.checkpointed is None else self.checkpointed.batch_that_fits(room),
            )
            for size, room in rooms
        ]

    def speeds(self, cards: Sequence[str], mfu: float) -> list[Speed]:
        """Return how fast the run is on cards of which it makes use of a share `mfu` of what they can do at most.

        Raises:
            UserError: a card that is not known, or does not know the precision.
        """
        found = []
        for card in cards:
            most = peak_flops(card, self.precision, self.tf32)
            if most is None:
                raise UserError(
                    f"--gpu {card}: nothing is known of its speed at trainer.precision={self.precision}; "
                    "ldm_lab/estimate.py lists the cards that are known (CARDS)"
                )
            rate = images_per_second(self.cost, most, mfu) * self.devices
            fastest = self.cost.batch_size * self.devices / LAUNCHING
            used = min(rate, fastest)
            days = None if self.images is None else self.images / used / 86400
            found.append(Speed(card, used, days, rate > fastest))
        return found


def plan(config: RunConfig) -> Plan:
    """Return what a run needs on GPUs. Raises UserError for one of which nobody knows how large its images are."""
    config.check_across_keys()
    if config["data"].option("image_size") is None:
        raise UserError("data: has no image_size, so that nobody knows what a step takes; plan the run of the images")
    config = with_options(_as_files_say(config), "trainer", {"accelerator": "gpu"})  # which encodes batches as a whole
    task, cost = _counted(config)
    folder = RUNS / config.run
    options: TrainerOptions = config.part("trainer").build()
    checkpointing: Checkpointing = config.part("checkpoint").build(folder, Guard(folder, 1))
    own = config.part("trainer")
    devices = _devices(str(own.option("devices"))) * own.option("num_nodes")
    checkpointed = _with_checkpointing(config)
    if own.option("strategy") == FSDP2:
        cost = cost.shared_by(devices)
        checkpointed = checkpointed and checkpointed.shared_by(devices)
    return Plan(
        run=config.run,
        cost=cost,
        checkpointed=checkpointed,
        devices=devices,
        images_per_step=cost.batch_size * devices * own.option("accumulate_grad_batches"),
        max_steps=own.option("max_steps"),
        precision=str(own.option("precision")),
        tf32=options.tf32,
        checkpoint=checkpoint_bytes(task),
        exported=export_bytes(task, checkpointing.export_dtype),
        best=best_bytes(task, checkpointing),
        kept=checkpointing.most_kept(own.option("max_steps")),
        cached_image=_cached_image(config, task),
        data=data_found(config),
        note=note_of_encoder(config, task),
    )


def _as_files_say(config: RunConfig) -> RunConfig:
    """Return a run whose frozen parts are built as the files of their weights say, where those lie here."""
    for role in ENCODERS:
        weights = config[role].get("weights") if role in config else None
        if isinstance(weights, str) and Path(weights).expanduser().is_file():
            there = read_part(Path(weights).expanduser(), role, config[role].name).config
            own = {**{key: value for key, value in there.items() if key != "name"}, **config[role].options}
            config = with_options(config, role, own)
    return config


def _counted(config: RunConfig) -> tuple[Task, StepCost]:
    with torch.device("meta"):
        task = config.task_class()(config, read_weights=False)
        task.insert_lora()
    return task, task_cost(task, config["data"].option("image_size"))


def _with_checkpointing(config: RunConfig) -> StepCost | None:
    if "denoiser" not in config or config["denoiser"].option("gradient_checkpointing") is not False:
        return None
    return _counted(with_options(config, "denoiser", {"gradient_checkpointing": True}))[1]


def note_of_encoder(config: RunConfig, task: Task) -> str:
    """Return what is to be said of a language model that is loaded when a text has to be encoded."""
    size = postponed_bytes(task)
    if size is None:
        model = config["conditioner"].option("model")
        return f"conditioner.model: {model} is not here and its size not known: its weights are not counted"
    if not size or (
        "cache" not in config and config["data"].name != "cache" and store_folder(config["conditioner"]) is None
    ):
        return ""
    return (
        f"the text encoder, {in_units(size)}, is loaded as soon as a text has to be encoded that is not stored yet, "
        "prompts included; with conditioner.store and conditioner.missing=skip it never is"
    )


def _devices(said: str) -> int:
    """Return how many devices a node has; "auto" and -1, all that there are: one, as nobody knows the machine."""
    listed = [number for number in said.split(",") if number.strip()]
    return int(said) if said.isdecimal() else len(listed)  # "0,1": these two


def _cached_image(config: RunConfig, task: Task) -> int | None:
    if "cache" not in config:
        return None
    encoders = Encoders(task.frozen["autoencoder"], task.frozen["conditioner"])
    each = expected_row_bytes(encoders, config["data"].option("image_size"))
    return each * cache_options(config).variants.count


def data_found(config: RunConfig) -> DataFound:
    """Return what the data hold: units as the source lists them, and of shards what is in the first, if it is here."""
    section = config["data"]
    made = section.get("count")
    if isinstance(made, int):
        return DataFound(f"{made:,} drawn images", made)
    source = section.build()
    try:
        source.open()
    except UserError as error:
        return DataFound(f"not looked at: {error}")
    count = source.count or 0
    if not isinstance(source, ShardSource):
        return DataFound(f"{count:,} {source.unit}", count if source.shuffle_buffer is None else None)
    first = source.addresses[0]
    if not Path(first).is_file():
        return DataFound(f"{count:,} shards, none of which is here to be counted")
    inside = sum(not isinstance(item, Unusable) for item in source.items(0))
    size = in_units(Path(first).stat().st_size)
    return DataFound(f"{count:,} shards; {inside:,} samples, {size}, in the first of them", inside * count)


# --------------------------------------------------------------------------------------------------------- in words


def in_words(plan: Plan, speeds: Sequence[Speed], mfu: float) -> str:
    """Return a plan as a page of text, with tables in Markdown."""
    cost = plan.cost
    lines = [
        f"{plan.run}: {in_short(cost.parameters)} parameters, {in_short(cost.trained)} of them trained",
        f"data: {plan.data.said}{_epochs(plan)}",
        f"a step of {cost.batch_size} images: {in_short(cost.flops)} floating-point operations, {cost.in_words()}",
        *([plan.note] if plan.note else []),
        "",
        *_batches(plan),
        "",
        *_table_of_speeds(plan, speeds, mfu),
        "",
        f"disk: at most {plan.kept} + 1 checkpoints of {in_units(plan.checkpoint)}, the exported model twice, "
        f"{in_units(plan.exported)}{f', the best weights, {in_units(plan.best)}' if plan.best else ''}: "
        f"{in_units(plan.on_disk)} in all" + _cache(plan),
        "Nothing was run; python train.py --check makes one step and one picture.",
    ]
    return "\n".join(lines)


def _epochs(plan: Plan) -> str:
    if not plan.data.images or plan.images is None:
        return ""
    return f"; {plan.images:,} are trained on, {plan.images / plan.data.images:.3g} times each"


def _batches(plan: Plan) -> list[str]:
    """Return the table of the largest batches."""
    fits, other = plan.fits(), plan.checkpointed is not None
    head = "| GPU memory | largest data.batch_size |" + (
        " with denoiser.gradient_checkpointing=true |" if other else ""
    )
    rows = [
        f"| {fit.gigabytes} GB | {_count(fit.batch)} |" + (f" {_count(fit.with_checkpointing)} |" if other else "")
        for fit in fits
    ]
    return [head, "| --- | ---: |" + (" ---: |" if other else ""), *rows]


def _table_of_speeds(plan: Plan, speeds: Sequence[Speed], mfu: float) -> list[str]:
    devices = f", {plan.devices} device{'s' if plan.devices > 1 else ''}"
    length = "without end" if plan.max_steps < 0 else f"{plan.max_steps:,} steps of {plan.images_per_step} images"
    rows = [
        f"| {s.card} | {rate_in_words(s.images)} | {'' if s.days is None else days_in_words(s.days)} |" for s in speeds
    ]
    if any(speed.is_small for speed in speeds):
        rows += ["", f"(The network is small: launching a step's kernels takes {1000 * LAUNCHING:.0f} ms, about.)"]
    return [
        f"{length} at {mfu:.0%} of what a card can do in {plan.precision}{devices} (computed, not measured):",
        "",
        "| GPU | images/s | the whole run |",
        "| --- | ---: | ---: |",
        *rows,
    ]


def _count(batch: int | None) -> str:
    return f"{batch:,}" if batch else "none"


def rate_in_words(images: float) -> str:
    """Return images a second in words."""
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"


def days_in_words(days: float) -> str:
    """Return a time in words: days, hours or minutes."""
    if days >= 2:
        return f"{days:,.0f} days" if days >= 100 else f"{days:.3g} days"
    return f"{days * 24:.3g} hours" if days * 24 >= 1 else f"{days * 1440:.2g} min"


def _cache(plan: Plan) -> str:
    if plan.cached_image is None:
        return ""
    each = f"; cache: {plan.cached_image:,} bytes an image"
    return f"{each}, {in_units(plan.cached_image * plan.data.images)}" if plan.data.images else each
