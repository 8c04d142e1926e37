"""CLIP's byte-pair encoding (Radford et al. 2021, arXiv 2103.00020; openai/CLIP), with a vocabulary of any size.

Token ids: 256 bytes, the same 256 at the end of a word, one per merge of two tokens, then start and end of text.
A vocabulary of 49408 is CLIP's own. A smaller one keeps the first, most frequent merges, so that a small text tower has
a small embedding table: words fall into more pieces, none is lost. Padding is 0, which is also the token of "!".
"""

import functools
import gzip
import html
import importlib.util
import logging
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from ldm_lab.errors import UserError

CLIP_VOCAB_SIZE = 49408
SMALLEST_VOCAB_SIZE = 256 + 256 + 2  # bytes, bytes that end a word, start and end of text: no merge at all
SHOWN = 60  # characters of a prompt that a warning quotes

log = logging.getLogger(__name__)


SPECIAL = ("<|startoftext|>", "<|endoftext|>")  # the last two ids of a vocabulary
WORD_END = "</w>"
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def tokenize(texts: list[str], text_size: int = 77, vocab_size: int = CLIP_VOCAB_SIZE, warn: bool = False) -> Tensor:
    """Return token ids, int64 [n, text_size]: start, the text, end, zeros.

    A longer text is cut so that the end token is the last one. A literal `<|endoftext|>` in a text becomes an end
    token, as in CLIP.

    Args:
        texts: n texts.
        text_size: positions, at least 2.
        vocab_size: tokens, from 514 to 49408.
        warn: say which texts were cut, a line in the log for each.

    Raises:
        UserError: `vocab_size` is outside its range.
    """
    encoding = Encoding.of_size(vocab_size)
    tokens = torch.zeros(len(texts), text_size, dtype=torch.int64)  # [n, text_size]
    for row, text in zip(tokens, texts):
        body = encoding.encode(text)
        if len(body) > text_size - 2:
            if warn:
                quoted = text if len(text) <= SHOWN else text[:SHOWN] + "..."
                log.warning("prompt %r is cut: it has %d tokens, of which %d fit", quoted, len(body), text_size - 2)
            body = body[: text_size - 2]
        row[: len(body) + 2] = torch.tensor([vocab_size - 2, *body, vocab_size - 1])  # [len(body) + 2]
    return tokens


class Encoding:
    """The first `vocab_size` - 2 of CLIP's tokens, and start and end of text."""

    def __init__(self, vocab_size: int) -> None:
        """Read the merges. Raises UserError for a size that is not in 514..49408."""
        if not SMALLEST_VOCAB_SIZE <= vocab_size <= CLIP_VOCAB_SIZE:
            raise UserError(
                f"vocab_size: CLIP's tokenizer has {CLIP_VOCAB_SIZE} tokens and can do with {SMALLEST_VOCAB_SIZE}; "
                f"{vocab_size} is outside that range"
            )
        merges = _merges()[: vocab_size - SMALLEST_VOCAB_SIZE]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.letters = byte_letters()
        alphabet = list(self.letters.values())
        pieces = alphabet + [letter + WORD_END for letter in alphabet] + [left + right for left, right in merges]
        self.ids = {piece: i for i, piece in enumerate([*pieces, *SPECIAL])}
        self.known: dict[str, list[int]] = {}  # words met before

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def of_size(vocab_size: int) -> "Encoding":
        """Return the encoding of that size, made once."""
        return Encoding(vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without start and end. Case, repeated spaces and HTML's escapes are lost."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        words = WORDS.findall(" ".join(text.split()).lower())
        return [token for word in words for token in self._word(word)]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids; start, end and what is not UTF-8 are left out."""
        pieces = {i: piece for piece, i in self.ids.items() if piece not in SPECIAL}
        letters = "".join(pieces.get(token, "") for token in tokens).replace(WORD_END, " ")
        byte_of = {letter: byte for byte, letter in self.letters.items()} | {" ": ord(" ")}
        return bytes(byte_of[letter] for letter in letters).decode("utf-8", errors="ignore").strip()

    def _word(self, word: str) -> list[int]:
        if word not in self.known:
            self.known[word] = [self.ids[piece] for piece in self._pieces(word)]
        return self.known[word]

    def _pieces(self, word: str) -> list[str]:
        """Return a word as pieces of the vocabulary: of all pairs of neighbors the earliest merge goes first."""
        if word in SPECIAL:
            return [word]
        pieces = [self.letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += WORD_END
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged = []
            for piece in pieces:
                # A piece that has just been merged is no longer `best[0]`, so that "aaa" merges from the left.
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return pieces


def _merges() -> list[tuple[str, str]]:
    """Return CLIP's merges, the most frequent first, from the file that comes with open_clip."""
    # Found, not imported: that takes many seconds, and open_clip's tokenizer spells the special tokens otherwise.
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    lines = gzip.decompress((Path(folder) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    left_right = (line.split() for line in lines[1 : 1 + CLIP_VOCAB_SIZE - SMALLEST_VOCAB_SIZE])  # line 0 is a version
    return [(left, right) for left, right in left_right]


def byte_letters() -> dict[int, str]:
    """Return a printable letter for every byte, in the order of CLIP's and GPT-2's ids.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others follow as letters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
