"""The patch discriminator of the autoencoder's training, and the weight of the generator's loss."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.parts import load_strictly
from ldm_lab.checkpoints.third_party import strip_prefix
from ldm_lab.config import NonNegativeFloat, NonNegativeInt, PositiveInt, register
from ldm_lab.errors import UserError

RELEASED_PREFIX = "loss.discriminator."  # in the checkpoints of latent-diffusion
MAX_ADAPTIVE_WEIGHT = 1e4


@register("discriminator")
class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004): one logit for each overlapping patch, real or reconstructed."""

    def __init__(
        self,
        *,
        start: NonNegativeInt = 50_001,
        weight: NonNegativeFloat = 0.5,
        layers: PositiveInt = 3,
        base_channels: PositiveInt = 64,
        loss: Literal["hinge", "vanilla"] = "hinge",
        weights: str | None = None,
    ) -> None:
        """Build the network. The defaults are latent-diffusion's.

        Args:
            start: optimizer steps of the autoencoder after which the discriminator takes part.
            weight: factor on the adaptive weight of the generator's loss.
            layers: halvings of the side; 3 sees patches of 70x70 pixels.
            base_channels: channels after the first convolution; they double with each layer, up to eightfold.
            loss: "hinge" (Lim & Ye 2017, arXiv 1705.02894), or "vanilla", the cross-entropy.
            weights: a checkpoint of latent-diffusion's whose trained discriminator is taken over, for fine-tuning.
        """
        super().__init__()
        self.start, self.weight, self.layers = start, weight, layers
        self.loss: Callable[[Tensor, Tensor], Tensor] = {"hinge": hinge_loss, "vanilla": vanilla_loss}[loss]
        widths = [base_channels * min(2**i, 8) for i in range(layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            stages += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.apply(_initialize)
        if weights is not None:
            self.load_released(weights)

    @property
    def min_size(self) -> int:
        """Least side of an image, pixels: the last two convolutions take one pixel each from what is left."""
        return 3 * 2**self.layers

    def forward(self, image: Tensor) -> Tensor:
        """Return logits, [B, 1, h, w], of images [B, 3, H, W] in [-1, 1]; large is real."""
        return self.main(image)

    def frozen_logits(self, image: Tensor) -> Tensor:
        """Return the same logits with gradients for the image alone: how the autoencoder sees this network."""
        return functional_call(self, {name: p.detach() for name, p in self.named_parameters()}, (image,))

    def load_released(self, path: str) -> None:
        """Load the discriminator in a checkpoint of latent-diffusion's. Raises UserError if there is none that fits."""
        file = detect_format(path, "discriminator.weights").file
        state = strip_prefix(file.read(), RELEASED_PREFIX)
        if not state:
            raise UserError(f"{path}: holds no discriminator (no names begin with {RELEASED_PREFIX!r})")
        load_strictly(self, state, path)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, a scalar, from its logits on images and on reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, a scalar, from its logits on images and on reconstructions."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last: Tensor, loss_scale: Tensor | float = 1.0
) -> Tensor:
    """Return the weight, a scalar without gradient, at which both losses pull equally hard at the decoder's last layer.

    Esser et al. 2021, "Taming transformers" (arXiv 2012.09841), eq. 7, with their epsilon of 1e-4 and limit of 1e4.
    With several processes each one weighs its own share of the batch, as there.

    Args:
        reconstruction_loss: scalar.
        generator_loss: scalar.
        last: weight of the decoder's last layer.
        loss_scale: factor on both before going back, that of fp16's gradient scaler, so that no gradient vanishes; [],
            as waiting for its number would hold up the host in every step.
    """
    pull, push = (
        torch.autograd.grad(loss_scale * loss, last, retain_graph=True)[0].float().norm() / loss_scale  # []
        for loss in (reconstruction_loss, generator_loss)
    )
    return (pull / (push + 1e-4)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
