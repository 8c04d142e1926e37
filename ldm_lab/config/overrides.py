"""`key=value` words of a command line, and the rule for putting another part in a section's place.

A value is read as YAML does, with numbers such as 3e-5 and 50_000; the same for all commands.

Another part takes a section's place by `data.name=folder`, by `data={name: folder, ...}`, or by another `name` in a
file that overlays its `defaults:`. Then the keys of the part before that the new one does not have are left out, and
those that belong to its weights, too.
"""

import re
from collections import Counter
from collections.abc import Iterable

from omegaconf import DictConfig, DictKeyType, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from ldm_lab.config.bounds import PartSection, Plain, marker
from ldm_lab.config.registry import MAPPINGS, ROLES, PartInfo, part_info
from ldm_lab.errors import UserError, first_line

CLOCK = re.compile(r"\d+(:\d+)+")


def parse(word: str, example: str = "optim.lr=3e-6") -> tuple[str, DictConfig]:
    """Return the key path of a `key.path=value` word, and the nested mapping that it stands for. Raises UserError."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r}: is written key=value, such as {example}")
    if CLOCK.fullmatch(value):  # 11:30:00 is a number to base 60 in YAML, 08:30:00 is text
        word = f"{key}='{value}'"
    try:
        return key, OmegaConf.from_dotlist([word])
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{word!r}: {yaml_error(error)}") from None


def values(words: Iterable[str], example: str) -> dict[str, Plain]:
    """Return key -> value of `key=value` words without sections. Raises UserError for a word that is none."""
    words = list(words)
    check_once(words)
    parsed = [OmegaConf.to_container(parse(word, example)[1]) for word in words]
    return {str(key): value for mapping in parsed for key, value in mapping.items()}


def split_name(word: str) -> tuple[str, str]:
    """Return the name and the rest of "NAME=rest"; "" and the word itself if it gives none."""
    name, equals, rest = word.partition("=")
    return (name, rest) if equals else ("", word)


def check_once(words: Iterable[str]) -> None:
    """Raise UserError if a key is given twice."""
    words = list(words)
    for key, count in Counter(word.partition("=")[0] for word in words).items():
        if count > 1:
            given = ", ".join(repr(word) for word in words if word.partition("=")[0] == key)
            raise UserError(
                f"{key}: is given {count} times ({given[:200]}); a shell makes several words of an unquoted "
                f"{{0..3}}: put quotes around it, {key}='...'"
            )


def apply(config: DictConfig, words: Iterable[str]) -> DictConfig:
    """Return a config with `key.path=value` words laid over it, in any order. Raises UserError."""
    words = list(words)
    check_once(words)
    parsed = [(word, parse(word)) for word in words]
    for word, (_, overlay) in sorted(parsed, key=lambda entry: not entry[1][0].endswith(".name")):  # names first
        config = overlaid(config, overlay, repr(word))
    return config


def overlaid(config: DictConfig, overlay: DictConfig, what: str) -> DictConfig:
    """Return a config with another laid over it, after the rule for a part in another's place.

    Args:
        config: what lies below.
        overlay: what is laid over it.
        what: the overlay is, for the message: a word of the command line, a file.

    Raises:
        UserError: a list in the place of a section, or a section in the place of a list.
    """
    if found := _list_beside_section(config, overlay):
        raise UserError(f"{what}: {found}")
    for key in overlay:
        role = MAPPINGS.get(str(key), str(key))
        if role in ROLES and key not in MAPPINGS:
            _replace(role, _section(config, key), _section(overlay, key))
    try:
        merged = OmegaConf.merge(config, overlay)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise UserError(f"{what}: {yaml_error(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _list_beside_section(below: DictConfig, above: DictConfig, path: str = "") -> str:
    """Return at which key path one of two configs has a list and the other a section, in words; "" if nowhere."""
    for key in above:
        one, other, inner = _section_or_list(below, key), _section_or_list(above, key), f"{path}{key!s}"
        if isinstance(one, ListConfig) and isinstance(other, DictConfig):
            return f"{inner} is a list, {list(one)}, and a section is given; give all of the list: {inner}=[...]"
        if isinstance(one, DictConfig) and isinstance(other, ListConfig):
            return f"{inner} is a section of key: value lines, and a list is given, {list(other)}"
        if not (isinstance(one, DictConfig) and isinstance(other, DictConfig)):
            continue
        if found := _list_beside_section(one, other, f"{inner}."):
            return found
    return ""


def _section_or_list(config: DictConfig, key: DictKeyType) -> DictConfig | ListConfig | None:
    """Return what a key has if that is a section or a list."""
    found = config._get_node(key)
    if isinstance(found, DictConfig | ListConfig) and isinstance(found._content, dict | list):
        return found
    return None


def _section(config: DictConfig, key: DictKeyType) -> DictConfig | None:
    if not OmegaConf.is_dict(config) or OmegaConf.is_missing(config, key):
        return None
    found = config._get_node(key)
    return found if isinstance(found, DictConfig) and not found._is_none() and not found._is_interpolation() else None


def _replace(role: str, before: DictConfig | None, overlay: DictConfig | None) -> None:
    """Take out of a section what does not go with the part that an overlay puts into its place."""
    if before is None or overlay is None:
        return
    try:
        old = part_info(role, before.get("name"))
        new = part_info(role, overlay.get("name", before.get("name")))
        left_behind = _left_behind(old, new) if old is not new else set()
        _ = new.options
    except UserError:
        return  # the check says what is wrong
    for key in left_behind:
        before.pop(key, None)
    for key, option in new.options.items():
        mark = marker(option.annotation)
        if isinstance(mark, PartSection):
            inner = _section(before, key)
            if inner is not None and mark.name is not None and "name" not in inner:
                inner = None
            _replace(mark.role, inner, _section(overlay, key))


def _left_behind(old: PartInfo, new: PartInfo) -> set[str]:
    """Return the keys of a part that another one in its place does not take over."""
    use = ROLES[old.role].use
    return (old.options.keys() - new.options.keys()) | set(use.OF_WEIGHTS if use else ())


def yaml_error(error: Exception) -> str:
    """Return the first line of an error of OmegaConf's or of the YAML reader, with its place if it has one."""
    if isinstance(error, MarkedYAMLError) and error.problem:
        return error.problem + (f" (line {error.problem_mark.line + 1})" if error.problem_mark else "")
    return first_line(error)
