"""Parts as their source text describes them: names, options, types, bounds, defaults and meanings, without an import.

Importing a part takes seconds, as networks import torch; a typing mistake in a YAML should be told at once. So the text
is parsed (`ast`), and of its expressions the few kinds are evaluated that annotations, defaults and constants are made
of: literals, names, arithmetic, `Literal[...]`, `Annotated[...]`, and the constraints of annotated_types. Whatever else
stands in a registered class's signature is refused with its place (`Unreadable`).
"""

import ast
import importlib
import importlib.util
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from ldm_lab.config.bounds import TypeForm

Evaluated: TypeAlias = Any  # of an evaluated expression: a constant, a tuple of constants, a type
LIGHT = (
    "typing",
    "annotated_types",
    "math",
    "pathlib",
    "PIL.Image",
    "ldm_lab.config",
    "ldm_lab.config.bounds",
)  # imported for real
BUILTINS = {
    "int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict, "tuple": tuple, "len": len,
}  # fmt: skip
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.BitOr: operator.or_,
}  # fmt: skip
ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)")  # of the section "Args:" of a docstring


class Unreadable(Exception):
    """An expression that cannot be read without running the module."""


@dataclass(frozen=True)
class Option:
    """A keyword-only constructor argument of a part: a key that its section may have.

    Attributes:
        annotation: type and bounds.
        default: what holds if the key is left out; meaningless if it is required.
        required: whether the key has to be given.
        meaning: from the section "Args:" of the docstring.
    """

    annotation: TypeForm
    default: Evaluated
    required: bool
    meaning: str


class ModuleSource:
    """The text of a module.

    Attributes:
        name: dotted.
        path: of the file.
        classes: its top-level classes by name.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Parse a file. Raises SyntaxError, UnicodeDecodeError, OSError."""
        self.name, self.path = name, path
        self.tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        self._assigned = _assignments(self.tree.body)
        self._imported = dict(self._imports())

    def _imports(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield (local name, (module, name in it)); the latter is "" for a module itself."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname or "." not in alias.name:
                        yield alias.asname or alias.name, (alias.name, "")
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    module = ".".join([*above, *([module] if module else [])])
                for alias in node.names:
                    yield alias.asname or alias.name, (module, alias.name)

    def evaluate(self, node: ast.expr) -> Evaluated:
        """Return the value of an expression. Raises Unreadable."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() | ast.Attribute():
                return self._named(node)
            case ast.Tuple() | ast.List():
                return tuple(self._entries(node.elts)) if isinstance(node, ast.Tuple) else self._entries(node.elts)
            case ast.Dict() if None not in node.keys:
                return {self.evaluate(k): self.evaluate(v) for k, v in zip(node.keys, node.values) if k is not None}
            case ast.UnaryOp(op=ast.USub()):
                return -self.evaluate(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](self.evaluate(node.left), self.evaluate(node.right))
            case ast.Subscript():
                return self.evaluate(node.value)[self.evaluate(node.slice)]
            case ast.Call() if all(keyword.arg for keyword in node.keywords):
                keywords = {keyword.arg: self.evaluate(keyword.value) for keyword in node.keywords if keyword.arg}
                return self.evaluate(node.func)(*self._entries(node.args), **keywords)
        raise Unreadable(f"{self.path}:{node.lineno}: {ast.unparse(node)[:60]}")

    def _entries(self, nodes: list[ast.expr]) -> list[Evaluated]:
        entries = []
        for node in nodes:
            entries += self.evaluate(node.value) if isinstance(node, ast.Starred) else [self.evaluate(node)]
        return entries

    def _named(self, node: ast.Name | ast.Attribute) -> Evaluated:
        """Return what a name or `module.name` stands for."""
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in self._imported:
                module, name = self._imported[node.value.id]
                return _value_of(f"{module}.{name}" if name else module, node.attr, self._where(node))
        elif node.id in self._assigned:
            return self.evaluate(self._assigned[node.id])
        elif node.id in self._imported:
            return _value_of(*self._imported[node.id], self._where(node))
        elif node.id in BUILTINS:
            return BUILTINS[node.id]
        raise Unreadable(self._where(node))

    def constant(self, name: str, where: str) -> Evaluated:
        """Return the value of a top-level name. Raises Unreadable."""
        if name in self._assigned:
            return self.evaluate(self._assigned[name])
        if name in self._imported:
            return _value_of(*self._imported[name], where)
        raise Unreadable(where)

    def _where(self, node: ast.expr) -> str:
        return f"{self.path}:{node.lineno}: {ast.unparse(node)[:60]}"

    def find_class(self, node: ast.expr) -> "ClassSource | None":
        """Return the class that the name of a base class stands for; None if its source is of no interest."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = self._imported.get(node.value.id, ("", ""))
            return _class_of(f"{module}.{name}" if name else module, node.attr)
        if isinstance(node, ast.Name):
            if node.id in self.classes:
                return ClassSource(self, self.classes[node.id])
            return _class_of(*self._imported.get(node.id, ("", "")))
        return None


@dataclass(frozen=True)
class ClassSource:
    """The text of a class."""

    module: ModuleSource
    node: ast.ClassDef

    def bases(self) -> "list[ClassSource]":
        """Return the base classes whose text can be read; torch's and Lightning's are none of them."""
        return [found for base in self.node.bases if (found := self.module.find_class(base))]

    def summary(self) -> str:
        """Return the first line of the docstring."""
        return (ast.get_docstring(self.node) or "").partition("\n")[0]

    def registered(self) -> tuple[str, str] | None:
        """Return (role, name) of the decorator `@register(role, name)`, None without one."""
        for decorator in self.node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).rpartition(".")[2] == "register":
                names = [self.module.evaluate(argument) for argument in decorator.args]
                return str(names[0]), str(names[-1])
        return None

    def options(self) -> dict[str, Option]:
        """Return the keyword-only constructor arguments by name; of a dataclass its fields.

        Another class without a constructor has those of its base class. A `**common` in a constructor stands for those
        of the base class that it does not name itself. Raises Unreadable.
        """
        init = next((n for n in self.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None and any("dataclass" in ast.unparse(decorator) for decorator in self.node.decorator_list):
            return self._fields()
        inherited: dict[str, Option] = {}
        if init is None or init.args.kwarg is not None:
            inherited = next((found for base in self.bases() if (found := base.options())), {})
        if init is None:
            return inherited
        meanings = {**_meanings(ast.get_docstring(self.node)), **_meanings(ast.get_docstring(init))}
        own = {}
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults):
            if argument.annotation is None:
                raise Unreadable(f"{self.module.path}:{argument.lineno}: {argument.arg} has no annotation")
            own[argument.arg] = Option(
                self.module.evaluate(argument.annotation),
                None if default is None else self.module.evaluate(default),
                default is None,
                meanings.get(argument.arg, ""),
            )
        return {**own, **{name: option for name, option in inherited.items() if name not in own}}

    def _fields(self) -> dict[str, Option]:
        """Return the fields of a dataclass as options."""
        meanings, found = _meanings(ast.get_docstring(self.node)), {}
        for node in self.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name, default = node.target.id, node.value
                found[name] = Option(
                    self.module.evaluate(node.annotation),
                    None if default is None else self.module.evaluate(default),
                    default is None,
                    meanings.get(name, ""),
                )
        return found

    def constant(self, name: str) -> Evaluated:
        """Return the value of a class attribute, its own or a base class's. Raises Unreadable."""
        assigned = _assignments(self.node.body)
        if name in assigned:
            return self.module.evaluate(assigned[name])
        for base in self.bases():
            try:
                return base.constant(name)
            except Unreadable:
                continue
        raise Unreadable(f"{self.module.path}: {self.node.name}.{name}")


def find_module(dotted: str) -> Path | None:
    """Return the file of a module, or the `__init__.py` of a package, without importing anything; None without one."""
    top, *rest = dotted.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest)
        for file in (path.with_name(path.name + ".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def file_source(dotted: str, path: Path) -> ModuleSource:
    """Return the text of a module's file. Raises SyntaxError, UnicodeDecodeError, OSError."""
    return ModuleSource(dotted, path)


@cache
def module_source(dotted: str) -> ModuleSource | None:
    """Return the text of a module; None where there is none in Python. Raises SyntaxError and the like."""
    path = find_module(dotted)
    return None if path is None else file_source(dotted, path)


def _class_of(module: str, name: str) -> ClassSource | None:
    if module.partition(".")[0] in ("", "torch", "pytorch_lightning", "typing", "abc"):  # of no interest, and large
        return None
    source = module_source(module)
    if source is None:
        return None
    return source.find_class(ast.Name(name))


def _value_of(module: str, name: str, where: str) -> Evaluated:
    """Return what a module's name stands for."""
    if module in LIGHT:
        return vars(importlib.import_module(module))[name]
    source = module_source(module)
    if source is None:
        raise Unreadable(where)
    return source.constant(name, where)


def _assignments(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """Return name -> expression of the plain assignments of a module or class; of `a, b = 1, 2`, too."""
    assigned = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            assigned[node.target.id] = node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            (target,) = node.targets
            if isinstance(target, ast.Name):
                assigned[target.id] = node.value
            elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts)
                assigned.update({one.id: value for one, value in pairs if isinstance(one, ast.Name)})
    return assigned


def _meanings(docstring: str | None) -> dict[str, str]:
    """Return name -> text of the section "Args:" or "Attributes:" of a docstring cleaned by `ast.get_docstring`."""
    meanings: dict[str, str] = {}
    current: list[str] = []
    inside = False
    for line in (docstring or "").splitlines():
        if line in ("Args:", "Attributes:"):
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.strip():
            indent = len(line) - len(line.lstrip())
            entry = ENTRY.match(line.strip()) if indent == 4 else None
            if entry:
                current = entry[1].split(", ")
                meanings.update(dict.fromkeys(current, entry[2]))
            else:
                meanings.update({name: f"{meanings[name]} {line.strip()}" for name in current})
    return meanings
