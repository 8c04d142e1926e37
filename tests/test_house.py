"""The numbers of tests/house.py stay within their bounds, and are counted as they should be."""

import ast

import house
import pytest


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.name)
def test_a_bound_holds(rule):
    places = rule.find()
    print(f"{len(places)} of at most {rule.bound}: {rule.name}")
    assert len(places) <= rule.bound, "\n".join([rule.name, *places])


def product_of(monkeypatch, *texts: str) -> None:
    sources = tuple(house.Source(f"m{i}.py", text, ast.parse(text)) for i, text in enumerate(texts))
    monkeypatch.setattr(house, "product", lambda: sources)


@pytest.mark.parametrize(
    "line",
    [
        "getattr(part, 'limit', None)",
        "hasattr(part, 'limit')",
        "vars(part)",
        "part.__dict__",
        "part.part_name == 'clip'",
        "suppress(AttributeError)",
        "try: pass\nexcept (KeyError, AttributeError): pass",
    ],
)
def test_asking_is_found(monkeypatch, line):
    product_of(monkeypatch, line, "part.limit\nisinstance(part, Limit)")
    assert len(house.asks()) == 1


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("def f(x: Any) -> int: ...", 1),
        ("def f(x: list[object]): ...", 1),
        ("def f(x: dict[str, int | str]): ...", 1),
        ("def f(x: Mapping[str, float | None]): ...", 0),
        ("def f(x: dict[str, int | float]): ...", 0),
        ("def f(x: dict): ...", 1),
        ("def f(x: 'Any'): ...", 1),
        ("def f(x): ...", 1),
        ("def f(\n    x,\n    y: Any,\n): ...", 2),
        ("class A:\n    def f(self, x: int): ...", 0),
        ("class A:\n    @staticmethod\n    def f(x): ...", 1),
        ("Config = dict[str, Any]\ndef f(x: Config): ...", 2),
        ("Value = int | str\nConfig = dict[str, Value]\ndef f(x: Config): ...", 2),
        ("Spec = Mapping[str, Kind]\nKind = A | B\ndef f(x: Spec): ...", 0),
        ("x: Any = 1", 1),
        ("class Config(dict[str, Any]):\n    'A config.'\ndef f(x: Config): ...", 1),
        ("class Config(dict[str, Any]):\n    def check(self) -> None: ...\ndef f(x: Config): ...", 0),
        ("f = lambda x: x", 0),
    ],
)
def test_vague_types_are_found(monkeypatch, text, lines):
    product_of(monkeypatch, text)
    assert len(house.untyped()) == lines, house.untyped()


def test_repeats_are_found_once(monkeypatch):
    block = "".join(f"line{i}(a, {i})\n" for i in range(9))
    product_of(monkeypatch, f"one()\n{block}", f"two()\n{block}three()\n", f"four()\n{block}")
    assert len(house.repeats()) == 2
    product_of(monkeypatch, "".join(f"import lib{i}\n" for i in range(9)) * 2)
    assert house.repeats() == []


@pytest.mark.parametrize(
    ("text", "does", "found"),
    [
        ("os.replace(a, b)", house.renames, True),
        ("path.replace(b)", house.renames, True),
        ("text.replace('a', 'b')", house.renames, False),
        ("table.rename({'a': 'b'})", house.renames, False),
        ("from urllib import request", house.speaks_http, True),
        ("import urllib.parse", house.speaks_http, False),
        ("hashlib.sha256(path.read_bytes())", house.hashes_files, True),
        ("hashlib.file_digest(file, 'sha256')", house.hashes_files, True),
        ("hashlib.sha256(key.encode())", house.hashes_files, False),
        ("entry.partition('=')", house.reads_pairs, True),
        ("entry.partition(':')", house.reads_pairs, False),
    ],
)
def test_what_is_said_once_is_found(monkeypatch, text, does, found):
    product_of(monkeypatch, text)
    assert bool(house.modules_that(does)) is found
