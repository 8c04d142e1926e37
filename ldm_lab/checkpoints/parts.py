"""Frozen parts from their config section: `{name, weights, ...}` -> a module with its weights in place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.files import FORMAT, is_safetensors, read_safetensors, write_safetensors
from ldm_lab.checkpoints.formats import ccld, cloob_pickle, compvis, diffusers_vae, heads, open_clip_weights
from ldm_lab.checkpoints.importer import KINDS, kind_of, part_config
from ldm_lab.config import USE_KEYS, build, check_section, part_class
from ldm_lab.errors import UserError, unknown
from ldm_lab.interfaces import Autoencoder
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained import resolve as pretrained

Reader = Callable[[Path], tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]]
# (role, name) of a part -> kind of file (`formats.KINDS`) -> reader of those released files with its weights in them.
IMPORTERS: dict[tuple[str, str], dict[str, Reader]] = {
    ("autoencoder", "kl_f8"): {
        "compvis": compvis.read,
        "ccld_training": compvis.read,
        "diffusers": diffusers_vae.read,
    },
    ("conditioner", "cloob"): {
        "cloob_pickle": cloob_pickle.read,
        "ccld_training": ccld.read_cloob,
    },
    ("conditioner", "clip"): {"clip": open_clip_weights.read},
    ("head", "linear"): {"linear": heads.read},
    ("head", "mlp"): {"mlp": heads.read},
}


def save_part(
    path: str | Path,
    module: nn.Module,
    section: dict[str, Any],
    extra: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a part's weights with the config that rebuilds it.

    Args:
        path: a `.safetensors` file.
        module: the part; its class is registered.
        section: its config section, of which the keys of its architecture are stored.
        extra: further text metadata, such as what was measured.
        dtype: of the stored weights; float16 halves the file. Single numbers, such as the latent std, stay exact.
    """
    role, name = module.part_role, module.part_name
    architecture = {key: value for key, value in section.items() if key not in ("name", *USE_KEYS.get(role, {}))}
    metadata = {
        "format": FORMAT,
        "role": role,
        "config": json.dumps({"name": name, **architecture}),
        **(extra or {}),
    }
    state = {name: value.to(dtype) if value.ndim else value for name, value in module.state_dict().items()}
    write_safetensors(path, state, metadata)


def load_part(role: str, section: dict[str, Any], read_weights: bool = True) -> nn.Module:
    """Build a frozen part and load its weights: evaluation mode, no gradients.

    Args:
        role: "autoencoder" or "conditioner".
        section: its config section. With `weights`, the file's own architecture is used, and keys given here must
            agree with it. `latent_mean` and `latent_std` (autoencoder) replace the stored ones.
        read_weights: False builds the architecture alone (on the meta device, for counting).

    Raises:
        UserError: missing, damaged or foreign file; weights of another architecture.
    """
    given = {key: value for key, value in section.items() if key not in USE_KEYS[role]}
    path = weights_path(role, section) if read_weights else None
    if path is None:
        module = build(role, given)
    else:
        module, _ = read_module(role, given, path)
    if isinstance(module, Autoencoder):
        module.set_latent_statistics(section.get("latent_mean"), section.get("latent_std"))
    return module.eval().requires_grad_(False)


def read_module(role: str, given: dict[str, Any], path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a part with the weights in a file, and the section with all that the file says of its architecture.

    Args:
        role: "autoencoder" or "conditioner".
        given: its name, and constructor keys that the file does not say, or that have to agree with it.
        path: our own file, or a released one.

    Raises:
        UserError: missing, damaged or foreign file; weights of another architecture.
    """
    state, config = read_part(path, role, given["name"])
    for key, value in given.items():
        if key in config and config[key] != value:
            raise UserError(f"{role}.{key}: {value!r} is asked for, but {path} holds {config[key]!r}")
    section = {**config, **given}
    module = build(role, section)
    load_strictly(module, module.convert_state_dict(state), path)
    return module, section


def weights_path(role: str, section: dict[str, Any]) -> Path | None:
    """Return the file with the weights of a config section, or None if there is none and its part is as initialised.

    A class may know where the weights are published, and download them (`Part.pretrained_path`).

    Raises:
        UserError: no such file, no such part, or the download failed.
    """
    if not section:
        return None
    cls = part_class(role, section)
    if section.get("weights"):
        return find_weights(section["weights"])
    return cls.pretrained_path(section)


def find_weights(name: str | Path) -> Path:
    """Return the path of weights: a file, a released name, or an hf:// address (`resolve_weights`).

    A folder of diffusers' stands for the file with the weights in it.
    """
    path = pretrained.resolve_weights(name, "weights")
    return diffusers_vae.find(path) if path.is_dir() else path


def read_part(path: Path, role: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return `(state_dict, config)` of a part from our own file or, by the importer of its name, a released one."""
    if is_safetensors(path):
        state, metadata = read_safetensors(path)
        if metadata.get("format") == FORMAT:
            held, config = part_config(path, metadata)
            if held != role:
                raise UserError(f"{path}: holds the weights of the role {held}, not {role}")
            if config.get("name") != name:
                raise UserError(f"{path}: holds the {role} {config.get('name')!r}, but {role}.name is {name!r}")
            problems = check_section(role, config, f"{path}: config")
            if problems:
                raise UserError(problems[0])
            return state, config
    if (role, name) not in IMPORTERS:
        known = [n for r, n in IMPORTERS if r == role]
        raise UserError(f"{path}: not a file of ldm_lab's, and {unknown(f'importer for a {role}', name, known)}")
    readers = IMPORTERS[role, name]
    kind = kind_of(path)
    if kind not in readers:
        readable = " or ".join(KINDS[known] for known in readers)
        raise UserError(f"{path}: not {readable}: it holds {KINDS[kind]}")
    state, config, _ = readers[kind](path)
    return state, {"name": name, **config}


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict, every name and shape as it should be. Raises UserError that names the first differences."""
    check_strictly(module.state_dict(), state, path)
    module.load_state_dict(state, assign=False)


def check_strictly(own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path) -> None:
    """Raise UserError with the first differences in names and shapes between a module's own tensors and a file's."""
    problems = []
    problems += [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not of this architecture" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: weights of another architecture: {'; '.join(problems[:3])}{more}")


def load_fitting(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> list[str]:
    """Load those tensors whose name and shape are the module's, and leave its others as they are.

    Args:
        module: the network.
        state: its weights, or those of a network of the same kind with, say, a wider embedding.
        path: where they are from, for the message.

    Returns:
        What was not loaded, and why, a line each.

    Raises:
        UserError: less than half of the module's numbers would come from the file: it is of another architecture.
    """
    own = module.state_dict()
    fits = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    if sum(value.numel() for value in fits.values()) < 0.5 * sum(value.numel() for value in own.values()):
        load_strictly(module, state, path)  # says what is different
    module.load_state_dict({**own, **fits})
    missing = [f"{name} stays as initialised: the file does not have it" for name in own if name not in state]
    other = [
        f"{name} stays as initialised: {list(state[name].shape)} in the file, {list(own[name].shape)} here"
        for name in own
        if name in state and name not in fits
    ]
    return missing + other + [f"{name} of the file is not of this architecture" for name in state if name not in own]


def weights_sha256(role: str, section: dict[str, Any]) -> str | None:
    """Return the checksum of the file with the weights of a config section (see `weights_path`), None without one."""
    path = weights_path(role, section)
    return None if path is None else sha256(path)
