"""Importer of CLIP's weights: open_clip's and OpenAI's files, the latter TorchScript archives."""

from torch import Tensor

from ldm_lab.checkpoints.importer import Importer, LoadedPart, Section, register_importer
from ldm_lab.checkpoints.opened import OpenedFile

PREFIXES = ("module.", "model.")  # of DistributedDataParallel, of wrappers around CLIP
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # constants in OpenAI's archives


@register_importer
class OpenCLIP(Importer):
    """A CLIP: a safetensors file, a state dict, a checkpoint of open_clip's training, one of OpenAI's archives."""

    kind = "clip"
    title = "a CLIP of open_clip's or OpenAI's"
    parts = {"conditioner": "clip"}
    unsaid = "its architecture; add model=NAME, such as model=ViT-B-32"

    def matches(self, file: OpenedFile) -> bool:
        """Return whether the tensors are named as open_clip or OpenAI name those of a CLIP."""
        prefixes = [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in file.tensors)]
        inner = [name.removeprefix(prefixes[0]) if prefixes else name for name in file.tensors]
        return any(name.startswith("visual.") for name in inner)

    def read(self, file: OpenedFile, role: str) -> LoadedPart:
        """Return the tensors under open_clip's names; nothing of the architecture, which the file does not say."""
        state: dict[str, Tensor] = file.read()
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
        state = {name: value for name, value in state.items() if name not in NOT_WEIGHTS}
        return LoadedPart(state, Section(name="clip"))
