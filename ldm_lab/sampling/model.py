"""A trained model: its parts, and where and how precisely they run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.formats import noised_clip
from ldm_lab.checkpoints.importer import Section
from ldm_lab.conditioners.gap import Gap
from ldm_lab.conditions import Conditions, Embedding, ImageCondition
from ldm_lab.errors import UserError
from ldm_lab.guidance.noised_clip import NoisedCLIP
from ldm_lab.interfaces import Autoencoder, Conditioner, ConditionSource, Denoiser, Objective, Prediction
from ldm_lab.sampling.tiles import Tiles, in_tiles


@dataclass
class Model:
    """The parts of a trained model; all are used where they are, none is copied.

    Attributes:
        denoiser: the network, usually the averaged one.
        objective: what its output means.
        autoencoder: decodes latents.
        conditioner: encodes prompts.
        condition_sources: what else the denoiser is conditioned on, by name.
        dropout: share of the conditions that were dropped in training; guidance needs more than 0.
        image_size: default height and width in pixels, those of training; None if nobody says.
        guide_model: a worse denoiser of the same kind, to guide away from (autoguidance); None without.
        noised_clip: of CLIP guidance; None loads GLIDE's, released, when it is first needed.
        run_device: where to run; None is where the denoiser is.
        dtype: of the denoiser's arithmetic (autocast); the samplers' own is float32.
        offload: each part is on the device only while it works.
        conditioner_config: where the conditioner is from; None if that is not known.
        autoencoder_config: likewise.
        gap: what the denoiser's embeddings are shifted by; None for nothing. The conditioner's own are not: rating
            embeddings, and whatever else is added to a prompt's, live among those.
    """

    denoiser: Denoiser
    objective: Objective
    autoencoder: Autoencoder
    conditioner: Conditioner
    condition_sources: Mapping[str, ConditionSource] = field(default_factory=dict)
    dropout: float = 0.0
    image_size: tuple[int, int] | None = None
    guide_model: Denoiser | None = None
    noised_clip: NoisedCLIP | None = None
    run_device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    offload: bool = False
    conditioner_config: Section | None = None
    autoencoder_config: Section | None = None
    gap: Gap | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.run_device or next(self.denoiser.parameters()).device

    @property
    def upscale_factor(self) -> int | None:
        """How many times an upsampler enlarges; None for a base model."""
        low_res = self.denoiser.spec.get("low_res")
        return low_res.scale_factor if isinstance(low_res, ImageCondition) else None

    @property
    def embed_width(self) -> int | None:
        """D of the embeddings in which the conditioner compares images and texts; None if it has none."""
        embed = self.conditioner.spec.get("embed")
        return embed.width if isinstance(embed, Embedding) else None

    @property
    def pixel_bound(self) -> float | None:
        """The largest magnitude of a pixel in z; None for a model of latents."""
        pixel_range = self.autoencoder.pixel_range
        return None if pixel_range is None else max(abs(end) for end in pixel_range)

    def embedder(self) -> dict[str, str] | None:
        """Return whose embeddings the conditioner gives (`ldm_lab.checkpoints.embedders`); None if nobody knows."""
        return None if self.conditioner_config is None else embedder_of(self.conditioner_config)

    def shifted(self, conditions: Conditions, are_images: bool) -> Conditions:
        """Return what the denoiser is told of prompts, by what the conditioner gives of texts, or of images."""
        if self.gap is None:
            return conditions
        shift = self.gap.images if are_images else self.gap.texts
        return {**conditions, "embed": shift(conditions["embed"])}  # [n, D]

    def load_noised_clip(self) -> NoisedCLIP:
        """Return the CLIP of CLIP guidance. Raises UserError if it cannot be loaded."""
        if self.noised_clip is None:
            self.noised_clip = noised_clip.load().to("cpu" if self.offload else self.device)
        return self.noised_clip

    def latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Return height and width of the latents for a size in pixels; None is that of training.

        Raises:
            UserError: no size known, or one that autoencoder and denoiser do not divide.
        """
        size = size or self.image_size
        if size is None:
            raise UserError("size: this checkpoint does not say what size it was trained at; give one (--size)")
        height, width = size
        unit = self.autoencoder.downscale * self.denoiser.multiple_of
        if height < 1 or width < 1 or height % unit or width % unit:
            near = [max(1, round(side / unit)) * unit for side in (width, height)]
            raise UserError(
                f"size {width}x{height}: this model takes multiples of {unit} pixels, such as {near[0]}x{near[1]}"
            )
        return height // self.autoencoder.downscale, width // self.autoencoder.downscale

    def predict(
        self, denoiser: Denoiser, tiles: Tiles | None = None
    ) -> Callable[[Tensor, Tensor, Conditions], Prediction]:
        """Return what a denoiser says about rows of x, times and conditions, at the precision that was asked for.

        With tiles it sees one at a time.
        """

        def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
            with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                return self.objective.predict(denoiser, x, t, conditions)

        return predict if tiles is None else in_tiles(predict, tiles, denoiser.spec)

    @contextlib.contextmanager
    def on_device(self, *modules: nn.Module | None) -> Iterator[None]:
        """Have parts on the device for a while; with `offload` they wait in main memory at other times."""
        moved = [module for module in modules if module is not None] if self.offload else []
        try:
            for module in moved:
                module.to(self.device)
            yield
        finally:
            for module in moved:
                module.to("cpu")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the denoiser in evaluation mode for a while; during training it may be the one that is trained."""
        was_training = self.denoiser.training
        self.denoiser.eval()
        try:
            yield
        finally:
            self.denoiser.train(was_training)
