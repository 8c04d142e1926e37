"""What ComfyUI can load of a shared model, as its source says (comfy/sd.py: `VAE`, and no loader of these networks).

It tells networks by names and shapes of their tensors. An autoencoder goes by those of Stable Diffusion's own, which
are those of `kl_f8`'s default size; whatever else a file holds is left over, and nothing of it is scaled as we do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from ldm_lab.autoencoders.kl_f8 import KLAutoencoder


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a safetensors file, by name."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def is_usual_vae(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether tensors of these shapes, by name, are an autoencoder that "Load VAE" reads."""
    with torch.device("meta"):
        usual = {name: list(its.shape) for name, its in KLAutoencoder().state_dict().items() if its.ndim}
    return all(list(shapes.get(name, ())) == shape for name, shape in usual.items())


def told(file: Path | None) -> str:
    """Return what ComfyUI can do with a shared model, in a sentence; `file`: of its autoencoder, None without one."""
    if file is None or not is_usual_vae(shapes_in(file)):
        return "ComfyUI loads none of these files: it has no node for networks of these kinds and sizes."
    return (
        f'ComfyUI loads `{file.name}` alone, with its node "Load VAE", and scales latents otherwise than this model; '
        "it has no node for the other networks."
    )
