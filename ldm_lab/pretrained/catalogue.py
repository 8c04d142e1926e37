"""The catalogue of released weights, `released.yaml`: read when it is first asked for, and checked as it is read."""

import functools
import re
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files

import yaml

from ldm_lab.io.json_files import Json, JsonObject

ROLES = ("autoencoder", "conditioner", "model", "head", "rating", "guide", "metric")
SAFE_PART = r"[A-Za-z0-9_][\w.+-]*"  # of a name or path: no "..", nothing hidden


@dataclass(frozen=True)
class Released:
    """A released file.

    Attributes:
        role: the role of the part that it holds; "model" for a whole denoiser.
        what: one line for the user.
        file: its name in the cache.
        mirrors: http(s) addresses, tried in this order; none if no trustworthy one is known.
        sha256: its checksum; None if its publisher gave none. Then the one seen first holds from there on.
        size: bytes, or None if not known.
        license: as the page says.
        page: where it is described.
        config: keys of the part that the file does not say.
        instead: overrides of a config with which a new training does without it; "" if none are known.
    """

    role: str
    what: str
    file: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None
    size: int | None = None
    license: str = "not stated"
    page: str = ""
    config: JsonObject = field(default_factory=JsonObject)
    instead: str = ""


@functools.cache
def catalogue() -> dict[str, Released]:
    """Return all released weights by name."""
    text = files("ldm_lab.pretrained").joinpath("released.yaml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> dict[str, Released]:
    """Return the entries of a catalogue's YAML. Raises ValueError that names the entry and the key that is wrong."""
    entries = yaml.safe_load(text)
    if not isinstance(entries, dict):
        raise ValueError("a catalogue is a mapping of names to entries")
    return {str(name): _entry(str(name), entry) for name, entry in entries.items()}


def _entry(name: str, written: Json) -> Released:
    """Return an entry. Raises ValueError for an unknown or missing key, or a value that cannot be right."""
    if not isinstance(written, dict):
        raise ValueError(f"{name}: a mapping is needed")
    known = {f.name: f for f in fields(Released)}
    wrong = [key for key in written if key not in known]
    wrong += [key for key, f in known.items() if key not in written and f.default is f.default_factory is MISSING]
    text = {key: written.get(key, "") for key in ("role", "what", "file", "sha256", "license", "page", "instead")}
    wrong += [key for key, value in text.items() if not isinstance(value, str)]
    mirrors, size, config = written.get("mirrors", []), written.get("size"), written.get("config", {})
    checks = {
        "name": all(re.fullmatch(SAFE_PART, part) for part in name.split("/")),
        "role": written.get("role") in ROLES,
        "file": re.fullmatch(SAFE_PART, str(written.get("file"))),
        "mirrors": isinstance(mirrors, list) and all(re.fullmatch(r"https?://\S+", str(url)) for url in mirrors),
        "sha256": re.fullmatch(r"([0-9a-f]{64})?", str(text["sha256"])),
        "size": size is None or (isinstance(size, int) and size > 0),
        "config": isinstance(config, dict),
    }
    wrong += [key for key, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]}: unknown, missing or wrong in this entry of the catalogue")
    return Released(**{**written, "mirrors": tuple(mirrors), "config": JsonObject(config)})
