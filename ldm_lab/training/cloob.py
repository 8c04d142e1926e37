"""Training CLOOB's towers on pairs of images and captions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_lab.batch import Batch
from ldm_lab.config import register
from ldm_lab.errors import UserError
from ldm_lab.training.infoloob import CLOOBLoss, gather_rows
from ldm_lab.training.part_task import PartTask


@register("task", "cloob")
class CLOOBTask(PartTask):
    """Train an image and a text tower so that the embeddings of a pair meet: a conditioner for image-only diffusion."""

    ROLES = ("conditioner", "loss")
    REQUIRED = ("data", "conditioner")
    NETWORK = ("conditioner",)
    PART, FILE, LOSS = "conditioner", "cloob.safetensors", CLOOBLoss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        image = self.model.encode_image(batch.image).float()  # [B, D]
        tokens = self.model.tokenize(required_captions(batch)).to(self.device, non_blocking=True)  # [B, text_size]
        text = F.normalize(self.model.encode_tokens(tokens).float(), dim=-1)  # [B, D]
        image, text = gather_rows(image), gather_rows(text)  # [N, D] each, the rows of all ranks
        if len(image) < 2:
            raise UserError("data.batch_size: InfoLOOB compares pairs with each other and needs at least 2")
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(image, text)  # []
        self.log_means({"loss": loss, **agreement(image.detach(), text.detach()), **self.temperature()}, len(image))
        return loss

    def temperature(self) -> dict[str, Tensor]:
        """Return the inverse temperature for the log, if it is learned."""
        return {"inv_tau": self.loss.inv_tau} if self.loss.log_inv_tau.requires_grad else {}

    def after_optimizer_step(self, steps_done: int) -> None:
        super().after_optimizer_step(steps_done)
        self.loss.clamp()


def required_captions(batch: Batch) -> list[str]:
    """Return the captions of a batch. Raises UserError where a sample has none."""
    for key, text in zip(batch.key, batch.text):
        if not text.strip():
            raise UserError(f"data: {key} has no caption; data.require_text=true leaves such samples out")
    return batch.text


def agreement(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return scalars that say how well pairs meet, for embeddings [N, D] with unit rows, row i a pair.

    image_to_text, text_to_image: share of rows whose nearest row of the other kind is their own. A batch that holds the
    same caption twice cannot reach 1.
    paired_cosine, unpaired_cosine: mean cosine of a pair, and of an image with another's text.
    gap: distance between the means of both kinds, which diffusion on one and sampling from the other has to bridge
    (Liang et al. 2022, arXiv 2203.02053, section 2).
    """
    cosine = image @ text.T  # [N, N]
    own = torch.arange(len(cosine), device=cosine.device)  # [N]
    paired = cosine.diagonal()  # [N]
    return {
        "image_to_text": (cosine.argmax(1) == own).float().mean(),
        "text_to_image": (cosine.argmax(0) == own).float().mean(),
        "paired_cosine": paired.mean(),
        "unpaired_cosine": (cosine.sum() - paired.sum()) / (cosine.numel() - len(cosine)),
        "gap": (image.mean(0) - text.mean(0)).norm(),
    }
