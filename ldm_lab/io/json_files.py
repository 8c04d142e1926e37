"""Small JSON files: read with distrust, written atomically."""

import json
from pathlib import Path

from ldm_lab.io.atomic import atomic_write

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class JsonObject(dict[str, Json]):
    """An object of a JSON file."""


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
