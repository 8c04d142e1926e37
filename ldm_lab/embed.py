"""A frozen CLIP (or CLOOB) that embeds images and captions: once for every score that is made of the embeddings."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.checkpoints.embedders import describe, embedder_of
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.parts import has_weights, load_part
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.config import PartConfig, check_section, part_class, parts
from ldm_lab.config.overrides import values
from ldm_lab.errors import UserError

Prepare = Callable[[Image.Image], Tensor]


class Encoder(nn.Module):
    """Embeddings of images and texts by a conditioner.

    Attributes:
        embed_dim: D, the width of an embedding.
        embedder: whose embeddings these are (`ldm_lab.checkpoints.embedders`).
    """

    def __init__(self, config: PartConfig) -> None:
        """Load a conditioner (`clip_config` reads its section off a command line).

        Raises:
            UserError: no weights, or what `load_part` raises.
        """
        super().__init__()
        if not has_weights("conditioner", config):
            raise UserError("clip.weights: has to be given, a file with trained weights")
        self.embedder = embedder_of(config)
        self.conditioner: EmbeddingConditioner = load_part("conditioner", config, draws=False)
        self.embed_dim = self.conditioner.embed_dim

    @property
    def prepare(self) -> Prepare:
        """The function from a Pillow image of any mode to what `images` takes; it can be sent to other processes."""
        return self.conditioner.image_transform

    def images(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of prepared images [B, 3, S, S], float32 [B, D], unit rows."""
        return F.normalize(self.conditioner.encode_pixels(pixels).float(), dim=-1)  # [B, D]

    def texts(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, float32 [n, D], unit rows; too long ones are cut, as in training."""
        tokens = self.conditioner.tokenize(texts).to(self.conditioner.device)  # [n, L]
        return F.normalize(self.conditioner.encode_tokens(tokens).float(), dim=-1)  # [n, D]


def clip_config(words: list[str], embedder: dict[str, str] | None) -> PartConfig:
    """Return the checked section of a conditioner: `key=value` words laid over the embedder that a head asks for.

    Args:
        words: such as ["weights=ViT-L-14.pt"] or ["model=ViT-B-32", "pretrained=laion2b_s34b_b79k"].
        embedder: of the heads; None if there is none.

    Raises:
        UserError: a word without a value, no word and no head, or what is wrong with the section.
    """
    try:
        written = values(words, "model=ViT-L-14-quickgelu")
    except UserError as error:
        raise UserError(f"--clip: {error}") from None
    named = {key: text for key, text in (embedder or {}).items() if key != "sha256"}
    whole = any(key in written for key in ("name", "model", "architecture"))  # then another one is meant altogether
    if not whole and isinstance(written.get("weights"), str):
        importer = detect_format(written["weights"]).importer  # a file may say itself what it is
        whole = importer.kind == "part" or ("conditioner" in importer.parts and not importer.unsaid)
        written = {**({"name": importer.parts["conditioner"]} if "conditioner" in importer.parts else {}), **written}
    section = written if whole else {**named, **written}
    if not section.get("model") and not whole:
        whose = f"the head belongs to {describe(embedder)}" if embedder else "no head says which"
        raise UserError(f"--clip: has to be given, as {whose}: weights=FILE, or model=NAME pretrained=NAME")
    section = {"name": "clip", **section}
    problems = check_section("conditioner", section, "clip")
    if problems:
        raise UserError(f"--clip: {problems[0]}")
    if not issubclass(part_class("conditioner", section), EmbeddingConditioner):
        known = [name for name, cls in sorted(parts("conditioner").items()) if issubclass(cls, EmbeddingConditioner)]
        raise UserError(f"--clip: clip.name: {' or '.join(known)} is needed, not {section['name']!r}")
    return PartConfig.from_dict("conditioner", section)
