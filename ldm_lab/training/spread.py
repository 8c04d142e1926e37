"""A look at the first latents of a run: whether they are as widely spread as diffusion takes them to be."""

import torch
from torch import Tensor

from ldm_lab.interfaces import Autoencoder
from ldm_lab.training.logs import print_rank_zero

ENOUGH = 64  # images, after which it is said
TOLERANCE = 0.2  # share by which the spread may be off


class LatentSpread:
    """Measures the spread of the first latents z of a run, and says so once if it is far from 1.

    With an autoencoder of the same architecture and another spread, `autoencoder.latent_std` is easily the wrong one:
    CompVis's kl-f8 on YFCC has 2.55, Stable Diffusion's autoencoders 5.49. Pixels are what they are.
    """

    def __init__(self, autoencoder: Autoencoder, goes_on: bool) -> None:
        """Begin.

        Args:
            autoencoder: with the statistics that the run uses.
            goes_on: whether the network begins with weights, another's or a checkpoint's, that know the latents.
        """
        self.autoencoder, self.goes_on = autoencoder, goes_on
        self.variances: list[Tensor] = []
        # Asked here: later it is on the device. On the meta device, where costs are counted, there is nothing to watch.
        self.images, self.done = 0, autoencoder.latent_mean.is_meta or autoencoder.pixel_range is not None

    @torch.no_grad()
    def watch(self, z: Tensor) -> None:
        """Take a batch of latents, [B, C, h, w]; the device is waited for once, after `ENOUGH` images."""
        if self.done:
            return
        self.variances.append(z.var())  # []
        self.images += len(z)
        if self.images >= ENOUGH:
            self.report()

    def report(self) -> None:
        """Say what is wrong, if anything is; only once."""
        if self.done or not self.variances:
            return
        self.done = True
        spread = float(torch.stack(self.variances).mean()) ** 0.5
        if abs(spread - 1) <= TOLERANCE or not spread > 0:
            return
        std = float(self.autoencoder.latent_std) * spread if self.autoencoder.latent_std.ndim == 0 else None
        images = f"{self.images} image{'s' * (self.images > 1)}"
        measured = f", so it would be {std:.3g}" if std is not None else ""
        remedy = "the weights that it begins with decide: keep it if they were trained with it"
        if not self.goes_on:
            remedy = "`python -m ldm_lab scale` measures it on many images" + (
                f", autoencoder.latent_std={std:.3g} sets it" if std is not None else ""
            )
        print_rank_zero(
            f"autoencoder.latent_std: off by {abs(spread - 1):.0%}: the latents of the first {images} have a spread of "
            f"{spread:.3g} after it where diffusion takes 1 for granted{measured}; {remedy}"
        )
