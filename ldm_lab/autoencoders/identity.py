"""No autoencoder: diffusion on the pixels themselves."""

import torch
from torch import Tensor

from ldm_lab.config import register
from ldm_lab.interfaces import Autoencoder


@register("autoencoder", "identity")
class IdentityAutoencoder(Autoencoder):
    """Pixels as latents, [B, 3, H, W] in [-1, 1], normalized; nothing is random.

    Args:
        zero_to_one: raw latents are pixels in [0, 1] instead, as in the released miniGLIDE and dogGLIDE.
    """

    channels = 3
    downscale = 1

    def __init__(self, *, zero_to_one: bool = False) -> None:
        super().__init__()
        self.zero_to_one = zero_to_one

    @property
    def pixel_range(self) -> tuple[float, float]:
        """The values of black and white in z."""
        mean, std = float(self.latent_mean), float(self.latent_std)
        return ((0.0 if self.zero_to_one else -1.0) - mean) / std, (1.0 - mean) / std

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image as the mean and the log variance of no noise, [B, 3, H, W] each."""
        image = (image + 1) / 2 if self.zero_to_one else image  # [B, 3, H, W]
        return image, torch.full_like(image, -30.0)  # [B, 3, H, W] each

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the normalized mean, [B, 3, H, W]: pixels have no posterior to draw from."""
        return self.normalize(mean)  # [B, 3, H, W]

    def decode(self, z: Tensor) -> Tensor:
        """Return the image, in [-1, 1] where z is a picture, [B, 3, H, W], not clamped."""
        image = self.denormalize(z)  # [B, 3, H, W]
        return image * 2 - 1 if self.zero_to_one else image  # [B, 3, H, W]
