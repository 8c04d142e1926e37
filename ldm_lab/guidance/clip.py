"""CLIP guidance: the image becomes more like a text in the eyes of a CLIP that knows noised images."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ldm_lab.interfaces import Prediction
from ldm_lab.schedules import Discrete


class NoisedCLIP(Protocol):
    """What is asked of the network (`ldm_lab.guidance.noised_clip`).

    Attributes:
        image_size: side of the images that it sees.
        timesteps: of the table of cosine betas by which its images were noised.
        logit_scale: the factor of a cosine similarity.
    """

    image_size: int
    timesteps: int
    logit_scale: float

    def image_embedding(self, x: Tensor, t: Tensor) -> Tensor:
        """Return unit rows [B, D] for noised images x [B, 3, S, S] at times t [B]."""

    def text_embedding(self, texts: list[str]) -> Tensor:
        """Return unit rows [n, D] for texts."""


class ClipGuidance(NamedTuple):
    """A noised CLIP, and how strongly it guides: the gradient is multiplied by `scale` (3 in GLIDE's notebook)."""

    clip: Any
    scale: float = 3.0


def climbing(
    predict: Callable[[Tensor, Tensor], Prediction], guidance: ClipGuidance, texts: Tensor, schedule: Any
) -> Callable[[Tensor, Tensor], Prediction]:
    """Return `predict` with the gradient of the images' likeness to their texts in its predictions.

    Nichol et al. 2022 (arXiv 2112.10741), section 2.4: the gradient by x_t of the dot product of both embeddings, here
    times the logit scale, as released. The CLIP is asked at the time at which its own schedule has the noise of x.

    Args:
        predict: x [B, 3, S, S], t [B] -> Prediction.
        guidance: the CLIP, on the device of x.
        texts: embeddings of what each image is to be like, [B, D].
        schedule: of the model that is guided.
    """
    clip, scale = guidance
    own = Discrete("squaredcos_cap_v2", clip.timesteps)

    def predict_climbing(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t[0].cpu().double())  # [], []
        at = own.time(sigma / alpha).float().to(t.device).expand(len(x))  # [B]
        with torch.enable_grad():
            moved = x.detach().requires_grad_()  # [B, 3, S, S]
            likeness = clip.logit_scale * (clip.image_embedding(moved, at) * texts).sum()  # []
            (gradient,) = torch.autograd.grad(likeness, moved)  # [B, 3, S, S]
        return predict(x, t)._replace(gradient=scale * gradient)

    return predict_climbing
