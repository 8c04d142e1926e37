"""How like its prompt a picture is: by a CLIP that is named, or by the conditioner of a model that is compared."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.errors import UserError
from ldm_lab.sampling.options import ModelOptions

if TYPE_CHECKING:  # these import torch, which takes seconds
    from PIL import Image

    from ldm_lab.prompts import Prompt

Similarity = Callable[["Image.Image", "Prompt"], float]  # the cosine, -1 to 1, times `Prompt.direction`


def by_clip(words: list[str], device: str | None) -> tuple[str, Similarity]:
    """Return in words which CLIP it is, and the function. Raises UserError if it cannot be loaded.

    Args:
        words: `key=value`, as for `ldm_lab.embed.clip_config`.
        device: where it runs; None takes the accelerator, if there is one.
    """
    import torch

    from ldm_lab.checkpoints.embedders import describe
    from ldm_lab.devices import pick_device
    from ldm_lab.embed import Encoder, clip_config

    encoder = Encoder(clip_config(words, None)).to(pick_device(device))

    @torch.no_grad()
    def similarity(image: "Image.Image", prompt: "Prompt") -> float:
        pixels = encoder.prepare(image)[None].to(encoder.conditioner.device)  # [1, 3, S, S]
        cosine = (encoder.images(pixels) * encoder.texts([prompt.text])).sum()
        return float(cosine) * prompt.direction

    return describe(encoder.embedder), similarity


def by_conditioner(checkpoint: str | Path, loading: ModelOptions) -> Similarity:
    """Return the similarity by the conditioner of a model that has embeddings of images and texts."""
    from ldm_lab.sampling import rerank
    from ldm_lab.sampling.loading import load_model
    from ldm_lab.sampling.prompts import PromptBatch

    model = load_model(checkpoint, loading)
    if model.embed_width is None:
        raise UserError(f"{checkpoint}: its conditioner has no embeddings of images and texts")

    def similarity(image: "Image.Image", prompt: "Prompt") -> float:
        batch = PromptBatch.encode(model, [[prompt]], guidance=1.0, negative=None, aesthetic=None)
        embeds = batch.conditions["embed"][batch.index[0]]  # [1, D]
        return rerank.similarity(model, image, embeds, batch.weights[0])

    return similarity
