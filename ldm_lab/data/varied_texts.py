"""Some thousand varied texts, as people write them below pictures and into prompts: derived from a grammar of our own.

They are of no image in particular. Their mean embedding is that of texts in general, for a conditioner whose texts and
images are brought together (`conditioner.gap`).
"""

import random
import re
from pathlib import Path

import yaml

from ldm_lab.errors import UserError

GRAMMAR = Path(__file__).with_name("varied_texts.yaml")
COUNT = 4000
CAPTIONS = "captions"  # in place of a file of texts: the data's own
SLOT = re.compile(r"\{(\w+)\}")


def varied_texts(count: int = COUNT) -> list[str]:
    """Return the first `count` of them, each another one; always the same, whatever the version of Python."""
    grammar = yaml.safe_load(GRAMMAR.read_text(encoding="utf-8"))
    templates, lists = grammar["templates"], grammar["lists"]
    rng = random.Random("varied texts")

    def chosen(slot: re.Match[str]) -> str:
        entries = lists[slot[1]]
        entry = str(entries[int(rng.random() * len(entries))])  # the one method whose numbers Python promises to keep
        return SLOT.sub(chosen, entry)

    found: dict[str, None] = {}
    for number in range(20 * count):
        if len(found) == count:
            break
        found.setdefault(SLOT.sub(chosen, templates[number % len(templates)]))
    return [*found]


def texts_of(path: str | Path | None) -> list[str]:
    """Return the texts of a file, one a line, or ours. Raises UserError for a file without texts, or that is none."""
    if path is None:
        return varied_texts()
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file (texts, one a line)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: texts in UTF-8, one a line, are needed ({error})") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{file}: holds no text; one a line is needed")
    return found
