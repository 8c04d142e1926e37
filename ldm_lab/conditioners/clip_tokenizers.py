"""The tokenizers of open_clip's models, with one way to be called and to count."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, SimpleTokenizer


class CLIPTokenizer:
    """CLIP's own byte-pair encoding."""

    def __init__(self, tokenizer: "SimpleTokenizer") -> None:
        self.tokenizer = tokenizer

    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Return token ids, int64 [n, length], cut and padded."""
        return self.tokenizer(list(texts), context_length=length)  # [n, length]

    def measure(self, text: str, length: int) -> tuple[int, int]:
        """Return how many tokens a text has, and how many there is room for beside start and end."""
        return len(self.tokenizer.encode(text)), length - 2


class HubTokenizer:
    """A tokenizer of transformers', as open_clip calls it."""

    def __init__(self, tokenizer: "HFTokenizer | SigLipTokenizer") -> None:
        self.tokenizer = tokenizer

    def ids(self, texts: Sequence[str], length: int) -> Tensor:
        """Return token ids, int64 [n, length], cut and padded."""
        return self.tokenizer(list(texts), context_length=length)  # [n, length]

    def measure(self, text: str, length: int) -> tuple[int, int]:
        """Return how many tokens a text has, with those that the tokenizer adds, and how many there is room for."""
        from open_clip.tokenizer import HFTokenizer

        cleaned = self.tokenizer.clean_fn(text) if isinstance(self.tokenizer, HFTokenizer) else text
        return len(self.tokenizer.tokenizer(cleaned).input_ids), length


def adapted(tokenizer: "SimpleTokenizer | HFTokenizer | SigLipTokenizer") -> CLIPTokenizer | HubTokenizer:
    """Return one of open_clip's tokenizers with the common methods."""
    from open_clip.tokenizer import SimpleTokenizer

    return CLIPTokenizer(tokenizer) if isinstance(tokenizer, SimpleTokenizer) else HubTokenizer(tokenizer)
