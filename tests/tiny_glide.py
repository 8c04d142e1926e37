"""Tiny GLIDE models with random weights: base and upsampler, with and without inpainting."""

from pathlib import Path

import torch

from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import build
from ldm_lab.sampling import Sampler

SIDE, FACTOR = 16, 2
TEXT = {"name": "glide_text", "vocabulary": "clip", "vocab_size": 600, "text_size": 6}
UNET = {
    "name": "glide_unet", "base_channels": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention": [2],
    "head_width": 16, "text_size": 6, "text_width": 16, "text_layers": 1, "text_heads": 2, "timesteps": 100,
}  # fmt: skip


def config(super_res: bool = False, inpaint: bool = False, dropout: float = 0.2) -> dict:
    """Return the config of one of the forms."""
    betas = "linear" if super_res else "squaredcos_cap_v2"
    return {
        "autoencoder": {"name": "identity"},
        "conditioner": {**TEXT, "dropout": dropout},
        "denoiser": {**UNET, "super_res": super_res, "inpaint": inpaint},
        "objective": {"name": "eps_hybrid", "betas": betas, "timesteps": 100},
        **({"low_res": {"factor": FACTOR}} if super_res else {}),
    }


def network(form: dict, seed: int = 0) -> torch.nn.Module:
    """Return the denoiser of a config, with weights that let every input be seen in its output."""
    torch.manual_seed(seed)
    net = build("denoiser", form["denoiser"], 3, TEXT["vocab_size"])
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net.eval().requires_grad_(False)


def sampler(**form: bool) -> Sampler:
    """Return one of the forms as a Sampler."""
    whole = config(**form)
    side = SIDE * FACTOR if form.get("super_res") else SIDE
    return Sampler(
        network(whole),
        build("objective", whole["objective"]),
        build("autoencoder", whole["autoencoder"]),
        build("conditioner", TEXT),
        dropout=whole["conditioner"]["dropout"],
        size=(side, side),
        factor=FACTOR,
    )


def write(path: Path, **form: bool) -> Path:
    """Write one of the forms as a run's `ema.safetensors`."""
    whole = config(**form)
    side = SIDE * FACTOR if form.get("super_res") else SIDE
    save_model(path, network(whole).state_dict(), whole, {"image_size": str(side)})
    return path
