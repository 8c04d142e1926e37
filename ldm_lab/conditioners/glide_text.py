"""Token ids for denoisers that read text themselves: GLIDE's (GPT-2's byte-pair encoding), or a small one of CLIP's."""

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.clip_tokens import (
    CLIP_VOCAB_SIZE,
    SHOWN,
    SMALLEST_VOCAB_SIZE,
    byte_letters,
)
from ldm_lab.clip_tokens import Encoding as CLIPEncoding
from ldm_lab.config import PositiveInt, check_options, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch, Conditioner, Conditions, ConditionSpec, TokenIds
from ldm_lab.pretrained.resolve import fetch

if TYPE_CHECKING:
    import tiktoken

GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, one token for padding
GPT2_SMALLEST = 257
GPT2_MERGES = "gpt2/vocab.bpe"  # a name of `ldm_lab.pretrained.resolve`
# How GPT-2 splits a text before merging: contractions, words, numbers and signs with one space in front, other space.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

log = logging.getLogger(__name__)


@register("conditioner", "glide_text")
class GlideText(Conditioner):
    """Captions as token ids, lower-cased, padded to a length; nothing is learned here, the denoiser reads them.

    A condition is {"token_ids": int64 [B, L], "token_ids_mask": bool [B, L]}. The ids begin at the first place, without
    a start or an end; the rest is the vocabulary's last id, its mask false. No id at all is the unconditional input.

    Attributes:
        vocab_size: number of different ids.
        text_size: L, ids per text.
        folder: where GPT-2's merges may lie beside the cache: that of the model's file.
    """

    pad: Tensor

    def __init__(
        self,
        *,
        vocabulary: Literal["gpt2", "clip"] = "gpt2",
        vocab_size: int | None = None,
        text_size: PositiveInt = 128,
    ) -> None:
        """Choose the tokens.

        Args:
            vocabulary: GPT-2's byte-pair encoding, downloaded at first use, as all released models have it; or CLIP's,
                which comes with open_clip.
            vocab_size: ids; a smaller number keeps the most frequent merges, so that words fall into more pieces and a
                small model's table of embeddings is small. null: the whole vocabulary.
            text_size: L, tokens per text; a longer text is cut.
        """
        super().__init__()
        check_options(GlideText, vocabulary=vocabulary, vocab_size=vocab_size, text_size=text_size)
        whole = GPT2_VOCAB_SIZE if vocabulary == "gpt2" else CLIP_VOCAB_SIZE
        self.vocabulary, self.vocab_size, self.text_size = vocabulary, vocab_size or whole, text_size
        self.register_buffer("pad", torch.tensor(self.vocab_size - 1), persistent=False)  # []
        self.warned_truncated = False
        self.folder: Path | None = None

    @staticmethod
    def check(*, vocabulary: str, vocab_size: int | None) -> list[str]:
        """Return what is wrong across the options."""
        gpt2 = vocabulary == "gpt2"
        least, most = (GPT2_SMALLEST, GPT2_VOCAB_SIZE) if gpt2 else (SMALLEST_VOCAB_SIZE, CLIP_VOCAB_SIZE)
        if vocab_size is not None and not least <= vocab_size <= most:
            return [f"vocab_size: this vocabulary has {least} to {most} ids, not {vocab_size}"]
        return []

    @property
    def spec(self) -> ConditionSpec:
        return {"token_ids": TokenIds(self.text_size, self.vocab_size)}

    def from_batch(self, batch: Batch) -> Conditions:
        """Return the ids and mask of the batch's captions; the first caption that is cut gets a line in the log."""
        return self.tokenize(batch.text, warn="once")

    def from_prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Conditions:
        """Return the ids and mask of texts; one that is too long is cut with a warning.

        Raises:
            UserError: image prompts, which this model does not understand.
        """
        if images:
            raise UserError("this model is prompted with text: it takes no image prompts")
        return self.tokenize(texts, warn="all")

    def null(self, conditions: Conditions) -> Conditions:
        """Return as many empty texts as a condition has rows; whatever else is in the condition stays."""
        empty = torch.full_like(conditions["token_ids"], self.vocab_size - 1)  # [B, L]
        nowhere = torch.zeros_like(conditions["token_ids_mask"])  # [B, L]
        return {**conditions, "token_ids": empty, "token_ids_mask": nowhere}

    def tokenize(self, texts: Sequence[str], warn: Literal["all", "once", "never"] = "never") -> Conditions:
        """Return {"token_ids": int64 [n, L], "token_ids_mask": bool [n, L]} of n texts, on the module's device.

        Args:
            texts: any; GPT-2's are lower-cased and otherwise left as they are, spaces included.
            warn: which of the texts that are cut get a line in the log: all, or only the first one ever.
        """
        token_ids = torch.full((len(texts), self.text_size), self.vocab_size - 1)  # [n, L]
        mask = torch.zeros(len(texts), self.text_size, dtype=torch.bool)  # [n, L]
        for row, known, text in zip(token_ids, mask, texts):
            ids = self.encode(text)
            if len(ids) > self.text_size:
                self._warn_truncated(text, len(ids), warn)
                ids = ids[: self.text_size]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)  # [len(ids)]
            known[: len(ids)] = True
        given = {"token_ids": token_ids, "token_ids_mask": mask}
        return {name: value.to(self.pad.device, non_blocking=True) for name, value in given.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, however many."""
        if self.vocabulary == "clip":
            return CLIPEncoding.of_size(self.vocab_size).encode(text)  # its last id, the end of a text, is our padding
        return gpt2_encoding(self.vocab_size, self.folder).encode_ordinary(text.lower())

    def look_in(self, folder: Path) -> None:
        self.folder = folder

    def merges_file(self) -> Path:
        """Return the file of GPT-2's merges. Raises UserError: not there, and it cannot be downloaded."""
        return fetch(GPT2_MERGES, self.folder)

    def _warn_truncated(self, text: str, count: int, warn: str) -> None:
        if warn == "never" or (warn == "once" and self.warned_truncated):
            return
        quoted = text if len(text) <= SHOWN else text[:SHOWN] + "..."
        what = "prompt" if warn == "all" else "caption"
        more = "; further captions are cut without a word" if warn == "once" else ""
        log.warning("%s %r is cut: it has %d tokens, of which %d fit%s", what, quoted, count, self.text_size, more)
        self.warned_truncated = self.warned_truncated or warn == "once"


@functools.lru_cache(maxsize=4)
def gpt2_encoding(vocab_size: int = GPT2_VOCAB_SIZE, folder: Path | None = None) -> "tiktoken.Encoding":
    """Return the tiktoken encoding of the first `vocab_size` - 1 of GPT-2's tokens; merges are fetched if need be.

    Args:
        vocab_size: number of ids.
        folder: where the merges may lie beside the cache.

    Raises:
        UserError: the merges are not there and cannot be downloaded.
    """
    import tiktoken

    path = fetch(GPT2_MERGES, folder)
    ranks = gpt2_ranks(path.read_text(encoding="utf-8").split("\n"))
    first = {piece: rank for piece, rank in ranks.items() if rank < vocab_size - 1}
    return tiktoken.Encoding("gpt2_merges", pat_str=GPT2_WORDS, mergeable_ranks=first, special_tokens={})


def gpt2_ranks(lines: Iterable[str]) -> dict[bytes, int]:
    """Return the id of every piece, from the lines of GPT-2's `vocab.bpe`.

    The 256 bytes come first, in the order of their letters, then one piece per line, which holds its two halves.
    """
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes([byte]): i for i, byte in enumerate(byte_letters())}
    for line in lines:
        if line and not line.startswith("#version"):
            ranks[bytes(byte_of[letter] for letter in line if letter != " ")] = len(ranks)
    return ranks
