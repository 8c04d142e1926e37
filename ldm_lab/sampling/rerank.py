"""The best of several pictures, by how like its prompts the conditioner finds each."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.sampling.decode import Sample
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.prompts import PromptBatch


def best(
    model: Model, prompts: PromptBatch, batches: Iterator[list[Sample]], candidates: int
) -> Iterator[list[Sample]]:
    """Return an iterator over the best of every `candidates` pictures in a row, with their similarities.

    Args:
        model: whose conditioner has embeddings of texts and images alike.
        prompts: of the pictures that are kept, in their order.
        batches: of candidates, picture by picture, each batch of any length.
        candidates: of each picture.
    """
    kept: Sample | None = None
    seen = 0
    for batch in batches:
        chosen = []
        for sample in batch:
            i = seen // candidates
            embeds = prompts.conditions["embed"][prompts.index[i]]  # [k, D]
            found = similarity(model, sample.image, embeds, prompts.weights[i])
            sample.image.info["similarity"] = found
            if kept is None or kept.similarity is None or found > kept.similarity:
                kept = replace(sample, similarity=found)
            seen += 1
            if seen % candidates == 0:
                chosen.append(kept)
                kept = None
        if chosen:
            yield chosen


@torch.no_grad()
def similarity(model: Model, image: Image.Image, embeds: Tensor, weights: Tensor) -> float:
    """Return the mean cosine, weighted, of an image's embedding and its prompts', [k, D] with weights [k]."""
    with model.on_device(model.conditioner):
        embed = model.shifted(model.conditioner.from_prompts([], [image]), are_images=True)["embed"]  # [1, D]
    cosine = F.cosine_similarity(embed, embeds.to(embed))  # [k]
    weights = weights.to(cosine)  # [k]
    return float((weights * cosine).sum() / weights.abs().sum().clamp(min=1e-12))
