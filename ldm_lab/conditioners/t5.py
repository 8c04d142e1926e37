"""A text as the states of a frozen language model, one for each of its tokens: T5, Flan, ByT5, or MiniLM offline."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.conditioners.t5_models import (
    LESS_MEMORY,
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
from ldm_lab.conditioners.t5_sizes import encoder_parameters
from ldm_lab.conditions import MASK, Stored
from ldm_lab.config import PositiveInt, register
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.interfaces import Batch, Conditioner, Conditions, ConditionSpec, TokenStates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 60  # characters of a text in a message
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
STATES = "token_states"
# Texts that the encoder always reads together, of equal numbers of tokens; fewer are filled up by repeating one. Matrix
# products of one shape round alike, so that a text's states do not depend on the texts beside it.
CHUNK = 8

log = logging.getLogger(__name__)


class TextStates(Protocol):
    """What keeps the states of texts."""

    def read(self, texts: Sequence[str]) -> list[Tensor | None]:
        """Return the states of texts, [l, D] each; None for those that are not there."""
        ...

    def add(self, texts: Sequence[str], states: Sequence[Tensor]) -> None:
        """Keep the states of texts that are not there, [l, D] each."""
        ...


class Encoded(NamedTuple):
    """The states of some texts.

    Attributes:
        states: [l, D] each, as they are stored.
        problems: of the texts whose states cannot be used, by their places: why.
    """

    states: list[Tensor]
    problems: dict[int, str]


@register("conditioner", "t5")
class T5(Conditioner):
    """The encoder of a language model, frozen: {"token_states": [B, L, D], "token_states_mask": bool [B, L]}.

    Texts of equal numbers of tokens are encoded together, so that nothing is padded in the encoder. No text at all is
    a mask without any true; with `padding: read` it is the empty text.

    Attributes:
        width: D, of a state.
        text_size: L, tokens per text; a longer text is cut, which is said.
        stored: type that states are stored in.
        rounds: whether states that are not stored are rounded to that type, too, as those that are trained on are.
        store: where states are looked for first, and where those that lack go; None: they are always made.
        has_model: whether texts that the store lacks may be encoded.
        cut: captions that were cut so far.
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
        stored: Literal["float16", "bfloat16"] | None = None,
        width: PositiveInt | None = None,
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
            stored: type that states are stored in, and rounded to wherever they are trained on (default: bfloat16 for
                bf16, which loses nothing, else float16, which is finer and ends at 65,504).
            width: D, of a state, of a model that nobody has heard of and that is not here (default: as its files say).

        Raises:
            UserError: no such model.
        """
        super().__init__()
        self.model_name, self.text_size, self.padding, self.lowercase = model, text_size, padding, lowercase
        self.dtype = TYPES[dtype or ("fp32" if model == MINILM else "bf16")]
        self.stored = STORED[stored or ("bfloat16" if self.dtype == torch.bfloat16 else "float16")]
        self.width = width or width_of(model)
        self.encoder: torch.nn.Module | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.register_buffer("place", torch.zeros(()), persistent=False)  # []; says where the part is
        self.is_postponed = self.warned = self.rounds = False
        self.store: TextStates | None = None
        self.has_model, self.cut = True, 0
        self._empty: Tensor | None = None  # [l, D], of the empty text

    @staticmethod
    def weights_identity(config: dict[str, str]) -> str:
        """Return the checksum of the weights, or the repository's revision."""
        return identity(config.get("model", MINILM))

    @staticmethod
    def downloads(config: dict[str, str]) -> list[Download]:
        """Return what has to be downloaded."""
        return to_fetch(config.get("model", MINILM))

    def load_pretrained(self) -> None:
        """Load encoder and tokenizer. Raises UserError: not there, damaged, other ones; too little memory."""
        name, device = self.model_name, self.place.device
        folder: Path = checked_minilm() if name == MINILM else (local_folder(name) or fetched(name))
        self.tokenizer = load_tokenizer(folder)
        with told_in_one_line(lambda: f"loading {name}", f"{LESS_MEMORY} need less"):
            self.encoder = load_encoder(folder, self.dtype, device)
        if (right := width_of(name)) != self.width:
            raise UserError(f"conditioner.width: {self.width}, and the states of {name} are {right} wide")

    def load_later(self) -> None:
        self.is_postponed = True

    def facts(self) -> dict[str, str]:
        """Return what makes a text's states what they are, beside the weights, by name, each as JSON."""
        dtype = next(name for name, its in TYPES.items() if its == self.dtype)
        words = {"name": self.part_name, "model": self.model_name, "padding": self.padding, "dtype": dtype}
        numbers = {"text_size": self.text_size, "lowercase": self.lowercase, "chunk": CHUNK}
        return {key: json.dumps(its) for key, its in {**words, **numbers, "stored": self.stored_name}.items()}

    @property
    def postponed_bytes(self) -> int | None:
        """What the encoder will take when a text has to be encoded; 0 where it is loaded, or never will be."""
        if self.encoder is not None or not self.has_model:
            return 0
        count = encoder_parameters(self.model_name)
        return None if count is None else count * self.dtype.itemsize

    @property
    def stored_name(self) -> Stored:
        """The type that states are stored in, by its name."""
        return "bfloat16" if self.stored == torch.bfloat16 else "float16"

    @property
    def spec(self) -> ConditionSpec:
        return {STATES: TokenStates(self.width, self.text_size, self.stored_name)}

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

    def check_texts(self, texts: Sequence[str]) -> None:
        if self.store is not None:
            self.check_missing([text for text in texts if text not in self.store])

    def check_missing(self, texts: Sequence[str]) -> None:
        """Raise UserError if some texts have to be encoded and must not."""
        if texts and not self.has_model:
            raise UserError(
                f"conditioner.store: it has no states of {quoted(texts[0])}, and {self.model_name} is not used; "
                "python -m ldm_lab embed-text adds them"
            )

    def null(self, conditions: Conditions) -> Conditions:
        """Return as many rows of no text: the empty one's states where the padding is read, else none."""
        count = len(conditions[STATES])
        if self.padding == "masked":
            return {name: torch.zeros_like(value) for name, value in conditions.items()}
        if self._empty is None:
            self._empty = self.states([""])[0]  # [l, D]
        self._empty = self._empty.to(self.place.device)  # [l, D]; it stays there
        rows = {name: value.expand(count, *value.shape[1:]) for name, value in self.padded([self._empty]).items()}
        return {name: value.to(conditions[name]) for name, value in rows.items()}

    def encode(self, texts: Sequence[str], once: bool = False) -> Conditions:
        """Return {"token_states": float32 [n, L, D], "token_states_mask": bool [n, L]} of texts. As `states`."""
        return self.padded(self.states(texts, once))

    def states(self, texts: Sequence[str], once: bool = False) -> list[Tensor]:
        """Return the states of texts, [l, D] each, in the type that they are stored in, or float32 (`rounds`).

        Args:
            texts: any.
            once: of the texts that are cut only the first one ever gets a line in the log.

        Raises:
            UserError: the weights have not been loaded, or a text has to be encoded and must not; states that are not
                finite, or do not fit into the stored type.
        """
        found: list[Tensor | None] = [None] * len(texts) if self.store is None else self.store.read(texts)
        missing = list(dict.fromkeys(text for text, its in zip(texts, found) if its is None))
        self.check_missing(missing)
        made = self.encode_each(missing, once) if missing else Encoded([], {})
        for place, problem in made.problems.items():
            raise UserError(f"conditioner: {self.model_name}: {quoted(missing[place])}: {problem}")
        of_text = dict(zip(missing, made.states))
        if self.store is not None and missing:
            of_text = {text: its.cpu() for text, its in of_text.items()}  # where the others are
            self.store.add(missing, list(of_text.values()))
        return [of_text[text] if its is None else its for text, its in zip(texts, found)]

    @torch.no_grad()
    def encode_each(self, texts: Sequence[str], once: bool = False) -> Encoded:
        """Return the states of texts, each as if it were alone. Arguments and errors are those of `states`."""
        if self.encoder is None and self.is_postponed:
            self.load_pretrained()
        if self.encoder is None or self.tokenizer is None:
            raise UserError(f"conditioner: the weights of {self.model_name} have not been loaded")
        rows = [self.tokens(text, once) for text in texts]
        device, pad = self.place.device, int(self.tokenizer.pad_token_id or 0)
        dtype = self.stored if self.rounds else torch.float32
        states = [torch.zeros(0, self.width, dtype=dtype, device=device) for _ in rows]  # [l, D] each
        order, largest, kept = list[int](), list[Tensor](), list[Tensor]()
        for length, members in self.chunks(rows):
            filled = members + members[-1:] * (CHUNK - len(members))
            ids = torch.tensor([rows[i] + [pad] * (length - len(rows[i])) for i in filled], device=device)  # [8, l]
            there = torch.tensor([[j < len(rows[i]) for j in range(length)] for i in filled], device=device)  # [8, l]
            with torch.autocast(device.type, enabled=False):  # the arithmetic is `dtype`, whatever goes on around it
                found = self.encoder(input_ids=ids, attention_mask=there.long()).last_hidden_state  # [8, l, D]
            found = found[: len(members)]  # [m, l, D]
            rounded = found.to(dtype)  # [m, l, D]
            order += members
            largest += [found.float().abs().amax((1, 2))]  # [m]
            kept += [rounded.float().abs().amax((1, 2))]  # [m]
            for i, its in zip(members, rounded):
                states[i] = its
        problems = {}
        sizes = torch.stack([torch.cat(largest), torch.cat(kept)]).tolist() if order else [[], []]  # [2, n]
        for i, size, size_kept in zip(order, *sizes):
            if not size < torch.inf:
                problems[i] = "states that are not finite; conditioner.dtype=fp32 may help"
            elif not size_kept < torch.inf:
                most = torch.finfo(dtype).max
                problems[i] = f"states beyond {most:,.0f}, where float16 ends; conditioner.stored=bfloat16 keeps them"
        return Encoded(states, problems)

    def chunks(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """Yield (tokens, places of at most `CHUNK` rows with so many); a row without any is left out."""
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(self.text_size if self.padding == "read" else len(row), []).append(i)
        for length, members in groups.items():
            for first in range(0, len(members) if length else 0, CHUNK):
                yield length, members[first : first + CHUNK]

    def padded(self, states: Sequence[Tensor]) -> Conditions:
        """Return states [l, D] each as the denoiser is told them, float32 [n, L, D] and their mask; nothing waits."""
        device, lengths = self.place.device, [len(row) for row in states]
        filled = torch.zeros(len(states) * self.text_size, self.width, device=device)  # [n * L, D]
        packed = torch.cat(list(states)) if states else filled[:0]  # [sum of lengths, D]
        places = torch.cat(
            [torch.arange(0)] + [torch.arange(many) + i * self.text_size for i, many in enumerate(lengths)]
        )
        ends = torch.tensor(lengths, dtype=torch.long)[:, None]  # [n, 1]
        moved = [it.pin_memory() if device.type == "cuda" and not it.is_cuda else it for it in (packed, places, ends)]
        packed, places, ends = (it.to(device, non_blocking=True) for it in moved)
        filled.index_copy_(0, places, packed.float())
        mask = torch.arange(self.text_size, device=device) < ends  # [n, L]
        return {STATES: filled.view(len(states), self.text_size, self.width), STATES + MASK: mask}

    def tokens(self, text: str, once: bool = False) -> list[int]:
        """Return the ids of a text, at most `text_size`, its end included."""
        assert self.tokenizer is not None  # `encode_each` has refused otherwise
        text = text.lower().strip() if self.lowercase else text
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if len(ids) > self.text_size:
            self.cut += once
            if not (once and self.warned):
                more = "; further captions are cut without a word, and counted" if once else ""
                what = "caption" if once else "prompt"
                log.warning(
                    "%s %s is cut: it has %d tokens, of which %d fit%s",
                    what,
                    quoted(text),
                    len(ids),
                    self.text_size,
                    more,
                )
                self.warned = self.warned or once
            ids = ids[: self.text_size - 1] + ids[-1:]  # the last id is the end of the text
        return ids


def quoted(text: str) -> str:
    """Return a text for a message, a long one shortened."""
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
