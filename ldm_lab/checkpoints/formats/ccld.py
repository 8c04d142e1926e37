"""Importer of JD-P/cloob-latent-diffusion: the U-Nets in its sampling and training checkpoints, and the CLOOB in the
latter."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm_lab.checkpoints.formats import cloob_pickle, compvis
from ldm_lab.checkpoints.importer import (
    DenoiserShape,
    Importer,
    LoadedDenoiser,
    LoadedModel,
    LoadedPart,
    Section,
    register_importer,
)
from ldm_lab.checkpoints.opened import OpenedFile, Shapes, TensorInfo
from ldm_lab.checkpoints.third_party import strip_prefix
from ldm_lab.conditions import Embedding
from ldm_lab.errors import UserError

MAPPING_FEATURES, PIXEL_FEATURES = 128, 16  # Fourier features of t beside the embedding, and beside the latent
FIRST = "net.0.main.0.weight"
RAW, AVERAGED = "model.", "model_ema."  # prefixes in a training checkpoint
FROZEN = {"autoencoder": "ae_model.", "conditioner": "cloob."}  # role -> prefix there
IMAGE_SIZE, DROPOUT = 256, 0.2  # fixed in the original's programs


def unet(tensors: dict[str, Tensor], path: str | Path, ema: bool = True) -> LoadedDenoiser:
    """Return a CCLD U-Net: the tensors that `CCLDUNet` loads strictly, and its options read off the shapes.

    But for `head_width`, of which nothing else than 64 was ever used.

    Args:
        tensors: a flat state dict (what the original samples from), or that of a Lightning checkpoint of its training.
        path: where they are from, for messages.
        ema: of a training checkpoint, take the averaged weights (`model_ema.`); else the raw ones (`model.`).

    Raises:
        UserError: not such a U-Net.
    """
    wanted = AVERAGED if ema else RAW
    if FIRST in tensors:
        state = dict(tensors)
    elif wanted + FIRST in tensors:
        state = strip_prefix(tensors, wanted)
    else:
        raise UserError(f"{path}: not a CCLD U-Net: neither {FIRST!r} nor {wanted + FIRST!r} is in it")
    state.pop("autoencoder_scale", None)
    try:
        options = infer_config(state)
        channels = state[FIRST].shape[1] - PIXEL_FEATURES
        embed_dim = state["mapping.0.main.0.weight"].shape[1] - MAPPING_FEATURES
        if channels < 1 or embed_dim < 1:
            raise ValueError(f"{FIRST} or mapping.0.main.0.weight")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not a complete CCLD U-Net ({error} is missing or misshapen)") from None
    return LoadedDenoiser(state, options, DenoiserShape(channels, {"embed": Embedding(embed_dim)}))


def latent_std(tensors: dict[str, Tensor], path: str | Path) -> float | None:
    """Return that of the autoencoder with which a U-Net was trained; None if the file does not say it."""
    scale = tensors.get("autoencoder_scale", tensors.get("scale_factor"))
    if scale is not None and scale.numel() != 1:
        raise UserError(f"{path}: its autoencoder_scale is no number but a tensor of {list(scale.shape)}")
    return None if scale is None else float(scale)


def model(tensors: dict[str, Tensor], path: str | Path, ema: bool = True) -> LoadedModel:
    """Return the model in a CCLD checkpoint.

    A sampling checkpoint does not say what its autoencoder and its CLOOB were: these sections lack `weights`. A
    training checkpoint holds both, so that their `weights` are the file itself.
    """
    state, options, _ = unet(tensors, path, ema)
    within = {role: any(n.startswith(prefix) for n in tensors) for role, prefix in FROZEN.items()}
    weights = {role: {"weights": str(path)} if there else {} for role, there in within.items()}
    std = latent_std(tensors, path)
    latents = {} if std is None else {"latent_std": std}
    config = {
        "task": "diffusion",
        "autoencoder": {"name": "kl_f8", **weights["autoencoder"], **latents},
        "conditioner": {"name": "cloob", **weights["conditioner"], "dropout": DROPOUT},
        "denoiser": {"name": "ccld_unet", **options},
        "objective": {"name": "v_cosine"},
    }
    return LoadedModel(Section(config), state, {"image_size": str(IMAGE_SIZE)})


def cloob(tensors: dict[str, Tensor], path: str | Path) -> LoadedPart:
    """Return the CLOOB inside a training checkpoint. Raises UserError if there is no whole one."""
    state = strip_prefix(tensors, FROZEN["conditioner"])
    try:
        return LoadedPart(state, Section(name="cloob", **cloob_pickle.infer_config(state)))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: no complete CLOOB in it ({error} is missing or misshapen)") from None


def infer_config(state: Shapes) -> Section:
    """Return the keyword arguments of `CCLDUNet` that follow from the shapes.

    Only the products of base_channels and multipliers are in a file; 4 is divided out, as the original has it.
    """
    blocks = sum(f"net.{i}.main.4.weight" in state for i in range(_top_entries(state))) // 2
    widths = [state["net.0.main.4.weight"].shape[0]]
    prefix = f"net.{blocks}.main."
    while f"{prefix}1.main.4.weight" in state:
        widths.append(state[f"{prefix}1.main.4.weight"].shape[0])
        prefix += f"{2 * blocks + 1}.main."  # after the pooling and the blocks on the way down
    common = math.gcd(*widths)
    base = common // 4 if common % 4 == 0 else common
    return Section(
        base_channels=base,
        multipliers=[width // base for width in widths],
        blocks_per_level=blocks,
        mapping_width=state["mapping.0.main.0.weight"].shape[0],
    )


def _top_entries(state: Shapes) -> int:
    return 1 + max(
        int(name.split(".")[1]) for name in state if name.startswith("net.") and name.split(".")[1].isdigit()
    )


# ------------------------------------------------------------------------------------------------------- the formats


class _CCLD(Importer):
    """A U-Net of cloob-latent-diffusion."""

    precedence = 1
    holds_model = True

    def read_model(self, file: OpenedFile, ema: bool, overrides: Section) -> LoadedModel:
        """Return the model; nothing of it is left to be said."""
        return model(file.read(), file.path, ema)

    def denoiser_shape(self, file: OpenedFile, ema: bool) -> DenoiserShape:
        """Return channels and conditions."""
        return unet(file.read(), file.path, ema).shape


@register_importer
class CCLDCheckpoint(_CCLD):
    """The flat state dict that the original samples from."""

    kind = "ccld"
    title = "a U-Net of cloob-latent-diffusion"

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as the original names them."""
        return FIRST in file.tensors


@register_importer
class CCLDTraining(_CCLD):
    """A Lightning checkpoint of the original's training, with its autoencoder and its CLOOB."""

    kind = "ccld_training"
    title = "a training checkpoint of cloob-latent-diffusion"
    parts = {"autoencoder": "kl_f8", "conditioner": "cloob"}
    has_average = True

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the U-Net as trained or its average is in it."""
        return AVERAGED + FIRST in file.tensors or RAW + FIRST in file.tensors

    def network(self, file: OpenedFile) -> Mapping[str, TensorInfo]:
        """Return the tensors of the average, or of the U-Net as trained."""
        return strip_prefix(file.tensors, AVERAGED) or strip_prefix(file.tensors, RAW)

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the autoencoder or the CLOOB."""
        if role == "autoencoder":
            return compvis.autoencoder(file)
        return cloob(file.read(), file.path)
