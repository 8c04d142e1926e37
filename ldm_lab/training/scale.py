"""The latent scale: what an autoencoder's raw latents are divided by, so that diffusion sees unit variance."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ldm_lab.interfaces import Autoencoder

BATCHES = 32  # as in cloob-latent-diffusion, whose batches had 64 images


def latent_scale(latents: Iterable[Tensor]) -> float:
    """Return the scale of batches of raw latents, [B, C, h, w] each: the root of the mean of their variances.

    Each batch's variance is the unbiased one over all its values (cloob-latent-diffusion, autoencoder_scale.py). A
    batch that is smaller than the first one counts for that much less.
    """
    variances, weights, first = [], [], 0
    for batch in latents:
        first = first or len(batch)
        weights.append(len(batch) / first)
        variances.append(weights[-1] * float(batch.double().var()))
    return (sum(variances) / sum(weights)) ** 0.5


@torch.no_grad()
def measure_scale(autoencoder: Autoencoder, batches: Iterable[Tensor], seed: int = 0) -> float:
    """Return the scale of posterior samples of an autoencoder, whatever scale it has now.

    Args:
        autoencoder: in evaluation mode.
        batches: images, [B, 3, H, W] in [-1, 1] each, one or more; read one by one.
        seed: of the posterior's noise; torch's global generators are left alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def latents() -> Iterable[Tensor]:
        for image in batches:
            with torch.autocast(autoencoder.latent_std.device.type, enabled=False):
                mean, logvar = autoencoder.moments(image.to(autoencoder.latent_std))  # [B, C, h, w] each
                noise = torch.randn(mean.shape, generator=generator).to(mean)  # [B, C, h, w]
                yield autoencoder.denormalize(autoencoder.sample(mean, logvar, noise))  # [B, C, h, w]

    return latent_scale(latents())
