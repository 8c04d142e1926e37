"""A batch of samples, as the loader hands it to training, encoding and scoring."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.errors import UserError


@dataclass
class ReaderState:
    """Where a reader of the data stands after a batch, and what it read since the one before. Plain values.

    Attributes:
        position: `ldm_lab.data.shares.Stretch`: what is left of the stretch that it is in.
        behind: how many further stretches are left before its next whole epoch.
        reader: which of the rank's readers, one in each loader process.
        read: samples, the skipped and filtered ones included.
        skipped: reason -> samples that could not be used.
        filtered: rule -> samples that a rule of the user's leaves out.
        examples: reason or rule -> the first few keys.
        judged: samples that rules have looked at, those ahead in the shuffle buffer included.
        captions: where captions came from, or why they cannot be read -> samples.
    """

    position: tuple[int, int, int, int, int, int]
    behind: int = 0
    reader: int = 0
    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    judged: int = 0
    captions: dict[str, int] = field(default_factory=dict)


@dataclass
class Batch:
    """Samples as training gets them. A cache gives `mean` and `logvar` in place of `image`, and the conditions.

    Attributes:
        key: of each sample.
        text: captions; "" where there is none.
        image: [B, 3, H, W] in [-1, 1] (uint8 until it is on the device), or None.
        mean, logvar: of the posterior of the autoencoder's raw latents, [B, C, h, w] each, or None.
        conditions: what the conditioner gave when the cache was made; empty without a cache.
        state: where the reader stands after this batch, for `DataModule.consumed`.
    """

    key: list[str]
    text: list[str]
    image: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    conditions: Conditions = field(default_factory=dict)
    state: ReaderState | None = None

    def __len__(self) -> int:
        return len(self.key)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device; pinned ones are copied while this process goes on."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch with its tensors in memory that a GPU reads by itself; DataLoader calls it by this name."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        image, mean, logvar = (None if t is None else change(t) for t in (self.image, self.mean, self.logvar))
        conditions = {name: change(tensor) for name, tensor in self.conditions.items()}
        return replace(self, image=image, mean=mean, logvar=logvar, conditions=conditions)

    def require_image(self, purpose: str) -> Tensor:
        """Return the images, [B, 3, H, W]. Raises UserError "images are needed to {purpose}" for a cached batch."""
        if self.image is None:
            raise UserError(f"data: images are needed to {purpose}, and a cache holds none")
        return self.image
