"""Networks that the processes of a run share: their blocks, the shares, and what comes out of training them so."""

import pytest
import torch
from tiny import DENOISER, embedding
from tiny_glide import UNET, conditions

from ldm_lab.config import build


@pytest.mark.parametrize(("section", "given"), [(DENOISER, embedding(16)), (UNET, conditions())])
def test_blocks_hold_nearly_all_of_a_network_and_none_holds_another(section, given):
    with torch.device("meta"):
        net = build("denoiser", section, 4, given)
    blocks = net.block_modules()
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len({*held}), "no parameter is in two blocks"
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.7 * sum(
        p.numel() for p in net.parameters()
    )
