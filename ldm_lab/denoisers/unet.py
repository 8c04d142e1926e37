"""What U-Nets of several levels have in common: sizes that the levels divide, blocks that are computed once more."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser


class UNet(Denoiser):
    """A denoiser of levels, each at half the size of the one above.

    Attributes:
        checkpointing: none of a block's inner results is kept for the backward pass.
        text_modules: beginnings of the names of what reads a text.
    """

    checkpointing: bool = False
    text_modules: ClassVar[tuple[str, ...]] = ()

    def freeze_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what reads the text, as `text`, and all else, as `unet`."""
        text = [p for name, p in self.named_parameters() if name.startswith(self.text_modules)]
        unet = [p for name, p in self.named_parameters() if not name.startswith(self.text_modules)]
        return {"text": text, "unet": unet}

    def run(self, block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Return what a block makes of its inputs; with gradient checkpointing it is computed once more going back.

        What is random in it is the same again, from the saved generator.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def check_size(x: Tensor, multiple_of: int) -> None:
    """Raise UserError for noised images or latents [B, C, h, w] whose size the levels do not divide."""
    height, width = x.shape[2:]
    if height % multiple_of or width % multiple_of:
        raise UserError(
            f"height and width of what is denoised have to be multiples of {multiple_of}, not {height}x{width}"
        )


def per_level(numbers: Sequence[int], levels: int) -> list[int]:
    """Return one number for each level; one alone is that of all."""
    return [*numbers] * (levels if len(numbers) == 1 else 1)


def per_level_problems(key: str, numbers: Sequence[int], levels: int) -> list[str]:
    """Return what is wrong with an option that has one number for all levels, or one for each."""
    if len(numbers) in (1, levels):
        return []
    return [f"{key}: {len(numbers)} numbers for {levels} levels; give one, or all"]
