"""docs/architecture.md says what calls what; each call is found in the source.

A flow is a numbered list of `file:symbol`. From each hop to the next there has to be a call by that symbol's name (a
class's name for its constructor). Where the call goes by another name, the callee's line says `(as NAME)`:

- `(as model)`: an instance is called, and the callee is its `forward` or `__call__`;
- `(as build("denoiser"))`: a registered class, built by its role; `(as info.load())`: by an expression that gives it;
- `(as self.predict)`: a function inside another one, which that one hands out;
- `(as trainer.fit)`: a hook that Lightning calls;
- `(handed on)`: the caller passes the function to what calls it;
- `(from 3)`: the caller is line 3 of the flow, not the line before.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
FLOWS = (
    "Batch to loss",
    "Prompt to PNG",
    "Config key to object",
    "Checkpoint to model",
    "Row to subset",
    "Shard to score",
)
HOOKS = {  # of Lightning: what is called -> what that calls
    "fit": ("training_step", "configure_optimizers", "on_fit_start", "train_dataloader", "setup"),
    "predict": ("predict_step", "predict_dataloader", "on_predict_start", "setup"),
}
HOP = re.compile(r"^\d+\. `([^`:]+):([^`]+)`(?: \(from (\d+)\))?(?: \(as `([^`]+)`\)| (\(handed on\)))?: \S", re.M)


@dataclass(frozen=True)
class Hop:
    """A line of a flow: where it stands, and how which hop (by number; 0 is the one before) calls it."""

    file: str
    symbol: str
    caller: int = 0
    alias: str = ""
    handed_on: bool = False

    @property
    def name(self) -> str:
        """What a call of it is named: a constructor by its class."""
        return self.symbol.removesuffix(".__init__").rpartition(".")[2]


def flows(text: str) -> dict[str, list[Hop]]:
    """Return heading -> hops."""
    sections = re.split(r"^### (.+)\n", text, flags=re.M)[1:]
    return {
        heading: [Hop(file, symbol, int(n or 0), alias, bool(on)) for file, symbol, n, alias, on in HOP.findall(body)]
        for heading, body in zip(sections[::2], sections[1::2])
    }


@cache
def module(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def find(tree: ast.AST, symbol: str) -> ast.AST:
    """Return the function or class of a dotted name. Raises KeyError."""
    for part in symbol.split("."):
        found = [
            node
            for node in ast.iter_child_nodes(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        if not found:
            raise KeyError(symbol)
        tree = found[0]
    return tree


def roles(node: ast.AST) -> set[str]:
    """Return the roles that a class is registered for."""
    return {
        call.args[0].value
        for call in getattr(node, "decorator_list", [])
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("register")
    }


def inside(file: str, outer: str) -> bool:
    """Return whether a symbol's outer one is a function, so that the symbol is a closure."""
    return bool(outer) and file.endswith(".py") and isinstance(find(module(file), outer), ast.FunctionDef)


def leads(caller: ast.AST, callee: Hop, target: ast.AST) -> bool:
    """Return whether there is a call (or, handed on, a mention) in `caller` that goes to `callee`."""
    names = [ast.unparse(node) for node in ast.walk(caller) if isinstance(node, ast.Name | ast.Attribute)]
    if callee.handed_on:
        return any(name.rpartition(".")[2] == callee.name for name in names)
    for node in ast.walk(caller):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if not callee.alias:
            if called.rpartition(".")[2] == callee.name:
                return True
        elif built := re.fullmatch(r"(\w+)\([\"'](\w+)[\"']\)", callee.alias):
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called.rpartition(".")[2] == built[1] and first == built[2] in roles(target):
                return True
        elif called == callee.alias or called.rpartition(".")[2] == callee.alias:
            outer, _, own = callee.symbol.rpartition(".")
            if inside(callee.file, outer):
                return True
            if called == callee.alias and roles(target) and "." not in callee.symbol:
                return True
            if own in ("forward", "__call__") or own in HOOKS.get(called.rpartition(".")[2], ()):
                return True
    return False


def test_all_flows_are_there():
    assert set(FLOWS) <= flows(DOCUMENT.read_text(encoding="utf-8")).keys()


@pytest.mark.parametrize("flow", flows(DOCUMENT.read_text(encoding="utf-8")))
def test_each_hop_calls_the_next(flow):
    hops = flows(DOCUMENT.read_text(encoding="utf-8"))[flow]
    assert len(hops) > 1, "hops are written: 1. `file:symbol`: what it does"
    nodes = []
    for hop in hops:
        assert (ROOT / hop.file).is_file(), f"{hop.file} does not exist"
        try:
            nodes.append(find(module(hop.file), hop.symbol))
        except KeyError:
            pytest.fail(f"{hop.file} has no {hop.symbol}")
    for i, (callee, target) in enumerate(zip(hops, nodes)):
        caller = callee.caller - 1 if callee.caller else i - 1
        assert caller < i, f"{callee.symbol} comes before what calls it"
        if i:
            assert leads(nodes[caller], callee, target), f"{hops[caller].symbol} does not call {callee.symbol}"


def test_every_numbered_line_of_a_flow_is_a_hop():
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\d+\. ", line)]
    assert len(lines) == sum(len(hops) for hops in flows(text).values())


def test_every_room_is_named():
    rooms = re.findall(r"^\| `([\w/.]+)`", DOCUMENT.read_text(encoding="utf-8"), re.M)
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "ldm_lab").iterdir()
        if (path.is_dir() and (path / "__init__.py").is_file()) or path.suffix == ".py"
    } - {"__init__.py"}
    assert {room for room in rooms if "/" not in room.rstrip("/")} == there


CALLER = """
def one(model, trainer, objective):
    two(model)
    model(1)
    trainer.fit(model)
    build("denoiser", 3)
    config.load()(3)
    Thread(target=objective.three)
    return objective.four(2)
"""


@pytest.mark.parametrize(
    ("callee", "found"),
    [
        (Hop("m", "two"), True),
        (Hop("m", "Other.four"), True),
        (Hop("m", "three"), False),
        (Hop("m", "three", handed_on=True), True),
        (Hop("m", "five", handed_on=True), False),
        (Hop("m", "Net.forward", alias="model"), True),
        (Hop("m", "Net.backward", alias="model"), False),
        (Hop("m", "Task.training_step", alias="trainer.fit"), True),
        (Hop("m", "Task.two_step", alias="trainer.fit"), False),
        (Hop("m", "Net", alias='build("denoiser")'), True),
        (Hop("m", "Net", alias='build("objective")'), False),
        (Hop("m", "Net", alias="config.load()"), True),
        (Hop("m", "Net", alias="config.read()"), False),
    ],
)
def test_calls_are_found(callee, found):
    target = ast.parse("@register('denoiser', 'net')\nclass Net: ...").body[0]
    assert leads(ast.parse(CALLER).body[0], callee, target) is found
