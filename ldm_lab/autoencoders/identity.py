"""No autoencoder: diffusion on the pixels themselves."""

import torch
from torch import Tensor, nn

from ldm_lab.config import register


@register("autoencoder", "identity")
class IdentityAutoencoder(nn.Module):
    """Pixels as latents, [B, 3, H, W] in [-1, 1] divided by `scale`; nothing is random.

    Args:
        zero_to_one: latents are pixels in [0, 1] instead, as in the released miniGLIDE and dogGLIDE.
    """

    channels = 3
    downscale = 1
    scale: Tensor

    def __init__(self, *, zero_to_one: bool = False) -> None:
        super().__init__()
        self.zero_to_one = zero_to_one
        self.register_buffer("scale", torch.tensor(1.0))  # []

    @property
    def limit(self) -> float:
        """The largest magnitude of a latent that is a picture."""
        return 1 / float(self.scale)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image as the mean and the log variance of no noise, [B, 3, H, W] each."""
        image = (image + 1) / 2 if self.zero_to_one else image  # [B, 3, H, W]
        return image, torch.full_like(image, -30.0)  # [B, 3, H, W] each

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return mean / scale, [B, 3, H, W]: pixels have no posterior to draw from."""
        return mean / self.scale  # [B, 3, H, W]

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the latents of an image, [B, 3, H, W]."""
        return self.sample(*self.moments(image))  # [B, 3, H, W]

    def decode(self, z: Tensor) -> Tensor:
        """Return z * scale, in [-1, 1] where z is a picture, [B, 3, H, W], not clamped."""
        image = z * self.scale  # [B, 3, H, W]
        return image * 2 - 1 if self.zero_to_one else image  # [B, 3, H, W]
