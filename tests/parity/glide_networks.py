"""GLIDE's networks with a recorded case's weights in them, read out of files laid out as released ones."""

from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.checkpoints.formats import glide
from ldm_lab.checkpoints.opened import open_weights
from ldm_lab.checkpoints.parts import load_strictly
from ldm_lab.denoisers.glide_unet import GlideUNet


def glide_network(weights: dict[str, Tensor], config: dict, folder: Path) -> GlideUNet:
    """Return a network in evaluation mode; `config` is the original's, for what no shape tells."""
    torch.save(weights, folder / "released.pt")
    unsaid = {"head_width": config["num_head_channels"], "text_heads": config["xf_heads"]}
    state, sizes, shape = glide.unet(open_weights(folder / "released.pt").read(), folder / "released.pt", unsaid)
    net = GlideUNet(*shape, **sizes).eval()
    load_strictly(net, state, "released.pt")
    return net
