"""Training the autoencoder: reconstruction, KL, perceptual distance, patch discriminator (latent-diffusion's recipe).

One optimizer holds both networks, and one backward pass gives both gradients: the autoencoder's loss sees the
discriminator with its parameters detached, the discriminator's loss sees the reconstructions detached. So Lightning's
step counter, gradient accumulation, mixed precision, learning rate and DDP work as in every other task. Two things
differ from latent-diffusion: both networks step at the same time (there, the autoencoder is run once more after its
step), and the loss is divided by the number of values of an image, which Adam does not notice and fp16 needs.
"""

from collections import deque
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torchvision.models import vgg16

from ldm_lab.autoencoders.kl_f8 import kl
from ldm_lab.config import NonNegativeFloat, PartConfig, RunConfig, register
from ldm_lab.errors import UserError
from ldm_lab.evaluation.perceptual import pretrained_features
from ldm_lab.interfaces import Batch
from ldm_lab.training.discriminator import adaptive_weight
from ldm_lab.training.gradients import Parameters
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.part_task import PartTask
from ldm_lab.training.scale import BATCHES, measure_scale


@register("loss", "reconstruction")
class ReconstructionLoss(nn.Module):
    """How far a reconstruction is from its image, and the latent from a standard normal one."""

    def __init__(
        self, *, pixels: Literal["l1", "l2"] = "l1", kl_weight: NonNegativeFloat = 1e-6, learn_logvar: bool = False
    ) -> None:
        """Set the weights of the terms.

        Args:
            pixels: "l1", the absolute difference, or "l2", its square, summed over an image.
            kl_weight: factor on the KL divergence, a sum over a latent.
            learn_logvar: train one log variance of all pixels, which scales both distances. latent-diffusion has the
                parameter, but no optimizer that trains it: it stays 0.
        """
        super().__init__()
        self.pixels, self.kl_weight = pixels, kl_weight
        self.logvar = nn.Parameter(torch.tensor(0.0), requires_grad=learn_logvar)  # []

    def forward(self, image: Tensor, reconstruction: Tensor, distance: Tensor) -> Tensor:
        """Return the negative log likelihood per image, [B], a sum over its values (up to a constant).

        Args:
            image: [B, 3, H, W].
            reconstruction: [B, 3, H, W].
            distance: the weighted perceptual distance, [B], which is added to every value's difference.
        """
        difference = image - reconstruction  # [B, 3, H, W]
        difference = difference.abs() if self.pixels == "l1" else difference.square()  # [B, 3, H, W]
        difference = difference + distance[:, None, None, None]  # [B, 3, H, W]
        return (difference / self.logvar.exp() + self.logvar).flatten(1).sum(1)  # [B]


class AdversarialLosses(NamedTuple):
    """What the discriminator adds to the losses.

    Attributes:
        generator: the weighted loss of the autoencoder, [], on the scale of the negative log likelihood of an image.
        discriminator: the discriminator's own loss, [].
        logs: scalars for the log, by name.
    """

    generator: Tensor
    discriminator: Tensor
    logs: dict[str, Tensor]


@register("task", "autoencoder")
class AutoencoderTask(PartTask):
    """Train a KL autoencoder on images; the standard deviation of its latents is measured whenever it is exported."""

    ROLES = ("autoencoder", "loss", "perceptual", "discriminator", "reconstructions")
    REQUIRED = ("data", "autoencoder")
    NETWORK = ("autoencoder",)
    PART, FILE, LOSS = "autoencoder", "autoencoder.safetensors", ReconstructionLoss

    def __init__(self, config: RunConfig, read_weights: bool = True, weights_follow: bool = False) -> None:
        """Build the task; `read_weights=False` leaves out the weights of LPIPS and of the discriminator."""
        super().__init__(config, read_weights)
        if "perceptual" in config:
            features = pretrained_features() if read_weights else vgg16().features
            self.frozen["perceptual"] = config["perceptual"].build(features)
        self.discriminator = None
        if "discriminator" in config:
            options = config["discriminator"].options
            given = options if read_weights else {key: value for key, value in options.items() if key != "weights"}
            self.discriminator = PartConfig("discriminator", "discriminator", given).build()
        self._check_size(config["data"].get("image_size"))
        self.recent: deque[Tensor] = deque(maxlen=BATCHES)  # images of this rank's last batches, uint8, on the CPU

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        image = batch.image  # [B, 3, H, W]
        mean, logvar = self.model.moments(image)  # [B, C, h, w] each
        z = self.model.sample(mean, logvar, torch.randn_like(mean))  # [B, C, h, w]
        output = self.model.decode(z)  # [B, 3, H, W]
        with torch.autocast(self.device.type, enabled=False):
            target, reconstruction = image.float(), output.float()  # [B, 3, H, W] each
            distance = self.perceptual_distance(target, reconstruction)  # [B]
            nll = self.loss(target, reconstruction, distance).mean()  # []
            divergence = kl(mean.float(), logvar.float()).mean()  # []
        adversarial = self.adversarial_losses(image, output, nll)
        loss = (nll + self.loss.kl_weight * divergence + adversarial.generator) / image[0].numel()  # []
        logs = {"loss": loss, "kl": divergence, "psnr": psnr(target, reconstruction).mean()}
        logs["l1"] = (target - reconstruction).abs().mean()  # []
        if "perceptual" in self.frozen:
            logs["lpips"] = distance.mean()  # []
        self.log_means({**logs, **adversarial.logs}, len(image))
        return loss + adversarial.discriminator

    def perceptual_distance(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the weighted LPIPS, [B], of images [B, 3, H, W] in [-1, 1]; zeros if the config has none."""
        if "perceptual" not in self.frozen:
            return image.new_zeros(len(image))  # [B]
        return self.frozen["perceptual"].weight * self.frozen["perceptual"](image, reconstruction)  # [B]

    def adversarial_losses(self, image: Tensor, reconstruction: Tensor, nll: Tensor) -> AdversarialLosses:
        """Return what the discriminator adds to the losses.

        Args:
            image: [B, 3, H, W].
            reconstruction: [B, 3, H, W].
            nll: scalar, what the weight of the generator's loss is adapted to.
        """
        zero = nll.new_zeros(())  # []
        if self.discriminator is None:
            return AdversarialLosses(zero, zero, {})
        if not self.rehearsing and self.trainer.global_step < self.discriminator.start:
            # Gradients of zero: DDP waits for one of every parameter.
            idle = sum(0.0 * p.sum() for p in self.discriminator.parameters())  # []
            return AdversarialLosses(zero, idle, {})
        generator_loss = -self.discriminator.frozen_logits(reconstruction).float().mean()  # []
        # Going back through fp16 needs the gradient scaler's factor, and the size of a loss per value.
        scaler = None if self.rehearsing else self.scaler
        loss_scale = scaler.scale(nll.new_ones(())) / image[0].numel() if scaler else 1.0  # []
        last = self.model.decoder.conv_out.weight
        weight = self.discriminator.weight * adaptive_weight(nll, generator_loss, last, loss_scale)  # []
        on_real = self.discriminator(image).float()  # [B, 1, h, w]
        on_fake = self.discriminator(reconstruction.detach()).float()  # [B, 1, h, w]
        discriminator_loss = self.discriminator.loss(on_real, on_fake)  # []
        logs = {
            "adaptive_weight": weight,
            "generator": generator_loss,
            "discriminator": discriminator_loss,
            "logits_real": on_real.mean(),
            "logits_fake": on_fake.mean(),
        }
        return AdversarialLosses(weight * generator_loss, discriminator_loss, logs)

    def trained_modules(self) -> list[nn.Module]:
        return [*super().trained_modules(), *([self.discriminator] if self.discriminator is not None else [])]

    def clipped_apart(self, optimizer: torch.optim.Optimizer) -> list[Parameters]:
        """Return the networks' parameters apart: one gradient must not shrink the other."""
        return [list(module.parameters()) for module in self.trained_modules()]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer.is_global_zero:
            self.recent.append(batch.require_image("measure latents").clone())  # uint8 [B, 3, H, W]
        return batch

    def callbacks(self, folder: Path) -> list[Callback]:
        return [self.run_config["reconstructions"].build(folder)] if "reconstructions" in self.run_config else []

    def export(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write `autoencoder.safetensors`, its latent std measured on the last batches that were trained on."""
        images = (levels.to(self.device).float() / 127.5 - 1 for levels in self.recent)  # [B, 3, H, W] each
        trained = self.best_model.training
        std = measure_scale(self.best_model.eval(), images)
        self.best_model.train(trained)
        count = sum(map(len, self.recent))
        print_rank_zero(f"{self.FILE}: latent std {std:.4f}, measured on the last {count:,} images")
        super().export(folder, {**weights, "latent_std": torch.tensor(std)}, dtype)

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "scale_images": str(sum(map(len, self.recent)))}

    def _check_size(self, size: int | None) -> None:
        if size is not None and size % self.model.downscale:
            raise UserError(
                f"data.image_size: {size} is no multiple of {self.model.downscale}, the autoencoder's factor"
            )
        if size is not None and self.discriminator is not None and size < self.discriminator.min_size:
            raise UserError(
                f"data.image_size: {size} is too small for discriminator.layers={self.discriminator.layers}, "
                f"which needs {self.discriminator.min_size}"
            )


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio per image, [B], in dB, of images [B, 3, H, W] in [-1, 1]."""
    error = (image - reconstruction.clamp(-1, 1)).square().flatten(1).mean(1)  # [B]
    return 10 * torch.log10(4 / error.clamp_min(1e-10))  # [B]
