"""Code that leaves the program: classes and functions of ours with all that they call, as the text of one module.

Nothing is written twice: the text is taken from the modules, without decorators that register and methods that only
training calls. What a definition calls is found by its names; imports from the package become definitions, others stay.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "ldm_lab"
HERE = "ldm_lab.sharing.stand_ins"
REDIRECTED = {
    "ldm_lab.errors:UserError": f"{HERE}:UserError",
    "ldm_lab.interfaces:Denoiser": f"{HERE}:Network",
    "ldm_lab.interfaces:Conditioner": f"{HERE}:Conditioner",
    "ldm_lab.interfaces:ConditionSource": f"{HERE}:Source",
    "ldm_lab.interfaces:Objective": f"{HERE}:Contract",
    "ldm_lab.interfaces:Sampler": f"{HERE}:Contract",
    "ldm_lab.conditioners.embedding:EmbeddingConditioner": f"{HERE}:Conditioner",
    "ldm_lab.config:check_options": f"{HERE}:check_options",
    "ldm_lab.config:signature_options": f"{HERE}:signature_options",
    "ldm_lab.clip_tokens:_merges": f"{HERE}:given_merges",
    "ldm_lab.conditioners.glide_text:gpt2_encoding": f"{HERE}:gpt2_encoding",
    "ftfy:": f"{HERE}:Ftfy",
    "einops:rearrange": f"{HERE}:rearrange",
    "einops:repeat": f"{HERE}:repeat",
}
OF_TRAINING = {
    *("check", "unused", "check_denoiser", "loss_terms", "from_batch", "reduce", "freeze_groups", "adapt_state_dict"),
    *("outer_layers", "image_transform", "encode_image", "weights_identity", "look_in", "merges_file"),
}  # methods
HEADER = '''"""{title}

Written by ldm_lab, whose own code this is; it needs {needs}. MIT license, (c) the ldm_lab authors.
"""

from __future__ import annotations

{imports}
'''


@dataclass
class Module:
    """A module of the package, as text.

    Attributes:
        name: dotted.
        text: of its file.
        definitions: name -> its class, function or assignment.
        imports: name -> (module, the name in it; "" for the module itself).
    """

    name: str
    text: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@functools.cache
def module_of(name: str) -> Module:
    """Return a module, read and not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    module = Module(name, Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.parse(module.text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [its.id for target in targets for its in ast.walk(target) if isinstance(its, ast.Name)]
            module.definitions |= dict.fromkeys(names, node)
        elif isinstance(node, ast.Import):
            module.imports |= {(its.asname or its.name).split(".")[0]: (its.name, "") for its in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            module.imports |= {its.asname or its.name: (node.module, its.name) for its in node.names}
    return module


@functools.cache
def is_module(name: str) -> bool:
    """Return whether a dotted name is that of a module of the package."""
    try:
        return name.startswith(PACKAGE) and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Definition:
    """Where a name leads: a definition of the package's."""

    module: str
    name: str


class Standalone:
    """The text of one module, made of definitions of the package's."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.imports = {"from torch import Tensor"}
        self.names: dict[Definition, str] = {}  # what they are called here: of two of the same name, one gets a number
        self.defined: set[Definition] = set()
        self.waiting: list[Definition] = []

    def add(self, module: str, name: str) -> str:
        """Add a definition, and all that it needs. Returns what it is called here."""
        wanted = Definition(module, name)
        self._define(wanted)
        while self.waiting:
            self._define(self.waiting.pop(0))
        return self.name_of(wanted)

    def text(self, title: str, needs: str, tail: str = "") -> str:
        """Return the module's text.

        Args:
            title: its docstring.
            needs: what has to be installed, in words.
            tail: what follows the definitions; lines that import go to the others.
        """
        lines = tail.splitlines()
        self.imports |= {line for line in lines if line.startswith(("import ", "from "))}
        rest = "\n".join(line for line in lines if line not in self.imports).strip()
        imports = sorted(self.imports, key=lambda line: (not line.startswith("import "), line))
        head = HEADER.format(title=title, needs=needs, imports="\n".join(imports))
        code = head + "\n\n" + "\n\n\n".join([*self.texts, *([rest] if rest else [])]) + "\n"
        for node in ast.walk(ast.parse(code)):
            names = [its.name for its in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(its.split(".")[0] == PACKAGE for its in names), f"{title}: imports {names}"
        return code

    def name_of(self, definition: Definition) -> str:
        """Return what a definition is called here."""
        if definition not in self.names:
            name, number = definition.name, 2
            while name in self.names.values():
                name, number = f"{definition.name}_{number}", number + 1
            self.names[definition] = name
        return self.names[definition]

    def _lead(self, module: str, name: str) -> Definition | None:
        """Return where a name of a module leads; None if that is none of ours: an import of it is added."""
        while f"{module}:{name}" not in REDIRECTED:
            source = module_of(module)
            if name in source.definitions:
                return Definition(module, name)
            if name not in source.imports:
                return None
            origin, its = source.imports[name]
            if f"{origin}:{its}" not in REDIRECTED and not origin.startswith(PACKAGE):
                known = f" as {name}" if name != (its or origin.split(".")[0]) else ""
                self.imports.add(f"from {origin} import {its}{known}" if its else f"import {origin}{known}")
                return None
            module, name = origin, its
        return Definition(*REDIRECTED[f"{module}:{name}"].split(":"))

    def _define(self, definition: Definition) -> None:
        """Add a definition, after what it needs as it is read; what its functions call waits."""
        if definition in self.defined:
            return
        self.defined.add(definition)
        source = module_of(definition.module)
        node, replaced = source.definitions[definition.name], []
        for used, is_soft in names_in(node):
            first = used.value.id if isinstance(used, ast.Attribute) and isinstance(used.value, ast.Name) else ""
            inside = ".".join(source.imports.get(first or last_name(used), ("", "")))
            if is_module(inside) != bool(first):
                continue
            target = (
                self._lead(inside, used.attr) if isinstance(used, ast.Attribute) else self._lead(source.name, used.id)
            )
            if target is None:
                continue
            if self.name_of(target) != last_name(used) or first:
                replaced.append((used, self.name_of(target)))
            if is_soft:
                self.waiting.append(target)
            else:
                self._define(target)
        self.texts.append(text_of(source, node, replaced, self.name_of(definition)))


Used = ast.Name | ast.Attribute


def last_name(used: Used) -> str:
    """Return a name, or the last part of a dotted one."""
    return used.id if isinstance(used, ast.Name) else used.attr


def names_in(node: ast.AST, is_soft: bool = False) -> Iterator[tuple[Used, bool]]:
    """Yield (name or attribute of a name, whether it waits until something is called) of code; not of annotations."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        yield node, is_soft
    if isinstance(node, ast.Name):
        yield node, is_soft
    for key, value in ast.iter_fields(node):
        children = [its for its in (value if isinstance(value, list) else [value]) if isinstance(its, ast.AST)]
        for child in children:
            if key in ("annotation", "returns") or is_left_out(child):
                continue
            yield from names_in(child, is_soft or (isinstance(node, ast.FunctionDef) and key == "body"))


def is_left_out(node: ast.AST) -> bool:
    """Return whether a node is not taken along: a decorator that registers, a method of training."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id.startswith("register")
    return isinstance(node, ast.FunctionDef) and node.name in OF_TRAINING


def text_of(source: Module, node: ast.stmt, replaced: Sequence[tuple[Used, str]], name: str) -> str:
    """Return the text of a definition under a name, without what is left out, and with other names for what it uses."""
    lines = [line.encode() for line in source.lines]  # the columns of the tree count bytes
    for used, new in sorted(replaced, key=lambda pair: (pair[0].lineno, -pair[0].col_offset)):
        line = lines[used.lineno - 1]
        assert used.end_col_offset is not None
        lines[used.lineno - 1] = line[: used.col_offset] + new.encode() + line[used.end_col_offset :]
    if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name != name:
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f" {node.name}".encode(), f" {name}".encode(), 1)
    first, last = node.lineno, node.end_lineno or node.lineno
    dropped: set[int] = set()
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        kept = [its for its in node.decorator_list if not is_left_out(its)]
        first = min([node.lineno, *(its.lineno for its in kept)])
        for its in node.decorator_list:
            if its not in kept:
                dropped |= set(range(its.lineno, (its.end_lineno or its.lineno) + 1))
    for child in ast.iter_child_nodes(node) if isinstance(node, ast.ClassDef) else ():
        if is_left_out(child) and isinstance(child, ast.FunctionDef):
            begin = min([child.lineno, *(its.lineno for its in child.decorator_list)])
            dropped |= set(range(begin, (child.end_lineno or child.lineno) + 1))
    text = b"\n".join(line for number, line in enumerate(lines, 1) if first <= number <= last and number not in dropped)
    return text.decode().rstrip()
