"""The frozen parts that make latents and conditions of images: while a denoiser is trained, and once for a cache."""

import torch
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.conditions import MASK, ConditionKind, Conditions, TokenIds, TokenStates
from ldm_lab.config.uses import EncoderPrecision
from ldm_lab.interfaces import Autoencoder, Conditioner

CHUNK_PIXELS = 2**17  # of images that a CPU encodes at once: what lies between the layers has to fit its caches


class Encoders:
    """Autoencoder and conditioner, as they encode images that nothing is learned from.

    Attributes:
        autoencoder, conditioner: frozen; weights in fp32, whatever their precision is.
        keeps_pixels: whether the autoencoder is no network, as that of a model of pixels: nothing is saved by encoding
            with it.
        kinds: what the conditioner's tensors are, by name, masks included.
        in_chunks: whether images are encoded a few at a time, channels last; None does so on a CPU.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        conditioner: Conditioner,
        autoencoder_precision: EncoderPrecision | None = None,
        conditioner_precision: EncoderPrecision | None = None,
    ) -> None:
        """Take the parts and the precisions of their arithmetic; None is fp32."""
        self.autoencoder, self.conditioner = autoencoder, conditioner
        self.precisions = autoencoder_precision, conditioner_precision
        self.keeps_pixels = not any(True for _ in autoencoder.parameters())
        self.in_chunks: bool | None = None
        self._is_channels_last = False
        self.kinds: dict[str, ConditionKind] = {}
        for name, kind in conditioner.spec.items():
            self.kinds[name] = kind
            if isinstance(kind, TokenIds | TokenStates):
                self.kinds[name + MASK] = kind

    @torch.no_grad()
    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the raw latents, [B, C, h, w] each, of images [B, 3, H, W] in [-1, 1].

        They are in float32. On a CPU convolutions are fastest channels last, and on so many images at once that its
        caches hold them.
        """
        device, precision = image.device.type, self.precisions[0]
        size = len(image)
        if (device == "cpu" if self.in_chunks is None else self.in_chunks) and not self.keeps_pixels:
            self._order_weights()
            image = image.contiguous(memory_format=torch.channels_last)  # [B, 3, H, W]
            size = max(1, CHUNK_PIXELS // (image.shape[-2] * image.shape[-1]))
        with encoding(device, precision):
            parts = [self.autoencoder.moments(part) for part in image.split(size)]  # ([n, C, h, w], [n, C, h, w]) each
        mean, logvar = (torch.cat(its).float().contiguous() for its in zip(*parts))  # [B, C, h, w] each
        return mean, logvar

    def _order_weights(self) -> None:
        """Put the weights of convolutions into the order of the images', once."""
        if self._is_channels_last:
            return
        for weight in self.autoencoder.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self._is_channels_last = True

    @torch.no_grad()
    def conditions(self, batch: Batch, device: str) -> Conditions:
        """Return what the conditioner gives, name -> [B, ...], floats in float32.

        Args:
            batch: images in [-1, 1] and texts.
            device: type of the device that it works on.
        """
        with encoding(device, self.precisions[1]):
            found = self.conditioner.from_batch(batch)  # name -> [B, ...]
        return {name: its.float() if its.is_floating_point() else its for name, its in found.items()}


def encoding(device: str, precision: EncoderPrecision | None) -> torch.autocast:
    """Return the context in which a frozen part encodes on a type of device, whatever the trained network's is."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
