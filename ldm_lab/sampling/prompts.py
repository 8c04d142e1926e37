"""Weighted prompts, encoded: the conditions of all pictures, which of them each has, and how much they count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.conditions import Conditions
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import null_condition_weight, proportional_weights
from ldm_lab.prompts import Prompt, parse_prompt
from ldm_lab.sampling.aesthetic import Aesthetic
from ldm_lab.sampling.model import Model

# One prompt: `text` or `text:weight`, or as an object. One picture's prompts: one of them, or several to be mixed.
OnePrompt = str | Prompt | Image.Image
PromptMix = OnePrompt | Sequence[OnePrompt]
Prompts = OnePrompt | Sequence[PromptMix]  # of any number of pictures; a prompt by itself is one picture's

NO_PROMPT = "a prompt is a text, a Prompt, a Pillow image, or a list of these, not {}"


def parse_prompts(prompts: Prompts) -> list[list[Prompt]]:
    """Return the prompts of each picture. Raises UserError for a picture without any, or a weight that is not finite.

    Args:
        prompts: one entry for each picture: a text, a `Prompt`, an image, or a list of these that are mixed. A text,
            `Prompt` or image by itself is the prompt of one picture.
    """
    if isinstance(prompts, OnePrompt):
        return [parse_mix(prompts)]
    if isinstance(prompts, bytes | dict) or not isinstance(prompts, Iterable):
        raise UserError(NO_PROMPT.format(type(prompts).__name__))
    return [parse_mix(entry) for entry in prompts]


def parse_mix(entry: PromptMix) -> list[Prompt]:
    """Return the prompts of one picture. Raises UserError for none, or a weight that is not finite."""
    if isinstance(entry, str):
        return [parse_prompt(entry)]
    if isinstance(entry, Prompt):
        return [entry]
    if isinstance(entry, Image.Image):
        return [Prompt("image", image=entry)]
    if not isinstance(entry, list | tuple):
        raise UserError(NO_PROMPT.format(type(entry).__name__))
    if not entry:
        raise UserError("a picture needs at least one prompt")
    return [prompt for part in entry for prompt in parse_mix(part)]


def prompt_weights(mixes: Sequence[Sequence[Prompt]], guidance: float, with_negative: bool = False) -> Tensor:
    """Return the weights of N pictures' prompts, float64 [N, k], 0 where a picture has fewer than k.

    With a negative prompt there is one more column, at the end: what the others leave over.

    Args:
        mixes: the prompts of each picture.
        guidance: weight of those without one.
        with_negative: whether there is a negative prompt.

    Raises:
        UserError: a weight that is not finite.
    """
    rows = [[guidance if prompt.weight is None else prompt.weight for prompt in mix] for mix in mixes]
    longest = max(map(len, rows), default=0)
    weights = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=torch.float64)  # [N, k]
    if not weights.isfinite().all():
        raise UserError("guidance and weights have to be finite numbers")
    if with_negative and rows:
        return torch.cat([weights, null_condition_weight(weights)[:, None]], dim=1)  # [N, k + 1]
    return weights


@dataclass(frozen=True)
class PromptBatch:
    """The encoded prompts of N pictures.

    Attributes:
        conditions: of the U distinct prompts, [U, ...] each.
        index: which of them each picture has, [N, k].
        weights: of a picture's prompts, float64 [N, k], on the CPU; 0 where it has fewer than k.
        null: what stands for no prompt beside each of the U, [U, ...] each.
    """

    conditions: Conditions
    index: Tensor
    weights: Tensor
    null: Conditions

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        model: Model,
        mixes: Sequence[Sequence[Prompt]],
        guidance: float,
        negative: str | None,
        aesthetic: Aesthetic | None,
    ) -> "PromptBatch":
        """Return the prompts of each picture, encoded.

        They are encoded one at a time: an embedding that depended on its neighbors would change the picture. A
        negative prompt is every picture's last one; no aesthetic leads it.
        """
        longest = max(map(len, mixes), default=0)
        # Any prompt, at weight 0, where there is none.
        index = torch.zeros(len(mixes), longest + (negative is not None), dtype=torch.long)  # [N, k]
        encoder = _Encoder(model, aesthetic)
        with model.on_device(model.conditioner):
            for i, mix in enumerate(mixes):
                for j, prompt in enumerate(mix):
                    index[i, j] = encoder.number(prompt, aesthetic is not None)
            if negative is not None and len(mixes):
                index[:, -1] = encoder.number(Prompt(negative), False)
            names = encoder.rows[0] if encoder.rows else ()
            conditions = {name: torch.cat([row[name] for row in encoder.rows]) for name in names}
            null = model.conditioner.null(conditions) if conditions else Conditions()  # it may encode the empty text
        return cls(conditions, index, prompt_weights(mixes, guidance, negative is not None), null)

    def select(self, pictures: Sequence[int], device: torch.device) -> tuple[Conditions, Tensor, Conditions]:
        """Return pictures' prompts, [B, k, ...] each, their weights, [B, k], and no prompt for each, [B, ...] each."""
        chosen = self.index[list(pictures)]  # [B, k]
        rows = {name: value[chosen.to(value.device)].to(device) for name, value in self.conditions.items()}
        null = {name: value[chosen[:, 0].to(value.device)].to(device) for name, value in self.null.items()}
        return rows, self.weights[list(pictures)], null


class _Encoder:
    """Encodes each distinct prompt once and numbers them."""

    def __init__(self, model: Model, aesthetic: Aesthetic | None) -> None:
        self.model, self.aesthetic = model, aesthetic
        self.rows: list[Conditions] = []
        self._numbers: dict[tuple[str, bool] | int, int] = {}

    def number(self, prompt: Prompt, with_aesthetic: bool) -> int:
        """Return the number of a prompt's row, encoding it if it is new."""
        key = (prompt.text, with_aesthetic) if prompt.image is None else id(prompt.image)
        if key not in self._numbers:
            self._numbers[key] = len(self.rows)
            texts, images = ([prompt.text], []) if prompt.image is None else ([], [prompt.image])
            row = self.model.conditioner.from_prompts(texts, images)  # [1, ...]
            if with_aesthetic and texts and self.aesthetic is not None:
                row["embed"] = self.aesthetic.guide(row["embed"])  # [1, D]
            self.rows.append(self.model.shifted(row, are_images=bool(images)))
        return self._numbers[key]


@torch.no_grad()
def target_embeddings(model: Model, mixes: Sequence[Sequence[Prompt]], guidance: float) -> Tensor:
    """Return what CLIP guides each picture toward, [N, D]: its texts' embeddings, in proportion to their weights.

    Raises:
        UserError: a picture without a text that has a weight above 0, a model of latents.
    """
    shares = [_text_shares(mix, guidance) for mix in mixes]
    clip, rows = model.load_noised_clip(), []
    with model.on_device(clip):
        for mix, share in zip(mixes, shares, strict=True):
            embeds = clip.text_embedding([prompt.text for prompt in mix if prompt.image is None])  # [k, D]
            rows.append((share.to(embeds)[:, None] * embeds).sum(0))  # [D]
    return torch.stack(rows)  # [N, D]


def check_target_embeddings(
    model: Model, mixes: Sequence[Sequence[Prompt]], guidance: float, height: int, width: int
) -> None:
    """Check that CLIP guidance has a text for each picture, and that the noised CLIP can see these pictures.

    It was trained on pixels in [-1, 1], of one size.

    Raises:
        UserError: no text, an empty one, latents, other pixels, another size.
    """
    pixel_range = model.autoencoder.pixel_range
    if pixel_range != (-1, 1):
        made = "latents" if pixel_range is None else f"pixels in [{pixel_range[0]:g}, {pixel_range[1]:g}]"
        raise UserError(f"CLIP guidance: the noised CLIP reads pixels in [-1, 1], and this model makes {made}")
    if model.noised_clip is not None:
        model.noised_clip.check_size(height, width)
    for mix in mixes:
        shares = _text_shares(mix, guidance)  # [k]
        texts = [prompt.text for prompt in mix if prompt.image is None]
        if not all(text.strip() for text, share in zip(texts, shares.tolist(), strict=True) if share):
            raise UserError("CLIP guidance: it leads to a text, and this prompt is empty")


def _text_shares(mix: Sequence[Prompt], guidance: float) -> Tensor:
    """Return how much each text of a picture counts, [k], 1 in sum."""
    texts = [prompt for prompt in mix if prompt.image is None]
    weights = torch.tensor([[guidance if prompt.weight is None else prompt.weight for prompt in texts]])  # [1, k]
    shares = proportional_weights(weights)[1:, 0]  # [k]
    if not shares.any():
        raise UserError("CLIP guidance: each picture needs a text with a weight above 0")
    return shares
