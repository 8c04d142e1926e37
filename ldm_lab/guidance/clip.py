"""CLIP guidance: the gradient by which images become more similar to a text, by a CLIP trained on noised images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.noised_clip import NoisedCLIP
from ldm_lab.interfaces import Predict, Prediction, Schedule
from ldm_lab.schedules import Discrete


@dataclass(frozen=True)
class ClipGuidance:
    """A noised CLIP, and how strongly it guides.

    Attributes:
        clip: the network.
        scale: factor of the gradient; 3 in GLIDE's notebook.
    """

    clip: NoisedCLIP
    scale: float = 3.0


@dataclass(frozen=True, eq=False)
class ClipGradient(Wrapper):
    """The gradient of the images' similarity to their texts, in the predictions.

    Nichol et al. 2022 (arXiv 2112.10741), section 2.4: the gradient by x_t of the dot product of both embeddings, here
    times the logit scale, as released. The CLIP is asked at the time at which its own schedule has the noise of x.

    Attributes:
        guidance: the CLIP, on the device of x, and the scale.
        texts: embeddings of what each image is to become similar to, [B, D].
    """

    order = 20
    adds_gradient = True

    guidance: ClipGuidance
    texts: Tensor

    def wrap(self, predict: Predict, schedule: Schedule) -> Predict:
        """Return `predict` for x [B, 3, S, S], with the gradient in its predictions; see `Wrapper.wrap`."""
        clip, texts, scale = self.guidance.clip, self.texts, self.guidance.scale
        own = Discrete("squaredcos_cap_v2", clip.timesteps)

        def clip_guided(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = schedule.alpha_sigma(t[0].cpu().double())  # [], []
            at = own.t_of_sigma_over_alpha(sigma / alpha).float().to(t.device).expand(len(x))  # [B]
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()  # [B, 3, S, S]
                # The CLIP's own images preserve variance.
                noised = leaf / math.hypot(alpha.item(), sigma.item())  # [B, 3, S, S]
                similarity = clip.logit_scale * (clip.image_embedding(noised, at) * texts).sum()  # []
                (gradient,) = torch.autograd.grad(similarity, leaf)  # [B, 3, S, S]
            return predict(x, t)._replace(gradient=scale * gradient)

        return clip_guided
