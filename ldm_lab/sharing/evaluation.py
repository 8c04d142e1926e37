"""The results of `python -m ldm_lab evaluate` for a model card: its JSON, read again."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.evaluation.metrics import Value
from ldm_lab.io.atomic import existing_file
from ldm_lab.io.json_files import Fields, parse_json
from ldm_lab.metrics import METRICS
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.sampling.names import public_name

LARGEST = 16 << 20  # bytes


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Attributes:
        rows: (what, how much), for people.
        notes: what the numbers are of, a line each.
    """

    rows: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def read_evaluation(path: Path, model: str) -> Evaluation:
    """Return what an `evaluation.json` says of a model.

    Args:
        path: of the file, or of the folder with it.
        model: its name there.

    Raises:
        UserError: no such file, another program's, or one about other models.
    """
    path = existing_file(path / "evaluation.json" if path.is_dir() else path, "--evaluation")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: not an evaluation: it is larger than {LARGEST:,} bytes")
    content = Fields(parse_json(path.read_bytes()))
    rows = content.listed("rows")
    if not rows or any(row.text("model") is None or row.named("values") is None for row in rows):
        raise UserError(f"{path}: not an evaluation: evaluation.json of `python -m ldm_lab evaluate` is needed")
    models = list(dict.fromkeys(str(row.text("model")) for row in rows))
    if model not in models:
        raise UserError(f"{path}: is about {', '.join(models)}, and not about {model}")
    told = [row for row in rows if row.text("model") == model]
    shown = [
        (f"{name}{_asked(row)}", str(Value(value.number("value") or 0.0, value.number("margin"))))
        for row in told
        for name, value in (row.named("values") or {}).items()
    ]
    meanings = [f"{name}: {METRICS[name].meaning}" for name in dict.fromkeys(name.split()[0] for name, _ in shown)
                if name in METRICS]  # fmt: skip
    facts = [f"{name}: {' '.join(_public(word) for word in text.split())}" for name, text in content.words("facts")]
    remarks = content.sequence("remarks")
    kept = [line for line in remarks if not re.search(r"[/\\~]", line)]
    if len(kept) < len(remarks):
        print(f"{path}: {len(remarks) - len(kept)} remarks stay out of the card, as they name files", file=sys.stderr)
    return Evaluation(tuple(shown), (*facts, *meanings, *kept))


def _asked(row: Fields) -> str:
    """Return how a model was asked, in a few words."""
    guidance, sampler, steps = row.number("guidance"), row.text("sampler"), row.count("steps")
    if guidance is None or sampler is None or steps is None:
        return ""
    return f" (guidance {guidance:g}, {sampler} {steps}, {row.count('pictures') or 0:,} pictures)"


def _public(word: str) -> str:
    """Return a word without the folders of a path."""
    is_path = word.startswith(("/", "~", "./", "../")) or "\\" in word
    return public_name(word) if is_path and word not in catalogue() else word
