"""What stands in for the rest of the program in code that leaves it: contracts without training, axes without einops.

`ldm_lab.sharing.standalone` puts these in the place of what `REDIRECTED` says.
"""

import math
import re
from itertools import pairwise

import regex
from torch import Tensor, nn

from ldm_lab.conditioners.glide_text import GPT2_WORDS, gpt2_ranks

MERGES: list[tuple[str, str]] = []  # of the vocabulary, the most frequent first; whoever loads it fills it in


class UserError(ValueError):
    """A mistake in what was asked for, said in a line."""


class Network(nn.Module):
    """A denoiser, without what training asks of it."""

    part_name = ""
    learns_variance: bool | None = None
    multiple_of = 1
    time_input = "t"


class Conditioner(nn.Module):
    """What reads prompts, without what training asks of it."""

    @property
    def device(self):  # type: ignore[no-untyped-def]
        return next(self.parameters()).device


class Source(nn.Module):
    """A further condition, such as a small image, without what training asks of it."""


class Contract:
    """A base class of objectives and samplers."""

    uses_gradient = False


def check_options(*_: type, **options: float) -> None:
    """Accept options: they were checked when the model was exported."""


def signature_options(_: type) -> dict[str, str]:
    """Return no names of options: they were checked when the model was exported."""
    return {}


def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Return a tensor with its axes split, merged and moved, as einops does it: "b (n d) h w -> b n (h w) d"."""
    left, right = (axes_of(side) for side in pattern.split("->"))
    known = {"1": 1, **sizes}
    for group, size in zip(left, tensor.shape, strict=True):
        unknown = [name for name in group if name not in known]
        if unknown:
            known[unknown[0]] = size // math.prod(known[name] for name in group if name in known)
    flat = [name for group in left for name in group]
    tensor = tensor.reshape([known[name] for name in flat])
    kept = [i for i, name in enumerate(flat) if name != "1"]
    tensor = tensor.reshape([tensor.shape[i] for i in kept])
    flat = [flat[i] for i in kept]
    for name in (name for group in right for name in group if name != "1" and name not in flat):  # einops' repeat
        tensor, flat = tensor[..., None].expand(*tensor.shape, known[name]), [*flat, name]
    order = [name for group in right for name in group if name != "1"]
    tensor = tensor.permute([flat.index(name) for name in order])
    return tensor.reshape([math.prod(known[name] for name in group) for group in right])


def repeat(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Return a tensor with new axes along which it repeats, as einops does it: "b f -> b f h w"."""
    return rearrange(tensor, pattern, **sizes)


def axes_of(side: str) -> list[list[str]]:
    """Return the names on one side of a pattern, of each axis those that are merged in it."""
    return [inner.split() if inner else [name] for inner, name in re.findall(r"\(([^)]*)\)|(\w+)", side)]


def given_merges() -> list[tuple[str, str]]:
    """Return the vocabulary's merges."""
    return MERGES


class Ftfy:
    """What mends texts that were decoded wrongly, where it is installed; others stay as they are."""

    @staticmethod
    def fix_text(text: str) -> str:
        """Return a text, mended if that can be done here."""
        try:
            import ftfy
        except ImportError:
            return text
        return ftfy.fix_text(text)


class GPT2:
    """GPT-2's byte-pair encoding without tiktoken."""

    def __init__(self, vocab_size: int) -> None:
        """Take the first `vocab_size` - 1 pieces."""
        ranks = gpt2_ranks(" ".join(pair) for pair in MERGES)
        self.ranks = {piece: rank for piece, rank in ranks.items() if rank < vocab_size - 1}

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids = []
        for word in regex.findall(GPT2_WORDS, text):
            pieces = [bytes([byte]) for byte in word.encode()]
            while len(pieces) > 1:
                pairs = [left + right for left, right in pairwise(pieces)]
                best = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], len(self.ranks)))
                if pairs[best] not in self.ranks:
                    break
                pieces[best : best + 2] = [pairs[best]]
            ids += [self.ranks[piece] for piece in pieces]
        return ids


def gpt2_encoding(vocab_size: int, _: None = None) -> GPT2:
    """Return the encoding of the vocabulary."""
    return GPT2(vocab_size)
