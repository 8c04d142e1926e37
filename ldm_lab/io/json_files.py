"""Small JSON files: read with distrust, written atomically."""

import json
from collections.abc import Iterator
from pathlib import Path

from ldm_lab.io.atomic import atomic_write

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class JsonObject(dict[str, Json]):
    """An object of a JSON file."""


class Fields:
    """An object of a JSON file, whose values are asked for by type: None, or nothing, for what is of another one."""

    MOST = 2**40  # no file counts more of anything

    def __init__(self, content: Json) -> None:
        self._content = content if isinstance(content, dict) else {}

    def text(self, key: str) -> str | None:
        """Return a text."""
        value = self._content.get(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str) -> bool | None:
        """Return a truth value."""
        value = self._content.get(key)
        return value if isinstance(value, bool) else None

    def count(self, key: str) -> int | None:
        """Return a whole number from 0 on."""
        counts = _counts([self._content.get(key)])
        return counts[0] if counts else None

    def counts(self, key: str) -> tuple[int, ...] | None:
        """Return a list of whole numbers from 0 on."""
        value = self._content.get(key)
        return _counts(value) if isinstance(value, list) else None

    def has(self, key: str) -> bool:
        """Return whether there is a value that is not null."""
        return self._content.get(key) is not None

    def named(self, key: str) -> "dict[str, Fields] | None":
        """Return an object of objects."""
        value = self._content.get(key)
        if not isinstance(value, dict) or not all(isinstance(its, dict) for its in value.values()):
            return None
        return {name: Fields(its) for name, its in value.items()}

    def is_null(self, key: str) -> bool:
        """Return whether null stands there, not nothing at all."""
        return key in self._content and self._content[key] is None

    def number(self, key: str) -> float | None:
        """Return a number; NaN and infinity, which JSON has not, are written as texts."""
        value = self._content.get(key)
        if value in ("nan", "inf", "-inf"):
            return float(str(value))
        try:
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        except OverflowError:  # a whole number of hundreds of digits
            return None

    def sequence(self, key: str) -> list[str]:
        """Return a list of texts; what is none is left out."""
        value = self._content.get(key)
        return [its for its in value if isinstance(its, str)] if isinstance(value, list) else []

    def listed(self, key: str) -> "list[Fields] | None":
        """Return a list of objects."""
        value = self._content.get(key)
        return [Fields(its) for its in value] if isinstance(value, list) else None

    def inside(self, key: str) -> "Fields | None":
        """Return an object."""
        value = self._content.get(key)
        return Fields(value) if isinstance(value, dict) else None

    def numbers(self, key: str) -> dict[str, int]:
        """Return an object of whole numbers from 0 on; what is none is left out."""
        inner = self.inside(key) or Fields({})
        return {name: number for name in inner._content if (number := inner.count(name)) is not None}

    def flat(self) -> Iterator[tuple[str, str]]:
        """Yield (key path, value) of all that is no object, texts as they are, all else as JSON."""
        for name, value in self._content.items():
            if isinstance(value, dict):
                yield from ((f"{name}.{inner}", its) for inner, its in Fields(value).flat())
            else:
                yield str(name), value if isinstance(value, str) else json.dumps(value, default=str)

    def words(self, key: str) -> list[tuple[str, str]]:
        """Return an object of texts, (name, text) each; what is none is left out."""
        inner = self.inside(key) or Fields({})
        return [(name, text) for name in inner._content if (text := inner.text(name)) is not None]

    def all_texts(self, key: str) -> list[str] | None:
        """Return a list of texts; None if it holds anything else."""
        value = self._content.get(key)
        texts = [text for text in value if isinstance(text, str)] if isinstance(value, list) else None
        return texts if isinstance(value, list) and texts is not None and len(texts) == len(value) else None

    def texts(self, key: str) -> dict[str, list[str]]:
        """Return an object of lists of texts; what is none is left out."""
        inner = self.inside(key) or Fields({})
        lists = {name: value for name, value in inner._content.items() if isinstance(value, list)}
        return {name: [text for text in value if isinstance(text, str)] for name, value in lists.items()}

    def written(self, key: str) -> dict[str, str] | None:
        """Return an object, each of its values as JSON, which is the same for equal values."""
        inner = self.inside(key)
        return (
            None if inner is None else {name: json.dumps(its, sort_keys=True) for name, its in inner._content.items()}
        )


def _counts(values: list[Json]) -> tuple[int, ...] | None:
    """Return whole numbers from 0 on; None if some are not."""
    found = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= Fields.MOST]
    return tuple(found) if len(found) == len(values) else None


def parse_json(data: bytes | None) -> JsonObject:
    """Return the object that some JSON stands for; an empty one if there is none, or it is not readable."""
    try:
        content = json.loads(data or b"{}")
    except (ValueError, RecursionError):  # not JSON, not UTF-8
        return JsonObject()
    return JsonObject(content if isinstance(content, dict) else {})


def read_json(path: Path) -> JsonObject:
    """Return the object in a JSON file; an empty one if it is not there or is not readable."""
    try:
        return parse_json(path.read_bytes())
    except OSError:
        return JsonObject()


def write_json(path: Path, content: dict[str, Json]) -> None:
    """Write an object to a JSON file. Raises UserError when it cannot be written."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode())
