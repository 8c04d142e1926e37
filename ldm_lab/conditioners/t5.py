"""A text as the states of a frozen language model, one for each of its tokens: T5, Flan, ByT5, or MiniLM offline."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image

from ldm_lab.conditioners.t5_models import (
    MINILM,
    checked_minilm,
    fetched,
    identity,
    load_encoder,
    load_tokenizer,
    local_folder,
    to_fetch,
    width_of,
)
from ldm_lab.config import PositiveInt, register
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch, Conditioner, Conditions, ConditionSpec, TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 60  # characters of a text in a message
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

log = logging.getLogger(__name__)


@register("conditioner", "t5")
class T5(Conditioner):
    """The encoder of a language model, frozen: {"token_states": [B, L, D], "token_states_mask": bool [B, L]}.

    Texts of equal numbers of tokens are encoded together, so that nothing is padded in the encoder. No text at all is
    a mask without any true; with `padding: read` it is the empty text.

    Attributes:
        width: D, of a state.
        text_size: L, tokens per text; a longer text is cut, which is said.
    """

    trainable = False

    def __init__(
        self,
        *,
        model: str = MINILM,
        text_size: PositiveInt = 256,
        padding: Literal["masked", "read"] = "masked",
        lowercase: bool = False,
        dtype: Literal["bf16", "fp32"] | None = None,
    ) -> None:
        """Choose the model; its weights are loaded by `load_pretrained`.

        Args:
            model: a T5 of transformers on the Hub, such as google/t5-v1_1-xl or google/flan-t5-xl, a folder with one,
                or minilm, which comes with a package and needs no network.
            text_size: L, tokens per text, the end's included; a longer text is cut.
            padding: masked, or "read": all texts are padded to L, and the states of the padding count as any other's,
                as the released IF was trained.
            lowercase: write texts in lower case and without space around them first, as IF did.
            dtype: of the encoder's arithmetic (default: fp32 for minilm, else bf16).

        Raises:
            UserError: no such model.
        """
        super().__init__()
        self.model_name, self.text_size, self.padding, self.lowercase = model, text_size, padding, lowercase
        self.dtype = TYPES[dtype or ("fp32" if model == MINILM else "bf16")]
        self.width = width_of(model)
        self.encoder: torch.nn.Module | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.register_buffer("place", torch.zeros(()), persistent=False)  # []; says where the part is
        self.warned = False

    @staticmethod
    def weights_identity(config: dict[str, str]) -> str:
        """Return the checksum of the weights, or the repository's revision."""
        return identity(config.get("model", MINILM))

    @staticmethod
    def downloads(config: dict[str, str]) -> list[Download]:
        """Return what has to be downloaded."""
        return to_fetch(config.get("model", MINILM))

    def load_pretrained(self) -> None:
        """Load encoder and tokenizer. Raises UserError: they are not there, damaged, or other ones."""
        name = self.model_name
        folder: Path = checked_minilm() if name == MINILM else (local_folder(name) or fetched(name))
        self.encoder, self.tokenizer = load_encoder(folder, self.dtype), load_tokenizer(folder)

    @property
    def spec(self) -> ConditionSpec:
        return {"token_states": TokenStates(self.width, self.text_size)}

    def from_batch(self, batch: Batch) -> Conditions:
        """Return the states of the batch's captions; the first caption that is cut gets a line in the log."""
        return self.encode(batch.text, once=True)

    def from_prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Conditions:
        """Return the states of texts; one that is too long is cut with a warning.

        Raises:
            UserError: image prompts, which this model does not understand.
        """
        if images:
            raise UserError("this model is prompted with text: it takes no image prompts")
        return self.encode(texts)

    def null(self, conditions: Conditions) -> Conditions:
        """Return as many rows of no text: the empty one's states where the padding is read, else none."""
        count = len(conditions["token_states"])
        if self.padding == "masked":
            return {name: torch.zeros_like(value) for name, value in conditions.items()}
        empty = self.encode([""])
        rows = {name: value.expand(count, *value.shape[1:]) for name, value in empty.items()}
        return {name: value.to(conditions[name]) for name, value in rows.items()}

    @torch.no_grad()
    def encode(self, texts: Sequence[str], once: bool = False) -> Conditions:
        """Return {"token_states": float32 [n, L, D], "token_states_mask": bool [n, L]} of texts.

        Args:
            texts: any.
            once: of the texts that are cut only the first one ever gets a line in the log.

        Raises:
            UserError: the weights have not been loaded; states that are not finite.
        """
        if self.encoder is None or self.tokenizer is None:
            raise UserError(f"conditioner: the weights of {self.model_name} have not been loaded")
        rows = [self.tokens(text, once) for text in texts]
        device, full = self.place.device, self.padding == "read"
        states = torch.zeros(len(rows), self.text_size, self.width, device=device)  # [n, L, D]
        mask = torch.zeros(len(rows), self.text_size, dtype=torch.bool, device=device)  # [n, L]
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(self.text_size if full else len(row), []).append(i)
        for length, members in groups.items():
            pad = int(self.tokenizer.pad_token_id or 0)
            ids = [rows[i] + [pad] * (length - len(rows[i])) for i in members]
            known = [[j < len(rows[i]) for j in range(length)] for i in members]
            of_group = torch.tensor(ids, device=device), torch.tensor(known, device=device).long()  # [m, l] each
            found = self.encoder(input_ids=of_group[0], attention_mask=of_group[1]).last_hidden_state  # [m, l, D]
            states[members, :length] = found.float()
            mask[members, :length] = True
        if not bool(states.isfinite().all()):
            raise UserError(f"conditioner: {self.model_name} gives states that are not finite; conditioner.dtype=fp32")
        return {"token_states": states, "token_states_mask": mask}

    def tokens(self, text: str, once: bool = False) -> list[int]:
        """Return the ids of a text, at most `text_size`, its end included."""
        assert self.tokenizer is not None  # `encode` has refused otherwise
        text = text.lower().strip() if self.lowercase else text
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if len(ids) > self.text_size:
            if not (once and self.warned):
                quoted = text if len(text) <= SHOWN else text[:SHOWN] + "..."
                more = "; further captions are cut without a word" if once else ""
                what = "caption" if once else "prompt"
                log.warning(
                    "%s %r is cut: it has %d tokens, of which %d fit%s", what, quoted, len(ids), self.text_size, more
                )
                self.warned = self.warned or once
            ids = ids[: self.text_size - 1] + ids[-1:]  # the last id is the end of the text
        return ids
