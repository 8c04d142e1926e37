"""The contracts of the roles, as classes: what each part promises, below all of them. No part is asked what it is.

t runs from 1 (noise) to 0 (data). x = alpha(t) * x0 + sigma(t) * eps; v = alpha * eps - sigma * x0. Images are RGB in
[-1, 1], [B, 3, H, W]; latents are [B, C, h, w] with about unit variance.

A denoiser is told *conditions* beside x and the time (`ldm_lab.conditions`): a conditioner gives some (of images or
texts), a condition source one or two more (a low-resolution image, a mask). It takes all of them (`check_conditions`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image as PillowImage
from torch import Tensor, nn

from ldm_lab.batch import Batch, ReaderState  # noqa: F401
from ldm_lab.conditions import (  # noqa: F401  # whoever writes a part finds all that it needs here
    ConditionKind,
    ConditionRequest,
    Conditions,
    ConditionSpec,
    Embedding,
    ImageCondition,
    Level,
    TokenIds,
    TokenStates,
    condition_tensors,
    describe_conditions,
    is_upsampler,
    required_condition,
)
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError
from ldm_lab.predictions import Callback, Noise, Predict, Prediction, Schedule, TimeInput
from ldm_lab.sampling_defaults import SamplingDefaults

TimestepSampler = Literal["sobol", "uniform"]


class Part:
    """What every registered class has: the role and the name that it is known by (`ldm_lab.config.register`).

    For rules across its options, whose bounds stand in the annotations, it may have a static method
    `check(*, this, that) -> list[str]`: it gets the options that it names, and returns what is wrong, as "key: what".
    """

    part_role: ClassVar[str] = ""
    part_name: ClassVar[str] = ""
    trainable: ClassVar[bool] = True  # False: it is used as published alone

    @staticmethod
    def pretrained_path(config: dict[str, Any]) -> Path | None:
        """Return the file with the weights that a config names otherwise than by `weights`; None if it names none.

        Raises:
            UserError: weights that have to be named and are not, or that cannot be downloaded.
        """
        return None

    @staticmethod
    def downloads(config: dict[str, Any]) -> list[Download]:
        """Return the files that `pretrained_path` or `load_pretrained` would download, to be told beforehand."""
        return []

    @staticmethod
    def weights_identity(config: dict[str, Any]) -> str | None:
        """Return what pins the weights that a part brings along itself, such as a sha256 or a repository's revision.

        They are in no file that the config names: a part with this loads them by `load_pretrained`. Checkpoints and
        caches keep it in place of a file's checksum. None for others. Raises UserError: the weights are not there.
        """
        return None

    def load_pretrained(self) -> None:
        """Load the weights that the part brings along itself, once it is built. Raises UserError: none, or damaged."""

    def look_in(self, folder: Path) -> None:
        """Have published files that it reads itself looked for in the folder of the model's file, too."""

    def load_later(self) -> None:
        """Have `load_pretrained` called when the part is first used, if it is at all; as it stands, call it now."""
        self.load_pretrained()

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names that they are published with as this part's state dict."""
        return state

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups of parameters that training may leave as they are (`optim.freeze`), by name."""
        return {}


class Autoencoder(Part, nn.Module):
    """Images <-> latents z = (raw - latent_mean) / latent_std.

    Attributes:
        channels: C of a latent.
        downscale: pixels per side of one latent element.
        latent_mean, latent_std: buffers, 0-dim or [C], of the raw latents on the user's images; 0 and 1 until they are
            measured, loaded or set.
        pixel_range: of a model of pixels, the smallest and the largest value that a pixel has in z; None for latents.
    """

    channels: int
    downscale: int
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("latent_mean", torch.tensor(0.0))  # []
        self.register_buffer("latent_std", torch.tensor(1.0))  # []

    @property
    def pixel_range(self) -> tuple[float, float] | None:
        return None

    def latent_statistics(self) -> dict[str, Tensor]:
        """Return {"latent_mean", "latent_std"}, 0-dim or [C] each, by their names in a config."""
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std}

    def set_latent_statistics(
        self, mean: float | Sequence[float] | None = None, std: float | Sequence[float] | None = None
    ) -> None:
        """Set mean and std of the raw latents, one number or one for each channel; None leaves what is there."""
        if mean is not None:
            self.latent_mean = torch.as_tensor(mean).to(self.latent_mean)  # [] or [C]
        if std is not None:
            self.latent_std = torch.as_tensor(std).to(self.latent_std)  # [] or [C]

    def normalize(self, raw: Tensor) -> Tensor:
        """Return z [B, C, h, w] of raw latents [B, C, h, w]."""
        return (raw - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)  # [B, C, h, w]

    def denormalize(self, z: Tensor) -> Tensor:
        """Return raw latents [B, C, h, w] of z [B, C, h, w]."""
        return z * _per_channel(self.latent_std) + _per_channel(self.latent_mean)  # [B, C, h, w]

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the raw latent, [B, C, h, w] each, of images in [-1, 1].

        Raises:
            UserError: height or width is not a multiple of `downscale`.
        """
        raise NotImplementedError

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return z [B, C, h, w] of a posterior's raw moments and standard normal noise; without noise of its mean."""
        return self.normalize(mean if noise is None else mean + torch.exp(0.5 * logvar) * noise)  # [B, C, h, w]

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return z [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""
        return self.sample(*self.moments(image), noise)

    def decode(self, z: Tensor) -> Tensor:
        """Return images [B, 3, H, W], about [-1, 1] but not clamped."""
        raise NotImplementedError

    def tiled_decode(self, z: Tensor, tile: int) -> Tensor | None:
        """Return the same images, with little more of them than a tile on the device at once; None: it knows no way.

        Args:
            z: [B, C, h, w].
            tile: side of a tile in latent elements.
        """
        return None


def _per_channel(statistic: Tensor) -> Tensor:
    """Return a statistic as latents [B, C, h, w] are calculated with: a 0-dim one keeps their precision."""
    return statistic[:, None, None] if statistic.ndim else statistic  # [C, 1, 1] or []


class Conditioner(Part, nn.Module):
    """What the denoiser is told about the image, made of images or texts; frozen.

    Attributes:
        spec: what it gives.
        is_unconditional: whether it says nothing, whatever it is asked.
    """

    is_unconditional: ClassVar[bool] = False

    @property
    def spec(self) -> ConditionSpec:
        raise NotImplementedError

    def from_batch(self, batch: Batch) -> Conditions:
        """Return the conditions of a training batch, [B, ...] each."""
        raise NotImplementedError

    def from_prompts(self, texts: Sequence[str], images: Sequence[PillowImage.Image]) -> Conditions:
        """Return the conditions of prompts, one row each, texts first. Raises UserError for what it cannot read."""
        raise NotImplementedError

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise UserError for texts that `from_prompts` would refuse for a reason that is known without encoding."""

    def null(self, conditions: Conditions) -> Conditions:
        """Return as many rows that mean "no condition"; by default zeros."""
        return {name: torch.zeros_like(value) for name, value in conditions.items()}


class ConditionSource(Part, nn.Module):
    """A condition that is no text or embedding (a small image, a mask); the unconditional prediction sees it, too.

    Attributes:
        spec: what it gives; `from_batch` and `from_request` may leave an optional condition out (`Embedding.optional`).
    """

    @property
    def spec(self) -> ConditionSpec:
        raise NotImplementedError

    def from_batch(
        self, batch: Batch, x0: Tensor, autoencoder: Autoencoder, generator: torch.Generator | None
    ) -> Conditions:
        """Return the conditions of a training batch, [B, ...] each.

        Args:
            batch: its images, or what a cache has of them.
            x0: the batch's latents, [B, C, h, w].
            autoencoder: that made them, frozen, for sources that change an image and want its latents.
            generator: of the random numbers, on the device of x0; None is torch's global one.

        Raises:
            UserError: the batch lacks what the condition is made of, such as the images, which no cache has.
        """
        raise NotImplementedError

    def from_request(self, request: ConditionRequest) -> Conditions:
        """Return the conditions of images to be made, [B, ...] each. Raises UserError for what is lacking."""
        raise NotImplementedError

    def null(self, conditions: Conditions) -> Conditions:
        """Return what the unconditional prediction sees in their place; by default the same."""
        return conditions


class Denoiser(Part, nn.Module):
    """The trained network.

    A subclass is constructed with `(channels, conditions, *, options)`: C of the latents, and what conditioner and
    condition sources give; it takes the widths from there. No row of its output depends on another row of its input.

    Attributes:
        spec: the conditions that `forward` takes, by name.
        time_input: what `forward` is handed as the time: t in [0, 1], the timestep 0 .. T - 1, or the log SNR.
        learns_variance: whether 2C channels come out, of which the second half is a learned variance; None if that is
            only seen when it runs.
        multiple_of: what latent height and width have to be multiples of.
        architecture_keys: options that a checkpoint to begin with has to share: with others its tensors mean others.
        unordered_keys: those of them that are lists whose order means nothing.
        block_types: classes of the modules that run one after the other, none inside another, and each called as a
            whole: training may compile them, or share them out over the devices, one by one; () takes the network as
            one.
        most_guidance: the largest guidance that such models are known to take, above which users are warned.
        sampling_defaults: what they are sampled with unless it is said otherwise.
    """

    spec: ConditionSpec
    time_input: TimeInput = "t"
    learns_variance: bool | None = None
    multiple_of: int = 1
    block_types: tuple[type[nn.Module], ...] = ()
    architecture_keys: ClassVar[tuple[str, ...]] = ()
    unordered_keys: ClassVar[tuple[str, ...]] = ()
    most_guidance: ClassVar[float] = 16.0
    sampling_defaults: ClassVar[SamplingDefaults] = SamplingDefaults()

    def block_modules(self) -> list[nn.Module]:
        """Return the modules of `block_types`, in the order in which they were made."""
        return [module for module in self.modules() if isinstance(module, self.block_types)]

    def adapt_state_dict(self, state: dict[str, Tensor], spec: ConditionSpec) -> dict[str, Tensor]:
        """Return weights of a network that is told less than this one, with places for what it is not told.

        With them this network computes what that one did until it has learned to heed the rest.

        Args:
            state: the other network's weights.
            spec: what condition sources tell that one.

        Returns:
            The same dict where nothing had to be done, or it is not known how.
        """
        return state

    def outer_layers(self) -> list[str]:
        """Return the names of the layers that read x and write the output, which LoRA leaves: first and last made."""
        convs = [name for name, module in self.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
        layers = [name for name, module in self.named_modules() if name in convs or isinstance(module, nn.Linear)]
        return [*(convs or layers)[:1], *layers[-1:]]

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        """Return [B, C, h, w], or [B, 2C, h, w] with a learned variance, for x [B, C, h, w] and time [B].

        Raises:
            UserError: a latent size that its levels do not divide.
        """
        raise NotImplementedError


class Objective(Part):
    """What the denoiser's output means, how it is trained, how clean data is read off it.

    All methods are pure: random numbers are handed in, so that a resumed run repeats them and a test can fix them.

    Attributes:
        schedule: the noise schedule.
        timestep_sampler: how training draws t (`ldm_lab.training.timesteps`).
    """

    schedule: Schedule
    timestep_sampler: TimestepSampler

    def check_denoiser(self, denoiser: Denoiser | type[Denoiser]) -> None:
        """Raise UserError if a denoiser, or what its class says of it, does not go with this objective.

        As it stands: it reads timesteps and the schedule has none.
        """
        self.schedule.time(torch.zeros(1), denoiser.time_input)

    def times(self, u: Tensor) -> Tensor:
        """Return the t to train at, [B] in [0, 1), of draws u [B] that are even in [0, 1); by default the same."""
        return u

    def loss_terms(
        self, denoiser: Denoiser, x0: Tensor, conditions: Conditions, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return {"loss": [B], ...}: the loss per sample, and parts of it that are logged by themselves, [B] each.

        Args:
            denoiser: the network.
            x0: clean samples, [B, C, h, w].
            conditions: of the rows.
            t: in [0, 1), [B].
            noise: standard normal, [B, C, h, w].
        """
        raise NotImplementedError

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Return what the denoiser says about x [B, C, h, w] at times t [B]."""
        raise NotImplementedError


class Sampler(Part):
    """From noise to a clean sample along a falling grid of times; it sees predictions alone, and no network.

    Attributes:
        steps: how many steps there are.
        uses_gradient: whether it follows `Prediction.gradient` itself; the others are handed predictions that contain
            it (`ldm_lab.guidance.condition_score`).
    """

    steps: int
    uses_gradient: ClassVar[bool] = False

    def times(self, schedule: Schedule, size: Sequence[int] | None = None) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps].

        Args:
            schedule: of the model.
            size: height and width of x, where the first time depends on them; None: of large latents.

        Raises:
            UserError: as `Schedule.grid`.
        """
        raise NotImplementedError

    def sample(
        self,
        predict: Predict,
        x: Tensor,
        *,
        schedule: Schedule,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return x0 [B, C, h, w].

        Args:
            predict: x [B, C, h, w], t [B] -> Prediction.
            x: at the first time, float32 [B, C, h, w].
            schedule: of the model.
            noise: fresh standard normal noise; only stochastic samplers call it.
            callback: called once in every step, with x before it and the clean estimate in it, [B, C, h, w] each.
        """
        raise NotImplementedError


def check_conditions(denoiser: Denoiser, given: ConditionSpec) -> None:
    """Raise UserError unless a denoiser takes exactly what the conditioner and the condition sources give."""
    if dict(denoiser.spec) != dict(given):
        raise UserError(
            f"denoiser.name: {denoiser.part_name} takes {describe_conditions(denoiser.spec)}, and the conditioner and "
            f"condition sources give {describe_conditions(given)}"
        )
