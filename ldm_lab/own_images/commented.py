"""A YAML with comments, changed without losing them: a recipe's text with some of its values replaced."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

COLUMN = 38  # at which comments begin, unless the line is longer
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?P<value>( [^#\n]*?(\"[^\"\n]*\"|'[^'\n]*')?)?)(?P<comment>\s+#.*)?")


@dataclass(frozen=True)
class Setting:
    """A value for a key path.

    Attributes:
        path: such as "data.path".
        value: as YAML has it in one line; None takes the key out.
        comment: behind it; None leaves the comment that is there.
    """

    path: str
    value: str | None
    comment: str | None = None


def text(value: str) -> str:
    """Return a text as YAML has it in one line, in quotes where it needs them, and safe from interpolation."""
    plain = yaml.safe_dump(value, width=10**9, allow_unicode=True, default_flow_style=True).strip().removesuffix("...")
    plain = plain.strip()
    if not value.isprintable():  # a line end, say: in double quotes it is escaped
        plain = yaml.safe_dump(value, width=10**9, allow_unicode=True, default_style='"').strip()
    return plain.replace("${", "\\\\${" if plain.startswith('"') else "\\${")


def in_comment(path: Path) -> str:
    """Return a path as a comment can hold it: one with a line end or another control character as Python writes it."""
    return written if (written := str(path)).isprintable() else ascii(written)


def laid_over(recipe: str, settings: Iterable[Setting]) -> str:
    """Return a recipe's text with some settings in place of its own.

    Args:
        recipe: sections indented by two, a key a line; sections in braces in one line are taken, too.
        settings: in the order in which they are made; what is not there yet comes at the end of its section.
    """
    lines = recipe.splitlines()
    for setting in settings:
        lines = _with(lines, setting.path.split("."), setting)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def without_head(recipe: str) -> str:
    """Return a recipe without the comment on top of it."""
    lines = recipe.splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[first:])


def settings_of(recipe: str) -> list[Setting]:
    """Return what a recipe of plain keys says, as settings that lay it over another one."""
    found, above = [], list[str]()
    for line in recipe.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            continue
        above = [*above[: len(match["indent"]) // 2], match["key"]]
        if match["value"].strip():
            comment = match["comment"].strip().removeprefix("#").strip() if match["comment"] else None
            found.append(Setting(".".join(above), match["value"].strip(), comment))
    return found


def _with(
    lines: list[str], path: Sequence[str], setting: Setting, first: int = 0, last: int | None = None
) -> list[str]:
    """Return lines of which those from `first` to `last` have the setting, which is at `path` within them."""
    last = len(lines) if last is None else last
    indent = " " * 2 * (setting.path.count(".") + 1 - len(path))
    at = next((i for i in range(first, last) if lines[i].startswith(f"{indent}{path[0]}:")), None)
    if at is None:
        if setting.value is None:
            return lines
        if not indent and len(path) == 1:  # at the top, with the others that are no sections
            last = next((i for i in range(first, last) if not lines[i].strip()), last)
        while last > first and not lines[last - 1].strip():
            last -= 1
        own = [f"{indent}{'  ' * depth}{key}:" for depth, key in enumerate(path)]
        own[-1] = _line(own[-1], setting.value, setting.comment)
        return [*lines[:last], *([""] if not indent and len(path) > 1 else []), *own, *lines[last:]]
    end = next((i for i in range(at + 1, last) if lines[i].strip() and not lines[i].startswith(f"{indent}  ")), last)
    match = LINE.fullmatch(lines[at])
    assert match is not None, lines[at]
    if len(path) == 1:
        comment = match["comment"].strip().removeprefix("#").strip() if match["comment"] else None
        comment = comment if setting.comment is None else setting.comment
        new = [] if setting.value is None else [_line(f"{indent}{path[0]}:", setting.value, comment)]
        while end > at + 1 and not lines[end - 1].strip():
            end -= 1  # an empty line behind a section stays
        return [*lines[:at], *new, *lines[end:]]
    if match["value"].strip():
        section = yaml.safe_load(match["value"])
        assert isinstance(section, dict), lines[at]
        inner = section
        for key in path[1:-1]:
            inner = inner.setdefault(key, {})
        if setting.value is None:
            inner.pop(path[-1], None)
        else:
            inner[path[-1]] = yaml.safe_load(setting.value)
        flow = yaml.safe_dump(section, default_flow_style=True, sort_keys=False, width=10**9).strip()
        return [*lines[:at], f"{indent}{path[0]}: {flow}{match['comment'] or ''}", *lines[at + 1 :]]
    return _with(lines, path[1:], setting, at + 1, end)


def _line(key: str, value: str, comment: str | None) -> str:
    line = f"{key} {value}"
    return f"{line.ljust(COLUMN - 1)} # {comment}" if comment else line
