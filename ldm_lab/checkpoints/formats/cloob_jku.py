"""Importer of the CLOOB models of the paper's authors (ml-jku/cloob): checkpoints of their training.

Their towers are those of OpenAI's CLIP, a ResNet or a transformer of patches and a causal transformer of tokens, with
the text tower in a module of its own. So `clip` runs them; the retrieval of Hopfield networks is in the loss alone.
"""

import math

from torch import Tensor

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile, Shapes
from ldm_lab.errors import UserError

TEXT = "transformer."  # before the text tower's names
SCALES = ("logit_inv_tau", "logit_scale_hopfield")  # of the loss
HEAD_WIDTH = 64  # of all their models' layers
STRIDE = 32  # pixels per side of what the ResNet's last layer sees


@register_importer
class JkuCLOOB(Importer):
    """A checkpoint with `state_dict`, whose towers are `visual` and `transformer`."""

    kind = "cloob_jku"
    title = "a CLOOB of ml-jku's"
    parts = {"conditioner": "clip"}
    precedence = 1  # before CLIP's own, whose names its are like

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the text tower's tensors are in a module of its own, beside the image tower's."""
        return f"{TEXT}token_embedding.weight" in file.tensors and "visual.conv1.weight" in file.tensors

    def infer_config(self, tensors: Shapes) -> Section:
        """Return open_clip's description of the towers, which the shapes tell."""
        return Section(architecture=architecture(tensors))

    def facts(self, file: OpenedFile) -> Section:
        """Return how many epochs it was trained."""
        epoch = file.extra.get("epoch")
        return Section(epoch=epoch if isinstance(epoch, int) else None)

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the tensors under OpenAI's names, with what describes the towers."""
        try:
            options = self.infer_config(file.tensors)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{file.path}: not a complete CLOOB ({error} is missing or misshapen)") from None
        state: dict[str, Tensor] = {name.removeprefix(TEXT): value for name, value in file.read().items()}
        scale = state[SCALES[0]] if SCALES[0] in state else state["text_projection"].new_zeros(())  # []
        state = {name: value for name, value in state.items() if name not in SCALES}
        return LoadedPart(state | {"logit_scale": scale}, Section(name="clip", **options))


def architecture(tensors: Shapes) -> Section:
    """Return what an `open_clip_config.json` says under `model_cfg`."""
    width, embed_dim = tensors[f"{TEXT}text_projection"].shape
    context_length, _ = tensors[f"{TEXT}positional_embedding"].shape
    text = Section(
        context_length=context_length,
        vocab_size=tensors[f"{TEXT}token_embedding.weight"].shape[0],
        width=width,
        heads=max(1, width // HEAD_WIDTH),
        layers=_count(tensors, f"{TEXT}transformer.resblocks."),
    )
    return Section(embed_dim=embed_dim, quick_gelu=True, vision_cfg=_vision(tensors), text_cfg=text)


def _vision(tensors: Shapes) -> Section:
    """Return the image tower's part of it."""
    if "visual.proj" in tensors:
        width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
        side = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
        layers = _count(tensors, "visual.transformer.resblocks.")
        return Section(image_size=side * patch_size, patch_size=patch_size, width=width, layers=layers)
    side = math.isqrt(tensors["visual.attnpool.positional_embedding"].shape[0] - 1)
    return Section(
        image_size=side * STRIDE,
        width=tensors["visual.layer1.0.conv1.weight"].shape[0],
        layers=[_count(tensors, f"visual.layer{level}.") for level in (1, 2, 3, 4)],
    )


def _count(tensors: Shapes, prefix: str) -> int:
    """Return how many numbers follow a prefix of names. Raises KeyError if there is none."""
    count = len({name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)})
    if not count:
        raise KeyError(prefix)
    return count
