"""Files that people have beside models, and take for them: named, and read by no program here."""

import re
from typing import ClassVar

from ldm_lab.checkpoints.importer import Importer, register_importer
from ldm_lab.checkpoints.opened import OpenedFile

NOBODY = "no program here"


class NoNetwork(Importer):
    """Tensors that are no network.

    Attributes:
        names: what the name of a tensor has in it, in such a file alone.
    """

    used_by = NOBODY
    precedence = 3  # a part of the names may be those of a network
    names: ClassVar[re.Pattern[str]]

    def matches(self, file: OpenedFile) -> bool:
        """Return whether a tensor's name tells it."""
        return any(self.names.search(name) for name in file.tensors)


@register_importer
class Adapter(NoNetwork):
    """LoRA and its kin, of kohya's, diffusers' and peft's forms."""

    kind = "adapter"
    title = "a LoRA or another adapter: changes to a network, not the network; merge them into it first"
    names = re.compile(
        r"[._]lora[._](down|up|mid|[ABab])\b|\.lora_(A|B|down|up|magnitude_vector|embedding_[AB])\b"
        r"|\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_(blocks|diag)|dora_scale|diff_b)$"
    )


@register_importer
class Quantized(NoNetwork):
    """Weights in 8 or 4 bits, with the scales that undo it beside them."""

    kind = "quantized"
    title = "weights that were quantized (bitsandbytes, GPTQ, scaled float8); those that they were made of are needed"
    names = re.compile(
        r"\.(absmax|quant_map|nested_absmax|SCB|qweight|qzeros|g_idx|scale_weight|weight_scale(_2|_inv)?)$"
        r"|\.quant_state\.|^scaled_fp8$"
    )


@register_importer
class TextualInversion(NoNetwork):
    """Embeddings of new words: of the web UI's, diffusers' and Stable Diffusion XL's forms."""

    kind = "textual_inversion"
    title = "a textual inversion: embeddings of new words for Stable Diffusion's text encoder, no network"
    names = re.compile(r"^(\*|emb_params|clip_[lg]|t5xxl|<.+>)$")

    def matches(self, file: OpenedFile) -> bool:
        """Return whether all names are those of words, or of the encoders that they are for."""
        words = all(self.names.search(name) and len(info.shape) in (1, 2) for name, info in file.tensors.items())
        return bool(file.tensors) and words
