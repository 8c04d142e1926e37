"""docs/troubleshooting.md: what it quotes is printed; keys, flags and commands that it names exist; it is linked."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm_lab.config.bounds import problem
from ldm_lab.config.checks import check_keys, check_mapping
from ldm_lab.config.overrides import parse
from ldm_lab.config.registry import MAPPINGS, ROLES, infos, use_keys
from ldm_lab.config.run_config import TOP

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^> (.+)$", PAGE, re.M)
CODE = re.findall(r"`([^`\n]+)`", PAGE)
FOREIGN = ("--shm-size", "--image_size", "--signal")  # flags of docker, img2dataset, sbatch


@cache
def strings() -> dict[Path, str]:
    """Return the strings of each module of the package; what a formatted string fills in is a NUL."""
    found = {}
    for path in sorted((ROOT / "ldm_lab").rglob("*.py")):
        texts = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("%r", "\0").replace("%d", "\0").replace("%s", "\0"))
        found[path] = "\n".join(texts)
    return found


@pytest.mark.parametrize("line", QUOTED)
def test_a_quoted_line_is_printed(line):
    pieces = [piece for piece in re.split(r"\.\.\.(?=[^\]]|$)", line) if len(piece.strip(" :;,()")) > 2]
    assert pieces, "something of it has to be the program's own"
    assert any(all(piece.strip() in text for piece in pieces) for text in strings().values())


def words() -> list[str]:
    """Return the words of all code in the page, as a shell takes them apart."""
    found = []
    for code in CODE:
        try:
            found += shlex.split(code)
        except ValueError:
            found.append(code)
    return found


def problems_of(word: str) -> list[str]:
    """Return what is wrong with an override `key=value` in all parts that it may mean; nothing if it fits one."""
    first, *rest = word.partition("=")[0].split(".")
    value = OmegaConf.to_container(parse(word)[1])[first]
    if not rest and first in TOP:
        found = problem(value, TOP[first])
        return [found] if found else []
    if not rest:  # a whole section taken back, or a key of a selection's YAML
        if first in ROLES:
            return [] if value is None else [f"{first}: a section"]
        return [] if first in infos("selection")["selection"].options else [f"{first}: unknown"]
    if first in MAPPINGS:
        return check_mapping(MAPPINGS[first], value, first)
    names = [{}] if "name" in value or first in infos(first) else [{"name": name} for name in infos(first)]
    tried = [check_keys(first, {**value, **name}, first) for name in names]
    return min(([found for found in each if "has to be given" not in found] for each in tried), key=len)


OVERRIDES = {word.rstrip(";") for word in words() if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word)} - {"key=value"}


@pytest.mark.parametrize("word", sorted(OVERRIDES))
def test_an_override_is_one(word):
    assert not problems_of(word)


def test_keys_that_are_named_exist():
    named = {code for code in CODE if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", code) and code.split(".")[0] in ROLES}
    assert named
    for key in named:
        first, second = key.split(".")[:2]
        assert any(second in {**info.options, **use_keys(first)} for info in infos(first).values()), key


def test_flags_and_commands_exist(program):
    flags = {word.partition("=")[0] for word in words() if re.match(r"--[a-z]", word)}
    text = program("sample", "--help")[1] + program("train", "--help")[1]
    text += program("ldm_lab.__main__", "app", "--help")[1]
    assert {"--guidance", "--mask"} <= flags
    assert not [flag for flag in flags - {*FOREIGN, "--flag"} if not re.search(rf"{flag}\b", text)]
    for command in set(re.findall(r"python -m ldm_lab (\w[\w-]*)", PAGE)):
        assert importlib.util.find_spec(f"ldm_lab.commands.{command.replace('-', '_')}"), command


def test_links():
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert anchor in anchors, anchor
    for page in ("README.md", "docs/training.md", "docs/sampling.md"):
        assert "troubleshooting.md" in (ROOT / page).read_text(), page
    assert len(re.findall(r"^### ", PAGE, re.M)) >= 40
