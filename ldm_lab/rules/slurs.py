"""A list of words that no caption may hold."""

import re
from pathlib import Path

from ldm_lab.config import register
from ldm_lab.errors import UserError
from ldm_lab.rules.rule import Row, Rule, V


@register("rule", "slurs")
class Slurs(Rule):
    """Leave out rows with a listed word in their caption, in any case; a missing or empty caption has none.

    Args:
        file: text file with one word or phrase a line. Blanks around it are left out, and so are empty lines: an empty
            entry would be in every caption.
        whole_words: the entry has to stand by itself, with no letter, digit or underscore on either side; otherwise it
            counts inside longer words, too, as in laionide's loader.
    """

    needs = ("caption",)

    def __init__(self, *, file: str, whole_words: bool = False):
        self.whole_words = whole_words
        path = Path(file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"rules.slurs.file: {path}: {reason}; a list with one word a line is needed") from None
        words = {word.strip().lower() for word in lines} - {""}
        if not words:
            raise UserError(f"rules.slurs.file: {path}: no word in it; one a line is needed")
        self.words = sorted(words)

    def violations(self, row: Row[V]) -> dict[str, V]:
        any_word = f"(?:{'|'.join(map(pattern_of, self.words))})"
        if self.whole_words:
            any_word = f"(?:^|[^{row.WORD}]){any_word}(?:[^{row.WORD}]|$)"
        return {"slur": row.text("caption").lower().re_search(any_word)}


def pattern_of(word: str) -> str:
    """Return a regular expression that finds a lower-case word in lower-case text, in RE2, Java and Python alike.

    They lower two letters in different ways: the Greek sigma at a word's end, and the dotted capital I.
    """
    parts = []
    for character in word.replace("i\u0307", "i"):
        if character in "σς":
            parts.append("[σς]")
        elif character == "i":
            parts.append("i\u0307?")
        else:
            parts.append(re.escape(character) if character.isascii() else character)
    return "".join(parts)
