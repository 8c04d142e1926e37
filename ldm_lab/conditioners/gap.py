"""The gap between the clouds of a CLIP's image and text embeddings, and how it is bridged.

Image and text embeddings of a CLIP lie in two narrow cones (Liang et al. 2022, arXiv 2203.02053). The difference of a
pair is a constant vector, at right angles to what both clouds span, plus noise (Zhang et al. 2024, "Connect, Collapse,
Corrupt", arXiv 2401.08567). So a denoiser that is trained on image embeddings is asked with text embeddings after

    collapse    e' = (e - mean) / ||e - mean||, with the mean of the embedding's own kind
    corrupt     in training alone, e'' = (e' + noise z / sqrt(D)) / ||...||, z standard normal [D]

Noise alone is LAFITE's way (Zhou et al. 2022, arXiv 2111.13792), with means of zero. Where pairs are known, a map
brings texts nearer to images (Corgi, Zhou et al. 2023, arXiv 2211.15388, learns one from many).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.errors import UserError

LEAST = 1e-6  # length below which an embedding says nothing
IMAGE_MEAN, TEXT_MEAN, NOISE, MAP = "image_mean", "text_mean", "noise", "map"


def unit(rows: Tensor) -> Tensor:
    """Return rows [..., D] of length 1; those of about length 0, which mean no condition, as zeros."""
    length = rows.norm(dim=-1, keepdim=True)  # [..., 1]
    return torch.where(length > LEAST, rows / length.clamp(min=LEAST), torch.zeros_like(rows))  # [..., D]


class TextMap(nn.Module):
    """Base class: from a text's embedding without the mean to about its image's."""

    name: str

    def forward(self, texts: Tensor) -> Tensor:
        """Return [n, D] of any length for unit rows [n, D]."""
        raise NotImplementedError


class RidgeMap(TextMap):
    """A linear map."""

    name = "ridge"
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """`weight`: [D, D], for rows: texts @ weight."""
        super().__init__()
        self.register_buffer("weight", weight)  # [D, D]

    def forward(self, texts: Tensor) -> Tensor:
        return texts @ self.weight.to(texts)  # [n, D]


class ResidualMap(TextMap):
    """A text's embedding and what a small network adds to it."""

    name = "residual"

    def __init__(self, width: int, hidden: int) -> None:
        """Build one that adds nothing yet; `width`: D, `hidden`: of the layer between."""
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, texts: Tensor) -> Tensor:
        return texts + self.last(F.gelu(self.first(texts)))  # [n, D]


class Gap(nn.Module):
    """What brings embeddings of images and texts into one space.

    Attributes:
        image_mean, text_mean: of each kind's unit embeddings, float32 [D]; zeros where nothing is taken off.
        noise: mean length of what is added to a unit image embedding in training, [].
        noise_length: the same number, without asking the device.
        map: of texts; None for none.
    """

    image_mean: Tensor
    text_mean: Tensor
    noise: Tensor

    def __init__(self, image_mean: Tensor, text_mean: Tensor, noise: float = 0.0, map: TextMap | None = None) -> None:
        super().__init__()
        self.register_buffer(IMAGE_MEAN, image_mean.float())  # [D]
        self.register_buffer(TEXT_MEAN, text_mean.float())  # [D]
        self.register_buffer(NOISE, torch.tensor(float(noise)))  # []
        self.noise_length = float(noise)
        self.map = map

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return len(self.image_mean)

    @property
    def distance(self) -> float:
        """How far apart the means of the two clouds are."""
        return float((self.image_mean - self.text_mean).norm())

    def images(self, embeds: Tensor, z: Tensor | None = None) -> Tensor:
        """Return embeddings of images [n, D] without their mean, unit rows; zeros stay zeros.

        Args:
            embeds: unit rows, or zeros.
            z: standard normal noise [n, D], of training; None for none.
        """
        there = embeds.norm(dim=-1, keepdim=True) > LEAST  # [n, 1]
        rows = unit(embeds - self.image_mean.to(embeds))  # [n, D]
        if z is not None:
            rows = unit(rows + self.noise.to(embeds) / math.sqrt(self.width) * z)  # [n, D]
        return torch.where(there, rows, torch.zeros_like(rows))  # [n, D]

    def texts(self, embeds: Tensor) -> Tensor:
        """Return embeddings of texts [n, D] without their mean and through the map, unit rows; zeros stay zeros."""
        there = embeds.norm(dim=-1, keepdim=True) > LEAST  # [n, 1]
        rows = unit(embeds - self.text_mean.to(embeds))  # [n, D]
        if self.map is not None:
            rows = unit(self.map.to(embeds.device)(rows.float()).to(embeds))  # [n, D]
        return torch.where(there, rows, torch.zeros_like(rows))  # [n, D]

    def describe(self) -> str:
        """Return what it is, in words."""
        shift = f"means of {self.width} numbers, {self.distance:.3f} apart" if self.shifts else "no means"
        mapped = "no map" if self.map is None else f"{self.map.name} map of texts"
        return f"{shift}; noise {self.noise_length:.3f}; {mapped}"

    @property
    def map_name(self) -> str:
        """Of the map, "none" without one."""
        return "none" if self.map is None else self.map.name

    @property
    def shifts(self) -> bool:
        """Whether means are taken off."""
        return bool(self.image_mean.any() or self.text_mean.any())

    @classmethod
    def from_state(cls, state: dict[str, Tensor], where: str) -> "Gap":
        """Return what a state dict holds, of a file that says itself what its shapes are.

        Raises:
            UserError: names, shapes or numbers that make no sense, with `where` they come from.
        """
        mean = state.get(IMAGE_MEAN, torch.zeros(0))  # [D]
        width = len(mean) if mean.ndim == 1 else 0
        expected = {IMAGE_MEAN: (width,), TEXT_MEAN: (width,), NOISE: ()}
        mapped = {name.removeprefix(f"{MAP}."): value for name, value in state.items() if name.startswith(f"{MAP}.")}
        text_map: TextMap | None = None
        with torch.device("meta"):  # nothing is allocated for what a file only says
            if "weight" in mapped:
                text_map = RidgeMap(torch.zeros(width, width))
            elif "first.bias" in mapped:
                text_map = ResidualMap(width, mapped["first.bias"].numel())
        if text_map is not None:
            expected |= {f"{MAP}.{name}": tuple(value.shape) for name, value in text_map.state_dict().items()}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        finite = all(value.is_floating_point() and bool(value.float().isfinite().all()) for value in state.values())
        if not width or shapes != expected or not finite or float(state[NOISE]) < 0:
            raise UserError(f"{where}: no readable means of images and texts: names, shapes or numbers make no sense")
        if text_map is not None:
            text_map.load_state_dict({name: value.float() for name, value in mapped.items()}, assign=True)
        found = cls(state[IMAGE_MEAN].float(), state[TEXT_MEAN].float(), float(state[NOISE].float()), text_map)
        return found.eval().requires_grad_(False)
