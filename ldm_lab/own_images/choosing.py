"""Which recipe fits what lies in a folder and the memory at hand, and what of it is changed for them."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.estimate import in_units
from ldm_lab.own_images.commented import Setting, laid_over, settings_of, text, without_head
from ldm_lab.own_images.looking import FolderFacts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BY_MEMORY = (24, 12, 8)  # GB of GPUs that there are recipes own_images_*gb.yaml for
AS_SOLD = 0.93  # a GPU of 8 GB has a little less
GIB = 2**30
SIDES = (256, 128, 64)  # pixels that networks of these recipes take
MOST = 0.9  # of data.max_skipped
SMALL_CHANNELS = 16  # of the latents of the small autoencoder
SMALL_SIDE = 128  # pixels
SMALL_MULTIPLIERS = "[1, 2, 2]"  # of the small network
FEW = 2_000  # images, below which several crops of each are kept
HELD = 64  # images at most that the small autoencoder does not see


class Road(Enum):
    """What a model is made of."""

    RELEASED = "released"  # a released autoencoder and CLIP
    SMALL = "small"  # an autoencoder trained on the images, and the CLOOB of the quickstart
    CAPTIONS = "captions"  # GLIDE, from captions alone

    @property
    def has_own_autoencoder(self) -> bool:
        """Whether an autoencoder is trained first."""
        return self is Road.SMALL


@dataclass(frozen=True)
class Machine:
    """What a model is trained on.

    Attributes:
        name: of the device.
        memory: bytes in all; None where nobody tells.
        is_gpu: whether it is a GPU of CUDA's kind; all else gets the quickstart's sizes.
        has_bf16: whether it computes in bf16 as fast as in fp16.
    """

    name: str
    memory: int | None
    is_gpu: bool
    has_bf16: bool = True

    def in_words(self) -> str:
        """Return its name and memory."""
        return f"{self.name}, {in_units(self.memory)}" if self.memory else self.name


def machine_at_hand() -> Machine:
    """Return this machine's GPU, or its CPU."""
    import torch  # takes seconds

    from ldm_lab.devices import free_memory

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return Machine(facts.name, facts.total_memory, True, has_bf16=facts.major >= 8)
    return Machine("this machine's CPU", free_memory(torch.device("cpu")), False)


def machine_of(written: str) -> Machine:
    """Return the machine that words such as "8gb", "24 GB", "16" or "cpu" mean. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib)?\s*", written, re.IGNORECASE)
    if written.strip().lower() == "cpu":
        return Machine("a CPU", None, False)
    if match is None or not 1 <= float(match[1]) <= 2000:
        raise UserError(f"--memory: {written!r}: the GPU's memory is needed, such as 8gb, or cpu")
    return Machine("a GPU", int(float(match[1]) * GIB), True)


@dataclass(frozen=True)
class Recipe:
    """A config to be written.

    Attributes:
        road: what the model is made of.
        origin: the recipe that it follows, below configs/.
        body: its text, without the comments on top.
        side: pixels of the images.
        batch_size: images of an optimizer step.
        steps: optimizer steps.
        counted_with: settings that tell of parts which are trained first, for counting alone.
    """

    road: Road
    origin: str
    body: str
    side: int
    batch_size: int
    steps: int
    counted_with: tuple[Setting, ...] = ()

    def with_settings(self, settings: Sequence[Setting]) -> str:
        """Return its text with some more settings."""
        return laid_over(self.body, settings)


@dataclass(frozen=True)
class Names:
    """Where things go.

    Attributes:
        run: of the run, and of what belongs to it.
        config: the YAML.
    """

    run: str
    config: Path

    @property
    def autoencoder_run(self) -> str:
        """Name of the run that trains the small autoencoder."""
        return f"{self.run}_autoencoder"

    @property
    def autoencoder_config(self) -> Path:
        """The YAML of that run."""
        return self.config.with_name(f"{self.config.stem}_autoencoder{self.config.suffix}")

    @property
    def autoencoder_list(self) -> Path:
        """The list of images that it is trained on."""
        return Path("runs") / self.autoencoder_run / "images.txt"

    @property
    def autoencoder_checksum(self) -> Path:
        """The checksum of the list of images that the run was begun on."""
        return self.autoencoder_list.with_name("images.blake2b")

    @property
    def demo_list(self) -> Path:
        """The list of images from which the demo grids are drawn."""
        return self.autoencoder_list.with_name("demo.txt")

    @property
    def autoencoder_file(self) -> str:
        """The weights that it ends with."""
        return f"runs/{self.autoencoder_run}/autoencoder.safetensors"


def read_recipe(name: str) -> str:
    """Return the text of a recipe. Raises UserError where the package was installed without them."""
    path = CONFIGS / f"{name}.yaml"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(
            f"{path}: the recipes are not here; start needs a checkout of the project, or pip install -e of one"
        ) from None


# ------------------------------------------------------------------------------------------------ what all have alike


def batch_for(images: int, most: int = 64) -> int:
    """Return the size of a batch: a power of two, not more than there are images."""
    return min(most, 2 ** int(math.log2(max(images, 1))))


def max_skipped(facts: FolderFacts) -> float | None:
    """Return which share of samples that cannot be used a run has to put up with; None if the default will do."""
    share = facts.unusable_share
    return None if share < 0.05 else min(MOST, math.ceil(20 * (1.5 * share + 0.05)) / 20)


def data_settings(facts: FolderFacts, batch_size: int, with_captions: bool) -> list[Setting]:
    """Return the settings of the section `data`."""
    if facts.shards:
        shards = f"[{', '.join(map(text, facts.shards))}]" if len(facts.shards) > 1 else text(facts.shards[0])
        settings = [
            Setting("data.name", "webdataset", "tar files as img2dataset writes them"),
            Setting("data.path", None),
            Setting("data.shards", shards, f"about {facts.images:,} images"),
        ]
    else:
        settings = [
            Setting("data.name", "folder", "all images below it"),
            Setting("data.path", text(str(facts.path)), f"{facts.images:,} images"),
        ]
    settings += [
        Setting("data.batch_size", str(batch_size)),
        Setting("data.workers", str(workers()), "loader processes"),
    ]
    if (share := max_skipped(facts)) is not None:
        words = f"share of files that cannot be used and are passed over: about {facts.unusable_share:.0%} are"
        settings.append(Setting("data.max_skipped", f"{share:g}", words))
    if with_captions:
        settings += [Setting(f"data.captions.{key}", text(value)) for key, value in facts.captions.settings.items()]
    return settings


def workers() -> int:
    """Return how many loader processes this machine can feed."""
    return max(1, min(4, (os.cpu_count() or 2) // 2))


def run_settings(names: Names) -> list[Setting]:
    """Return the settings of what the run is called."""
    return [Setting("run", text(names.run), f"everything this run writes goes under runs/{names.run}/")]


def crop_settings(facts: FolderFacts) -> list[Setting]:
    """Return settings that keep several crops of each image where there are few of them."""
    if facts.usable >= FEW:
        return [Setting("data.crop", "center"), Setting("data.flip", "false", "each image is encoded once, as it is")]
    return [
        Setting("data.crop", "random", "which square of the resized image"),
        Setting("data.flip", "true", "mirror half of them; not with lettering"),
        Setting("cache.crops", "4", "of each image; they are few"),
        Setting("cache.flip", "true", "each mirrored, too"),
    ]


def length_settings(steps: int, draws: bool = True) -> list[Setting]:
    """Return the settings of what goes by the length of a run."""
    every = max(min(steps // 5, 2_000), 1)
    settings = [
        Setting("trainer.max_steps", f"{steps:_}", "optimizer steps"),
        Setting("optim.warmup_steps", f"{max(min(steps // 20, 1_000), 1):_}"),
        Setting("checkpoint.every", f"{every:_}"),
    ]
    return [*settings, Setting("demo.every", f"{every:_}", "optimizer steps")] if draws else settings


# ------------------------------------------------------------------------------------------------------------- roads


def released(facts: FolderFacts, machine: Machine, names: Names, use_captions: bool) -> Recipe:
    """Return a recipe over a released autoencoder and CLIP: for a GPU by its memory, small for a CPU."""
    memory = machine.memory or 0
    size = next((gb for gb in BY_MEMORY if memory >= gb * GIB * AS_SOLD), BY_MEMORY[-1])
    origin = f"own_images_{size}gb" if machine.is_gpu else "quickstart"
    first = f"own_images_{BY_MEMORY[-1]}gb"
    body = without_head(read_recipe(first if machine.is_gpu else origin))
    largest = SIDES if machine.is_gpu else SIDES[1:]
    side = next((side for side in largest if facts.as_large_as(side) >= 0.75), largest[-1])
    batch_size = batch_for(facts.usable)
    if machine.is_gpu:
        own = settings_of(read_recipe(origin)) if origin != first else []
        settings = [its for its in own if its.path.startswith(("denoiser.", "optim."))]
        settings = [Setting(its.path, its.value) for its in settings]
        steps = _rounded(min(max(facts.usable * 1_000 // batch_size, 2_000), 100_000))
        settings += ema_settings(steps)
        if not machine.has_bf16:
            settings.append(Setting("trainer.precision", "16-mixed", "this card has no bf16"))
    else:
        own = settings_of(read_recipe(first))
        settings = [Setting("conditioner.weights", None)]
        settings += [its for its in own if its.path.startswith(("autoencoder.", "conditioner."))]
        steps = small_steps(facts)
    settings += [
        *run_settings(names),
        Setting("data.folder", None), Setting("data.count", None), Setting("data.variety", None),
        *data_settings(facts, batch_size, use_captions),
        Setting("data.image_size", str(side), "pixels: short side resized (Lanczos), then cropped"),
        Setting("autoencoder.name", "kl_f8", f"frozen: 3x{side}x{side} in [-1, 1] -> 4x{side // 8}x{side // 8}"),
        Setting("denoiser.multipliers", _multipliers(body, settings), _levels(side // 8, _multipliers(body, settings))),
        Setting("cache.folder", text(f"data/{names.run}_cache"), "encoded once, at the first start"),
        *crop_settings(facts), *length_settings(steps),
        Setting("demo.prompts", "configs/demo_prompts.txt", "a file with a prompt a line"),
    ]  # fmt: skip
    if use_captions:
        whole = facts.captions.images >= 0.95 * facts.images
        told = "captions' embeddings" if whole else "captions where they are, else the image"
        settings.append(Setting("conditioner.train_on", "text" if whole else "mixed", told))
        settings += [Setting("conditioner.gap", None)] if whole else []  # there is none to cross
    return Recipe(Road.RELEASED, origin, laid_over(body, settings), side, batch_size, steps)


def small(facts: FolderFacts, names: Names) -> Recipe:
    """Return the quickstart's recipe for the images and an autoencoder that was trained on them."""
    body, batch_size, steps = without_head(read_recipe("quickstart")), batch_for(facts.usable), small_steps(facts)
    side = SMALL_SIDE
    settings = [
        *run_settings(names),
        Setting("data.folder", None), Setting("data.count", None), Setting("data.variety", None),
        *data_settings(facts, batch_size, with_captions=False),
        Setting("cache.folder", text(f"data/{names.run}_cache"), "encoded once, at the first start"),
        *crop_settings(facts), *length_settings(steps, draws=not facts.shards),
        Setting("autoencoder.name", "kl_f8", f"frozen: 3x{side}x{side} -> {SMALL_CHANNELS}x{side // 8}x{side // 8}"),
        Setting("autoencoder.weights", text(names.autoencoder_file), "with its latent scale"),
        Setting("data.image_size", str(side), "pixels: short side resized (Lanczos), then cropped"),
        Setting("denoiser.multipliers", SMALL_MULTIPLIERS, _levels(side // 8, SMALL_MULTIPLIERS)),
        Setting("conditioner.name", "cloob", "frozen; it knows drawn shapes and their colors, no photographs"),
    ]  # fmt: skip
    settings += [Setting("demo", None)] if facts.shards else demo_settings(names)
    return Recipe(Road.SMALL, "quickstart", laid_over(body, settings), side, batch_size, steps, small_autoencoder())


def demo_settings(names: Names) -> list[Setting]:
    """Return the settings of grids that are drawn from images."""
    return [
        Setting("demo.prompts", None),
        Setting("demo.images", text(str(names.demo_list)), "each is a prompt; what is drawn stands to its right"),
    ]


def small_autoencoder() -> tuple[Setting, ...]:
    """Return the settings that say what the small autoencoder is, which is trained first."""
    own = [Setting(its.path, its.value) for its in settings_of(read_recipe("quickstart_autoencoder"))]
    latents = [Setting(f"autoencoder.{key}", str(SMALL_CHANNELS)) for key in ("z_channels", "embed_dim")]
    built = [its for its in own if its.path.startswith("autoencoder.")]
    return (Setting("autoencoder.weights", None), *built, *latents)


def captions_alone(facts: FolderFacts, machine: Machine, names: Names) -> Recipe:
    """Return the recipe of a small GLIDE, which is told of captions alone."""
    body, batch_size = (
        without_head(read_recipe("glide_quickstart")),
        batch_for(facts.usable, 64 if machine.is_gpu else 16),
    )
    steps = 3_000 if facts.usable < FEW else 10_000
    settings = [
        *run_settings(names),
        *(Setting(f"data.{key}", None) for key in ("folder", "count", "variety", "wordings")),
        *data_settings(facts, batch_size, with_captions=True),
        Setting("data.crop", "random", "which square of the resized image"),
        Setting("data.flip", "true", "mirror half of them; not with lettering"),
        Setting("data.require_text", "true", "images without a caption are left out"),
        Setting("conditioner.vocab_size", "4_000", "the most frequent pieces"),
        Setting("conditioner.text_size", "48", "tokens per caption"),
        *length_settings(steps),
        Setting("demo.prompts", "configs/demo_prompts.txt", "a file with a prompt a line"),
    ]  # fmt: skip
    return Recipe(Road.CAPTIONS, "glide_quickstart", laid_over(body, settings), 32, batch_size, steps)


def small_steps(facts: FolderFacts) -> int:
    """Return how long a network of the quickstart's size is trained."""
    return 2_400 if facts.usable < FEW else 5_000 if facts.usable < 10_000 else 10_000


def ema_settings(steps: int) -> list[Setting]:
    """Return the average's settings for a run of some length."""
    late = max(min(steps // 5, 20_000), 2)
    decay = "[0.99, 0.999, 0.9998]" if steps >= 50_000 else "[0.9, 0.99, 0.999]"
    return [Setting("ema.from_step", f"[0, {late // 10}, {late}]"), Setting("ema.decay", decay)]


def _rounded(steps: int) -> int:
    """Return a number of steps with two digits that count."""
    unit = 10 ** max(int(math.log10(steps)) - 1, 0)
    return steps // unit * unit


def _multipliers(body: str, settings: Sequence[Setting]) -> str:
    found = [its.value for its in (*settings_of(body), *settings) if its.path == "denoiser.multipliers"]
    return found[-1] or "[1, 2]"


def _levels(side: int, multipliers: str) -> str:
    sides = [side // 2**level for level in range(multipliers.count(",") + 1)]
    return f"levels: {', '.join(f'{each}x{each}' for each in sides)}"
