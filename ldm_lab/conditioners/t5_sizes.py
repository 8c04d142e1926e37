"""How many parameters the encoders of language models have, known without their weights, and without building them."""

from dataclasses import dataclass
from pathlib import Path

from ldm_lab.conditioners.t5_models import local_folder
from ldm_lab.io.json_files import Fields, read_json

BUCKETS = 32  # of the distances that T5's attention knows
T5_KINDS = ("t5", "mt5", "umt5")


@dataclass(frozen=True)
class Shape:
    """What the size of a T5's encoder follows from.

    Attributes:
        vocabulary: tokens.
        width: of a state.
        inner: width between the two layers of a block's second half.
        layers: blocks.
        heads: of attention, of `head_width` each.
        gated: whether the first of those two layers stands there twice, as in v1.1.
        biases: blocks that have a table of distances of their own: the first, or all.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    gated: bool = True
    head_width: int = 64
    biases: int = 1

    @property
    def parameters(self) -> int:
        """Those of the encoder (Raffel et al. 2019, arXiv 1910.10683, section 2.1; Shazeer 2020, arXiv 2002.05202)."""
        attention = 4 * self.width * self.heads * self.head_width
        feed_forward = (3 if self.gated else 2) * self.width * self.inner
        norms = 2 * self.width
        blocks = self.layers * (attention + feed_forward + norms) + self.biases * BUCKETS * self.heads
        return self.vocabulary * self.width + blocks + self.width


V1_1 = {
    "small": Shape(32128, 512, 1024, 8, 6),
    "base": Shape(32128, 768, 2048, 12, 12),
    "large": Shape(32128, 1024, 2816, 24, 16),
    "xl": Shape(32128, 2048, 5120, 24, 32),
    "xxl": Shape(32128, 4096, 10240, 24, 64),
}
PUBLISHED = {
    **{f"google/{kind}-{size}": shape for kind in ("t5-v1_1", "flan-t5") for size, shape in V1_1.items()},
    "DeepFloyd/t5-v1_1-xxl": V1_1["xxl"],
    "google/byt5-small": Shape(384, 1472, 3584, 12, 6),
    "google/byt5-base": Shape(384, 1536, 3968, 18, 12),
    "google/byt5-large": Shape(384, 1536, 3840, 36, 16),
    "google/byt5-xl": Shape(384, 2560, 6720, 36, 32),
    "google-t5/t5-small": Shape(32128, 512, 2048, 6, 8, gated=False),
    "google-t5/t5-base": Shape(32128, 768, 3072, 12, 12, gated=False),
    "google-t5/t5-large": Shape(32128, 1024, 4096, 24, 16, gated=False),
}


def encoder_parameters(model: str) -> int | None:
    """Return how many parameters the encoder of a model has; None of one that is neither known nor here.

    Raises:
        UserError: no such folder, or one with a model of another kind.
    """
    if model in PUBLISHED:
        return PUBLISHED[model].parameters
    folder = local_folder(model)
    return None if folder is None else parameters_in(folder)


def parameters_in(folder: Path) -> int | None:
    """Return how many parameters the encoder in a folder has, as its config says; None where it does not."""
    config = Fields(read_json(folder / "config.json"))
    kind = config.text("model_type")
    names = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv")
    if kind in T5_KINDS:
        found = [config.count(name) for name in names]
        numbers = [number for number in found if number is not None]
        if len(numbers) < len(names):
            return None
        vocabulary, width, inner, layers, heads, head_width = numbers
        gated = (config.text("feed_forward_proj") or "relu").startswith("gated")
        biases = layers if kind == "umt5" else 1
        return Shape(vocabulary, width, inner, layers, heads, gated, head_width, biases).parameters
    return _bert(config) if kind == "bert" else None


def _bert(config: Fields) -> int | None:
    """Return the parameters of a BERT without its pooler (Devlin et al. 2018, arXiv 1810.04805)."""
    names = ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size", "intermediate_size")
    numbers = [number for name in (*names, "num_hidden_layers") if (number := config.count(name)) is not None]
    if len(numbers) < len(names) + 1:
        return None
    vocabulary, places, types, width, inner, layers = numbers
    norm = 2 * width
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * norm
    return (vocabulary + places + types) * width + norm + layers * block
