"""The latent scale: what an autoencoder's raw latents are divided by, so that diffusion sees unit variance."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ldm_lab.config import PartConfig, build
from ldm_lab.data.datamodule import DataModule
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Autoencoder
from ldm_lab.progress import Bar

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


def image_batches(section: PartConfig, seed: int, batches: int, batch_size: int) -> Iterator[Tensor]:
    """Yield `batches` batches of different images, [batch_size, 3, H, W] in [-1, 1], in the order of training.

    Where there are fewer images, all of them come, in the last batch what is left.

    Args:
        section: of the data.
        seed: of the run.

    Raises:
        UserError: there is no image that can be used.
    """
    source = build("data", {**section, "batch_size": batch_size})
    data = DataModule(source, seed=seed, epochs=1)
    data.prepare_data()
    data.setup()
    held, given = torch.empty(0), 0
    for batch in data.train_dataloader():
        data.consumed(batch)
        image = batch.require_image("measure latents")  # [B, 3, H, W]
        held = torch.cat([held, image]) if len(held) else image  # [n, 3, H, W]
        while len(held) >= batch_size and given < batches:
            yield held[:batch_size]
            held, given = held[batch_size:], given + 1
        if given == batches:
            return
    if len(held):
        yield held
    elif not given:
        raise UserError(f"no image can be used: {data.summary()}")


def counted(batches: Iterable[Tensor], bar: Bar) -> Iterator[Tensor]:
    """Yield batches, [B, ...] each, and count on a bar what is done."""
    for batch in batches:
        yield batch
        bar.update(len(batch))
