"""Tiny GLIDE models with random weights: base and upsampler, with and without inpainting."""

from pathlib import Path

import torch

from ldm_lab.checkpoints.native import save_model
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.conditions import ConditionSpec, Embedding, ImageCondition, TokenIds
from ldm_lab.config import build
from ldm_lab.sampling import Model, Pipeline

SIDE, FACTOR = 16, 2
TEXT = {"name": "glide_text", "vocabulary": "clip", "vocab_size": 600, "text_size": 6}
UNET = {
    "name": "glide_unet", "base_channels": 32, "multipliers": [1, 1], "blocks_per_level": 1, "attention": [2],
    "head_width": 16, "text_width": 16, "text_layers": 1, "text_heads": 2,
}  # fmt: skip


def conditions(
    vocabulary: int = TEXT["vocab_size"],
    length: int = TEXT["text_size"],
    *,
    upsampler: bool = False,
    inpaint: bool = False,
    clip_width: int | None = None,
    scale_factor: int = FACTOR,
    channels: int = 3,
) -> ConditionSpec:
    """Return what one of the forms takes."""
    taken = {"token_ids": TokenIds(length, vocabulary)}
    if upsampler:
        taken["low_res"] = ImageCondition(3, scale_factor)
    if inpaint:
        taken |= {"inpaint_image": ImageCondition(channels), "inpaint_mask": ImageCondition(1)}
    return {**taken, **({"clip_embed": Embedding(clip_width, optional=True)} if clip_width else {})}


def config(upsampler: bool = False, inpaint: bool = False, dropout: float = 0.2) -> dict:
    """Return the config of one of the forms."""
    betas = "linear" if upsampler else "squaredcos_cap_v2"
    sources = {
        **({"low_res": {"scale_factor": FACTOR}} if upsampler else {}),
        **({"inpaint": {}} if inpaint else {}),
    }
    return {
        "autoencoder": {"name": "identity"},
        "conditioner": {**TEXT, "dropout": dropout},
        "condition_sources": sources,
        "denoiser": UNET,
        "objective": {"name": "eps_hybrid", "betas": betas, "timesteps": 100},
    }


def network(form: dict, seed: int = 0) -> torch.nn.Module:
    """Return the denoiser of a config, with weights that let every input be seen in its output."""
    torch.manual_seed(seed)
    given = given_conditions(build("conditioner", TEXT), build_sources(form["condition_sources"]))
    net = build("denoiser", form["denoiser"], 3, given)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return net.eval().requires_grad_(False)


def pipeline(**form: bool) -> Pipeline:
    """Return one of the forms as a pipeline."""
    whole = config(**form)
    side = SIDE * FACTOR if form.get("upsampler") else SIDE
    model = Model(
        network(whole),
        build("objective", whole["objective"]),
        build("autoencoder", whole["autoencoder"]),
        build("conditioner", TEXT),
        build_sources(whole["condition_sources"]),
        dropout=whole["conditioner"]["dropout"],
        image_size=(side, side),
    )
    return Pipeline(model)


def write(path: Path, *, side: int | None = None, **form: bool) -> Path:
    """Write one of the forms as a run's `ema.safetensors`, trained at `side` pixels."""
    whole = config(**form)
    side = side or (SIDE * FACTOR if form.get("upsampler") else SIDE)
    save_model(path, network(whole).state_dict(), whole, {"image_size": str(side)})
    return path
