"""The contracts of the roles, as classes: what each part promises, below all of them. No part is asked what it is.

t runs from 1 (noise) to 0 (data). x = alpha(t) * x0 + sigma(t) * eps; v = alpha * eps - sigma * x0. Images are RGB in
[-1, 1], [B, 3, H, W]; latents are [B, C, h, w] with about unit variance.

A denoiser is told things beside x and the time: its *conditions*, a dict of tensors whose first axis is the batch. What
they are is described by a `ConditionSpec`, name -> kind. A conditioner gives some of them (made of images or texts), a
condition source one or two more (a low-resolution image and its noise level, an inpainting mask); a denoiser takes
exactly what they give together (`check_conditions`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from PIL import Image as PillowImage
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.errors import UserError

Conditions = dict[str, Tensor]  # name -> [B, ...]
TimeInput = Literal["t", "timestep", "log_snr"]
TimestepSampler = Literal["sobol", "uniform"]


# ----------------------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Embedding:
    """One vector for each row, float [B, width]; zeros mean no condition."""

    width: int

    def __str__(self) -> str:
        return f"embedding of {self.width}"


@dataclass(frozen=True)
class TokenIds:
    """Ids that the denoiser reads itself, int64 [B, length]; beside NAME travels NAME_mask, bool [B, length]."""

    length: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.length} token ids of a vocabulary of {self.vocabulary}"


@dataclass(frozen=True)
class TokenStates:
    """States of a language model, float [B, length, width]; beside NAME travels NAME_mask, bool [B, length]."""

    width: int
    length: int

    def __str__(self) -> str:
        return f"token states, up to {self.length} of {self.width}"


@dataclass(frozen=True)
class ImageCondition:
    """An image beside the noised one, float [B, channels, h / scale_factor, w / scale_factor]."""

    channels: int
    scale_factor: int = 1

    def __str__(self) -> str:
        size = "" if self.scale_factor == 1 else f", 1/{self.scale_factor} of the size"
        return f"image of {self.channels} channels{size}"


@dataclass(frozen=True)
class Level:
    """One number for each row, float [B], in [0, 1]: how noised another condition is."""

    def __str__(self) -> str:
        return "noise level"


ConditionKind = Embedding | TokenIds | TokenStates | ImageCondition | Level
ConditionSpec = Mapping[str, ConditionKind]
Kind = TypeVar("Kind", Embedding, TokenIds, TokenStates, ImageCondition, Level)
MASK = "_mask"  # beside the name of token ids or states: where a text goes on


def condition_tensors(spec: ConditionSpec) -> list[str]:
    """Return the names of the tensors that conditions of a spec consist of: its own, and masks of token sequences."""
    names = []
    for name, kind in spec.items():
        names += [name, name + MASK] if isinstance(kind, TokenIds | TokenStates) else [name]
    return names


def describe_conditions(spec: ConditionSpec) -> str:
    """Return a spec in words: "embed (embedding of 512) and low_res (image of 3 channels)"."""
    return " and ".join(f"{name} ({kind})" for name, kind in spec.items()) or "nothing"


def required_condition(spec: ConditionSpec, name: str, kind: type[Kind], denoiser: str) -> Kind:
    """Return the condition that a denoiser cannot do without, of all that it is given.

    Args:
        spec: what conditioner and condition sources give.
        name: of the condition.
        kind: what it has to be.
        denoiser: registered name, for the message.

    Raises:
        UserError: there is none of that name, or it is of another kind.
    """
    given = spec.get(name)
    if not isinstance(given, kind):
        raise UserError(
            f"denoiser.name: {denoiser} takes {name} ({kind.__name__}), and the conditioner and condition sources give "
            f"{describe_conditions(spec)}"
        )
    return given


def is_upsampler(spec: ConditionSpec) -> bool:
    """Return whether a denoiser that takes these conditions enlarges an image."""
    return any(isinstance(kind, ImageCondition) and kind.scale_factor > 1 for kind in spec.values())


def check_conditions(denoiser: "Denoiser", given: ConditionSpec) -> None:
    """Raise UserError unless a denoiser takes exactly what the conditioner and the condition sources give."""
    if dict(denoiser.spec) != dict(given):
        raise UserError(
            f"denoiser.name: {denoiser.part_name} takes {describe_conditions(denoiser.spec)}, and the conditioner and "
            f"condition sources give {describe_conditions(given)}"
        )


@dataclass
class ReaderState:
    """Where a reader of the data stands after a batch, and what it read since the one before. Plain values.

    Attributes:
        position: `ldm_lab.data.order.Position`: epoch, start, offset.
        reader: which of the rank's readers, one in each loader process.
        read: samples, the skipped and filtered ones included.
        skipped: reason -> samples that could not be used.
        filtered: rule -> samples that a rule of the user's leaves out.
        examples: reason or rule -> the first few keys.
    """

    position: tuple[int, int, int]
    reader: int = 0
    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Batch:
    """Samples as training gets them. A cache gives `mean` and `logvar` in place of `image`, and the conditions.

    Attributes:
        key: of each sample.
        text: captions; "" where there is none.
        image: [B, 3, H, W] in [-1, 1] (uint8 until it leaves the loader), or None.
        mean, logvar: of the posterior of the autoencoder's raw latents, [B, C, h, w] each, or None.
        conditions: what the conditioner gave when the cache was made; empty without a cache.
        state: where the reader stands after this batch, for `DataModule.consumed`.
    """

    key: list[str]
    text: list[str]
    image: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    conditions: Conditions = field(default_factory=dict)
    state: ReaderState | None = None

    def __len__(self) -> int:
        return len(self.key)

    def require_image(self, purpose: str) -> Tensor:
        """Return the images, [B, 3, H, W]. Raises UserError "images are needed to {purpose}" for a cached batch."""
        if self.image is None:
            raise UserError(f"data: images are needed to {purpose}, and a cache holds none")
        return self.image


# ------------------------------------------------------------------------------------------------------ predictions


class Prediction(NamedTuple):
    """What a denoiser says about x at time t.

    Attributes:
        x0: the clean sample, [B, C, h, w].
        eps: the noise in x, [B, C, h, w]; x = alpha * x0 + sigma * eps.
        variance_fraction: the learned variance of an ancestral step, [B, C, h, w], or None: 0 is the posterior's, 1 is
            beta's, with logarithms in between (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15). Which variances
            these are depends on how far the step goes, so only the sampler knows.
        gradient: the condition score, [B, C, h, w]: of a further log likelihood by x, such as that of CLIP guidance;
            None without. x0 and eps do not contain it.
    """

    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None
    gradient: Tensor | None = None


Predict = Callable[[Tensor, Tensor], Prediction]  # x [B, C, h, w], t [B] -> what the (guided) denoiser says
Callback = Callable[[int, Tensor, Tensor], None]  # step, x before it, x0 in it
Noise = Callable[[Tensor], Tensor]  # x -> standard normal noise of its shape


class Schedule:
    """A noise schedule: t -> (alpha, sigma).

    Attributes:
        variance_preserving: whether alpha^2 + sigma^2 is exactly 1, which no sampler takes for granted.
        timesteps: T of a table of betas; None for a continuous schedule.
    """

    variance_preserving: bool = False
    timesteps: int | None = None

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, each of t's shape and dtype, for t in [0, 1]."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), of t's shape and dtype."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha / sigma).log()

    def t_of_sigma_over_alpha(self, ratio: Tensor) -> Tensor:
        """Return the t, of any shape, at which sigma / alpha is `ratio` (k-diffusion's sigma_to_t)."""
        raise NotImplementedError

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t, of any shape, at which log(alpha^2 / sigma^2) is `log_snr`."""
        return self.t_of_sigma_over_alpha((-log_snr / 2).exp())

    def time(self, t: Tensor, time_input: TimeInput) -> Tensor:
        """Return what a denoiser's time embedding reads at t: t itself, the timestep 0 .. T - 1, or the log SNR.

        Raises:
            UserError: timesteps are asked of a schedule without any.
        """
        if time_input == "t":
            return t
        if time_input == "log_snr":
            return self.log_snr(t)
        if self.timesteps is None:
            raise UserError("objective.name: this denoiser reads timesteps, and the objective's schedule is continuous")
        return t * self.timesteps - 1

    def grid(self, steps: int | str, spacing: str | None = None) -> Tensor:
        """Return the times that a sampler visits, float32 [steps], falling; the final 0 is not among them.

        Args:
            steps: how many, or a respacing (`ldm_lab.schedules.respacing`).
            spacing: how they are spread (`ldm_lab.schedules.spacing`); None is the schedule's own way.

        Raises:
            UserError: steps or a spacing that this schedule does not have.
        """
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------ parts


class Part:
    """What every registered class has: the role and the name that it is known by (`ldm_lab.config.register`)."""

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

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names that they are published with as this part's state dict."""
        return state

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the groups of parameters that training may leave as they are (`optim.freeze`), by name."""
        return {}

    @staticmethod
    def check(config: dict[str, Any]) -> list[str]:
        """Return what is wrong across the keys of a config, each as "key: what". Bounds stand in the annotations."""
        return []


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


def _per_channel(statistic: Tensor) -> Tensor:
    """Return a statistic as latents [B, C, h, w] are calculated with: a 0-dim one keeps their precision."""
    return statistic[:, None, None] if statistic.ndim else statistic  # [C, 1, 1] or []


class Conditioner(Part, nn.Module):
    """What the denoiser is told about the image, made of images or texts; frozen.

    Attributes:
        spec: what it gives.
    """

    @property
    def spec(self) -> ConditionSpec:
        raise NotImplementedError

    def from_batch(self, batch: Batch) -> Conditions:
        """Return the conditions of a training batch, [B, ...] each."""
        raise NotImplementedError

    def from_prompts(self, texts: Sequence[str], images: Sequence[PillowImage.Image]) -> Conditions:
        """Return the conditions of prompts, one row each, texts first. Raises UserError for what it cannot read."""
        raise NotImplementedError

    def null(self, conditions: Conditions) -> Conditions:
        """Return as many rows that mean "no condition"; by default zeros."""
        return {name: torch.zeros_like(value) for name, value in conditions.items()}


class EmbeddingConditioner(Conditioner):
    """A conditioner whose texts and images share one space: it compares them, too, and scores images.

    Attributes:
        embed_dim: D, the width of an embedding.
        text_size: L, positions of a tokenized text.
        image_transform: from a Pillow image of any mode and size to what `encode_pixels` takes, [3, S, S]; it can be
            sent to other processes.
    """

    embed_dim: int
    text_size: int

    @property
    def spec(self) -> ConditionSpec:
        return {"embed": Embedding(self.embed_dim)}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    @property
    def image_transform(self) -> Callable[[PillowImage.Image], Tensor]:
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str], warn: bool = False) -> Tensor:
        """Return token ids, int64 [n, L]; too long texts are cut, if `warn` with a line in the log for each."""
        raise NotImplementedError

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of token ids [n, L], [n, D], of any length."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of images that `image_transform` prepared, [B, 3, S, S], [B, D], of any length."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], unit rows; differentiable in the images."""
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [n, D], unit rows; a text that is too long is cut with a warning."""
        tokens = self.tokenize(texts, warn=True).to(self.device)  # [n, L]
        return F.normalize(self.encode_tokens(tokens), dim=-1)  # [n, D]

    def from_batch(self, batch: Batch) -> Conditions:
        """Return {"embed": [B, D]}, the embeddings of a batch's images. Raises UserError if it has none."""
        if batch.image is None:
            raise UserError(f"conditioner.name: {self.part_name} embeds images, and the data has none")
        return {"embed": self.encode_image(batch.image)}  # [B, D]

    def from_prompts(self, texts: Sequence[str], images: Sequence[PillowImage.Image]) -> Conditions:
        """Return {"embed": [n, D]}, the embeddings of texts, then of images, unit rows."""
        embeds = [torch.zeros(0, self.embed_dim, device=self.device)]  # [0, D]
        if texts:
            embeds.append(self.encode_text(texts))  # [n_texts, D]
        if images:
            pixels = torch.stack([self.image_transform(image) for image in images])  # [n_images, 3, S, S]
            embeds.append(F.normalize(self.encode_pixels(pixels.to(self.device)), dim=-1))  # [n_images, D]
        return {"embed": torch.cat(embeds)}  # [n, D]


@dataclass(frozen=True)
class ConditionRequest:
    """What sampling knows of the images to be made, beside the prompts.

    Attributes:
        x: where sampling starts, [B, C, h, w].
        low_res: what is to be enlarged, [B, 3, h', w'] in [-1, 1]; None without.
        known: latents of an image of which a part is kept, [1 or B, C, h, w]; None without.
        mask: where it is to be painted anew, bool [1 or B, 1, h, w]; None without.
    """

    x: Tensor
    low_res: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None


class ConditionSource(Part, nn.Module):
    """A condition that is neither text nor embedding: a low-resolution image and its noise level, a mask.

    It is never dropped for guidance: the unconditional prediction sees it, too.

    Attributes:
        spec: what it gives.
    """

    @property
    def spec(self) -> ConditionSpec:
        raise NotImplementedError

    def from_batch(self, batch: Batch, x0: Tensor, generator: torch.Generator | None) -> Conditions:
        """Return the conditions of a training batch, [B, ...] each.

        Args:
            batch: its images, or what a cache has of them.
            x0: the batch's latents, [B, C, h, w].
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
        multiple_of: what latent height and width have to be multiples of.
        architecture_keys: options that a checkpoint to begin with has to share, because with others its tensors are of
            other places.
        unordered_keys: those of them that are lists whose order has no meaning.
    """

    spec: ConditionSpec
    time_input: TimeInput = "t"
    multiple_of: int = 1
    architecture_keys: ClassVar[tuple[str, ...]] = ()
    unordered_keys: ClassVar[tuple[str, ...]] = ()

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

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Raise UserError if a denoiser reads timesteps and the schedule has none."""
        self.schedule.time(torch.zeros(1), denoiser.time_input)

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

    def times(self, schedule: Schedule) -> Tensor:
        """Return the times at which the steps begin, falling, float32 [steps]. Raises UserError as `Schedule.grid`."""
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
