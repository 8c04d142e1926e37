"""The text "parameters" in a picture, as A1111's web UI writes it and most other programs and picture sites read it.

a red star on blue
Negative prompt: blurry
Steps: 20, Sampler: UniPC, CFG scale: 3, Seed: 7, Size: 64x64, Model hash: 0123456789, Model: quickstart, Version: ...
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata

SAMPLER_NAMES = {  # those that mean the same there
    "euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "unipc": "UniPC",
    "plms": "PLMS", "ddim": "DDIM", "ddpm": "DDPM",
}  # fmt: skip
NEGATIVE = "Negative prompt:"
FIELD = re.compile(r'([A-Za-z][\w /-]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
WEIGHT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")  # of a prompt joined by AND
FEWEST_FIELDS = 3  # in the last line; with fewer it belongs to the prompt
LONGEST_LINE = 20_000  # characters of that line that are read


@dataclass(frozen=True)
class Parameters:
    """What that text says.

    Attributes:
        prompt, negative: as they are written there: brackets that are just brackets have a backslash before them.
        fields: the last line, name -> value.
    """

    prompt: str
    negative: str
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Parameters":
        """Return what a text says, whatever it is."""
        *lines, last = text.strip().split("\n")
        fields = {name: _unquoted(value) for name, value in FIELD.findall(last[:LONGEST_LINE])}
        if len(fields) < FEWEST_FIELDS:
            lines, fields = [*lines, last], {}
        starts = [i for i, line in enumerate(lines) if line.startswith(NEGATIVE)]
        at = starts[0] if starts else len(lines)
        negative = "\n".join(lines[at:]).removeprefix(NEGATIVE)
        return cls("\n".join(lines[:at]).strip(), negative.strip(), fields)

    def __str__(self) -> str:
        negative = [f"{NEGATIVE} {self.negative}"] if self.negative else []
        last = ", ".join(f"{name}: {_quoted(value)}" for name, value in self.fields.items())
        return "\n".join([self.prompt, *negative, last])

    def sized(self, width: int, height: int) -> "Parameters":
        """Return the same for a picture of so many pixels."""
        return replace(self, fields={**self.fields, "Size": f"{width}x{height}"})


def written_prompt(texts: Sequence[tuple[str, float]], guidance: float) -> tuple[str, float]:
    """Return the prompt and the CFG scale that mean weighted texts, [(text, weight), ...], in A1111's notation.

    It adds the differences of several prompts, joined by AND, each times its weight and the scale, which is the sum of
    `ldm_lab.guidance.classifier_free`.
    """
    if len(texts) == 1:
        ((text, weight),) = texts
        return escaped(text), weight
    scale = guidance or 1.0
    shares = [f"{escaped(text)} :{weight / scale:g}" for text, weight in texts]
    return " AND ".join(shares), scale


def read_prompt(written: str, scale: float) -> list[tuple[str, float]]:
    """Return the weighted texts that a prompt in A1111's notation means at a CFG scale: those of `written_prompt`."""
    parts = re.split(r"\bAND\b", written)
    return [_weighted(part, scale) for part in parts] if len(parts) > 1 else [(unescaped(written), scale)]


def _weighted(part: str, scale: float) -> tuple[str, float]:
    text, colon, weight = part.rpartition(":")
    if colon and WEIGHT.fullmatch(weight.strip()):
        return unescaped(text.strip()), scale * float(weight)
    return unescaped(part.strip()), scale


def escaped(text: str) -> str:
    """Return a text whose brackets are just brackets."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def unescaped(text: str) -> str:
    """Return the text that `escaped` was given; brackets with a meaning stay as they are."""
    return re.sub(r"\\([()\[\]\\])", r"\1", text)


def version() -> str:
    """Return this program's name and version."""
    try:
        return f"ldm_lab {metadata.version('ldm_lab')}"
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "ldm_lab"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    value = value.strip()
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
