"""The rules of this code base in numbers: `python tests/house.py` prints them, `-v` with every place that is counted.

The product (`ldm_lab`, `train.py`, `sample.py`) is read by `ast`. Each rule counts places; `RULES` says how many there
may be, and `tests/test_house.py` holds them to it.
"""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFLECTION = ("getattr", "hasattr", "vars", "getattr_static", "getmembers", "attrgetter", "methodcaller")
LONGEST_FUNCTION, LONGEST_CLASS, LONGEST_MODULE = 60, 250, 400  # lines, docstrings included
WINDOW = 6  # lines that make a repeat

# "file: expression" of lines that ask a library or the platform, not a part, what it is -> why.
ASKED_ELSEWHERE: dict[str, str] = {
    "ldm_lab/config/checks.py: inspect.getmembers(cls, inspect.isfunction)": "a class need not have a `check`",
    "ldm_lab/config/contracts.py: inspect.getmembers(interfaces)": "the contract of a role, by its name",
    "ldm_lab/config/contracts.py: inspect.getmembers(base)": "what a contract asks for",
    "ldm_lab/config/contracts.py: inspect.getmembers(cls)": "what a class has of it, when it is registered",
    "ldm_lab/config/contracts.py: inspect.getmembers(owner, inspect.isfunction)": "the attributes that methods set",
    "ldm_lab/config/reading.py: vars(importlib.import_module(module))": "names of typing and annotated_types",
    "ldm_lab/config/registry.py: inspect.getmembers(self.load())": "a constant of a class without a file",
}
# "file" or "file:qualified name" of what is larger than it should be -> why.
LARGE: dict[str, str] = {}
# Modules that rename without writing a file in one step -> why.
RENAMED_ELSEWHERE: dict[str, str] = {
    "ldm_lab/curation/metadata/spark_engine.py": "numbers Spark's parts, in a folder that is not yet in place",
}
# Names of imports that are other than the distribution's -> the distribution.
DISTRIBUTIONS = {
    **{"PIL": "pillow", "pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"},
    **{"open_clip": "open_clip_torch", "yaml": "pyyaml", "ibis": "ibis-framework"},
}


@dataclass(frozen=True)
class Source:
    """A module of the product: its path from the root, its text, its tree."""

    path: str
    text: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    def at(self, node: ast.AST, what: str = "") -> str:
        """Return "file:line: what"; without `what`, the line itself."""
        return f"{self.path}:{node.lineno}: {what or self.text.splitlines()[node.lineno - 1].strip()}"


@dataclass(frozen=True)
class Rule:
    """A number that has a bound.

    Attributes:
        name: in the table.
        bound: how many places there may be.
        find: returns the places, one line each.
    """

    name: str
    bound: int
    find: Callable[[], list[str]]


@cache
def product() -> tuple[Source, ...]:
    """Return all modules that users get."""
    paths = [*sorted((ROOT / "ldm_lab").rglob("*.py")), ROOT / "train.py", ROOT / "sample.py"]
    return tuple(
        Source(str(path.relative_to(ROOT)), text := path.read_text(encoding="utf-8"), ast.parse(text)) for path in paths
    )


def called(node: ast.AST) -> str:
    """Return the dotted name that a call calls; "" for anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def one_a_line(places: list[str]) -> list[str]:
    """Return the places with one for each "file:line"."""
    return list({":".join(place.split(":")[:2]): place for place in places}.values())


# ------------------------------------------------------------------------------------------------ asking, size, types


def asks() -> list[str]:
    """Lines that ask a part what it is, by attribute or by name."""
    found = []
    for source in product():
        for node in ast.walk(source.tree):
            expression = asked(node)
            if expression and f"{source.path}: {expression}" not in ASKED_ELSEWHERE:
                found.append(source.at(node))
    return one_a_line(found)


def asked(node: ast.AST) -> str:
    """Return the expression by which a node asks something what it is; "" if it does not."""
    if isinstance(node, ast.ExceptHandler):
        return "except AttributeError" if node.type and "AttributeError" in ast.unparse(node.type) else ""
    name = called(node)
    if name.endswith("suppress") and "AttributeError" in ast.unparse(node):
        return ast.unparse(node)
    reflected = name.removeprefix("inspect.").removeprefix("operator.") in REFLECTION
    own_dict = isinstance(node, ast.Attribute) and node.attr == "__dict__"
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    by_name = any(isinstance(side, ast.Attribute) and side.attr == "part_name" for side in sides)
    return ast.unparse(node) if reflected or own_dict or by_name else ""


def sized(node: ast.AST, name: str = "") -> Iterator[tuple[str, int, int]]:
    """Yield (qualified name, lines, bound) of the functions and classes below a node."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}" if name else child.name
            bound = LONGEST_CLASS if isinstance(child, ast.ClassDef) else LONGEST_FUNCTION
            yield inner, child.end_lineno - child.lineno + 1, bound
        yield from sized(child, inner)


def large() -> list[str]:
    """Functions, classes and modules over their bounds: the reason, where there is one."""
    found = []
    for source in product():
        sizes = [("", len(source.text.splitlines()), LONGEST_MODULE), *sized(source.tree)]
        for name, lines, bound in sizes:
            place = f"{source.path}:{name}" if name else source.path
            if lines > bound:
                found.append(f"{place}: {lines} lines, {bound} are enough; {LARGE.get(place, 'no reason given')}")
    return found


def large_without_reason() -> list[str]:
    """Those of `large` that `LARGE` has no reason for, and reasons for what is not large."""
    places = {":".join(line.split(": ")[:1]) for line in large()}
    return [f"{place}: no reason given" for place in sorted(places - LARGE.keys())] + [
        f"{place}: is not large" for place in sorted(LARGE.keys() - places)
    ]


BUILTIN = {"int", "float", "str", "bool", "bytes", "list", "dict", "tuple", "set"}
MAPPINGS = {"dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict"}


def name_of(node: ast.AST) -> str:
    """Return the last part of a name, dotted or subscripted; "" for anything else."""
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def members(annotation: ast.AST, aliases: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> set[str]:
    """Return the names in a union, aliases opened, None left out; int and float are one."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return members(annotation.left, aliases, seen) | members(annotation.right, aliases, seen)
    if isinstance(annotation, ast.Subscript) and name_of(annotation) in ("Union", "Optional"):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return set().union(*(members(node, aliases, seen) for node in inner))
    if isinstance(annotation, ast.Constant):
        return set() if annotation.value is None else members(parsed(annotation), aliases, seen)
    name = name_of(annotation)
    if name in aliases and name not in seen:
        return members(aliases[name], aliases, seen | {name})
    return {"float" if name == "int" else name}


def parsed(annotation: ast.Constant) -> ast.AST:
    """Return the tree of an annotation that is written as text; the node itself if it is none."""
    if not isinstance(annotation.value, str):
        return annotation
    try:
        return ast.parse(annotation.value, mode="eval").body
    except SyntaxError:
        return annotation


def vague(annotation: ast.AST, aliases: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> bool:
    """Return whether an annotation is, contains or stands for Any, object, or a dict of texts to mixed values."""
    for node in ast.walk(annotation):
        name = name_of(node) if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) else ""
        if name in ("Any", "object"):
            return True
        if name in aliases and name not in seen and vague(aliases[name], aliases, seen | {name}):
            return True
        if isinstance(node, ast.Constant) and parsed(node) is not node and vague(parsed(node), aliases, seen):
            return True
        if isinstance(node, ast.Subscript) and name in MAPPINGS and isinstance(node.slice, ast.Tuple):
            values = members(node.slice.elts[-1], aliases)
            if len(values) > 1 and values & BUILTIN:
                return True
    return name_of(annotation) in MAPPINGS and not isinstance(annotation, ast.Subscript)


def type_aliases() -> dict[str, ast.AST]:
    """Return name -> value of the modules' assignments that look like types, such as `Config = dict[str, Any]`.

    A class that is a dict and adds nothing to it (`class Config(dict[str, Any])`) is one, too.
    """
    aliases: dict[str, ast.AST] = {}
    for source in product():
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not any(isinstance(part, ast.FunctionDef) for part in node.body):
                aliases.update((node.name, base) for base in node.bases if name_of(base) == "dict")
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                if isinstance(node.value, ast.Subscript | ast.BinOp | ast.Name):
                    aliases[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and node.value and name_of(node.annotation) == "TypeAlias":
                aliases[node.target.id] = node.value
            elif type(node).__name__ == "TypeAlias":  # of Python 3.12
                aliases[node.name.id] = node.value
    return aliases


def annotations(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield (annotation, node whose line it stands on) of arguments, results, variables and aliases."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation, node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns, node.returns
        elif called(node) in ("cast", "typing.cast"):
            yield node.args[0], node
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            yield node.value, node


def unannotated(tree: ast.Module) -> Iterator[ast.arg]:
    """Yield the parameters without annotation, but for a method's first one; a lambda has none to give."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            static = "staticmethod" in {ast.unparse(decorator) for decorator in node.decorator_list}
            given = [*node.args.posonlyargs, *node.args.args]
            given = given[1:] if isinstance(parent, ast.ClassDef) and not static else given
            rest = [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            yield from (a for a in [*given, *node.args.kwonlyargs, *rest] if a.annotation is None)


def untyped() -> list[str]:
    """Lines with Any, object, dicts of mixed values, names that stand for these, or a parameter without annotation."""
    aliases, found = type_aliases(), []
    for source in product():
        found += [source.at(where) for kind, where in annotations(source.tree) if vague(kind, aliases)]
        found += [source.at(argument) for argument in unannotated(source.tree)]
    return one_a_line(found)


# --------------------------------------------------------------------------------------------------- said only once


def sampling_option_names() -> list[str]:
    """Return the fields of `SamplingOptions`."""
    for source in product():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and node.name == "SamplingOptions":
                return [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
    return []


def declares(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node declares with a value of its own: defaults of arguments, fields and flags."""
    if isinstance(node, ast.FunctionDef):
        positional = [*node.args.posonlyargs, *node.args.args]
        with_default = positional[len(positional) - len(node.args.defaults) :]
        yield from (argument.arg for argument in with_default)
        yield from (a.arg for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults) if default is not None)
    elif isinstance(node, ast.ClassDef):
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        yield from (f.target.id for f in fields if f.value is not None)
    elif called(node).endswith("add_argument"):
        flags = [a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]
        yield from (flag.lstrip("-").replace("-", "_") for flag in flags)


SAMPLING_ROOMS = re.compile(
    r"sample\.py|ldm_lab/(sampling/|commands/sample\.py|app/|training/(demo|enlargements|inpaintings)\.py)"
)


def sampling_options_declared_again() -> list[str]:
    """Places that declare a sampling option, beside its field of `SamplingOptions`."""
    names = set(sampling_option_names())
    if not names:
        return ["ldm_lab/sampling/options.py: has no class SamplingOptions"]
    found = []
    for source in product():
        if not SAMPLING_ROOMS.match(source.path):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and node.name == "SamplingOptions":
                continue
            found += [source.at(node, name) for name in declares(node) if name in names]
    return found


def modules_that(does: Callable[[ast.AST], bool]) -> list[str]:
    """Return the first place of each module with a node that does something."""
    found = []
    for source in product():
        places = [node for node in ast.walk(source.tree) if does(node)]
        if places:
            found.append(source.at(min(places, key=lambda node: node.lineno)))
    return found


def renames(node: ast.AST) -> bool:
    """Return whether a node puts a finished file in its place: os.replace, Path.replace, rename, shutil.move."""
    name = called(node)
    if name in ("os.replace", "os.rename", "shutil.move"):
        return True
    method = name.rpartition(".")[2] if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
    one_path = method in ("rename", "replace") and len(node.args) == 1 and not node.keywords
    return one_path and not isinstance(node.args[0], ast.Dict) and called(node.args[0]) != "dict"  # a table's columns


def atomic_writers() -> list[str]:
    """Modules that rename a finished file, but for those in `RENAMED_ELSEWHERE`."""
    return [place for place in modules_that(renames) if place.split(":")[0] not in RENAMED_ELSEWHERE]


def speaks_http(node: ast.AST) -> bool:
    """Return whether a node imports a library that opens connections."""
    clients = ("requests", "urllib.request", "urllib3", "http.client", "httpx", "aiohttp")
    if isinstance(node, ast.Import):
        return any(alias.name in clients for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (
        node.module in clients or any(f"{node.module}.{alias.name}" in clients for alias in node.names)
    )


def hashes_files(node: ast.AST) -> bool:
    """Return whether a node computes a file's SHA-256: `file_digest`, `sha256()` that is fed, or of what is read."""
    name = called(node).removeprefix("hashlib.")
    if name not in ("sha256", "file_digest", "new"):
        return False
    return name != "sha256" or not node.args or ".read" in ast.unparse(node.args[0])


def reads_pairs(node: ast.AST) -> bool:
    """Return whether a node takes `key=value` apart."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    equals = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == "="
    splits = node.func.attr in ("partition", "rpartition", "split", "rsplit") and equals
    return splits or node.func.attr in ("from_dotlist", "from_cli")


# ---------------------------------------------------------------------------------------------- imports and repeats


def imported(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, top-level name) of the libraries that a module imports."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            if (top := name.split(".")[0]) not in sys.stdlib_module_names:
                yield node, top


def normal(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*, extras: bool = True) -> set[str]:
    """Return the names of pyproject.toml's dependencies, those of the extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = [*project["dependencies"]]
    if extras:
        entries += [entry for extra in project["optional-dependencies"].values() for entry in extra]
    return {normal(re.match(r"[\w.-]+", entry)[0]) for entry in entries}


def undeclared() -> list[str]:
    """Imports of libraries that pyproject.toml does not name."""
    known = declared()
    return [
        source.at(node)
        for source in product()
        for node, top in imported(source.tree)
        if top not in ("ldm_lab", "sample", "train") and normal(DISTRIBUTIONS.get(top, top)) not in known
    ]


BOILERPLATE = re.compile(
    r"(from|import) |@|[\])},:]*$|self,?$|\*,?$|else:$|try:$|pass$|super\(\)\.__init__\(|raise NotImplementedError"
    r"|return self$|self\.(\w+) = \2$"
)


def code_lines(source: Source) -> list[tuple[int, str]]:
    """Return (line number, text) of the code without docstrings, comments and boilerplate, spaces made one."""
    left = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Import | ast.ImportFrom):
            left |= set(range(node.lineno, node.end_lineno + 1))
    lines = []
    for number, line in enumerate(source.text.splitlines(), 1):
        text = " ".join(re.sub(r"\s+#.*$|^#.*$", "", line).split())
        if text and number not in left and not BOILERPLATE.match(text):
            lines.append((number, text))
    return lines


def repeats() -> list[str]:
    """Stretches of `WINDOW` lines or more that stand in two places; each further place counts once."""
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    lines = {source.path: code_lines(source) for source in product()}
    for path, numbered in lines.items():
        texts = [text for _, text in numbered]
        for start in range(len(texts) - WINDOW + 1):
            windows[tuple(texts[start : start + WINDOW])].append((path, start))
    found = []
    for places in windows.values():
        first, *others = places
        for path, start in others:
            before = lines[path][start - 1][1] if start else None
            goes_on = any(lines[p][s - 1][1] == before for p, s in places if s and (p, s) != (path, start))
            if not goes_on:
                here, there = lines[path][start], lines[first[0]][first[1]]
                found.append(f"{path}:{here[0]}: as {first[0]}:{there[0]}: {here[1]}")
    return found


RULES = (
    Rule("lines that ask a part what it is", 0, asks),
    Rule(
        f"functions over {LONGEST_FUNCTION} lines, classes over {LONGEST_CLASS}, modules over {LONGEST_MODULE}",
        6,
        large,
    ),
    Rule("of these without a line of reason in tests/house.py", 0, large_without_reason),
    Rule("lines with Any, object, dicts of mixed values, unannotated parameters", 150, untyped),
    Rule("places that declare a sampling option, beside SamplingOptions", 0, sampling_options_declared_again),
    Rule("modules that put a finished file in its place", 1, atomic_writers),
    Rule("modules that speak HTTP", 1, lambda: modules_that(speaks_http)),
    Rule("modules that compute a file's SHA-256", 1, lambda: modules_that(hashes_files)),
    Rule("modules that read key=value", 1, lambda: modules_that(reads_pairs)),
    Rule("imports that pyproject.toml does not declare", 0, undeclared),
    Rule("repeats of six lines", 3, repeats),
)


def main() -> int:
    """Print the table; with -v the places, too. Returns 1 if a bound is passed."""
    passed = False
    for rule in RULES:
        places = rule.find()
        passed |= len(places) > rule.bound
        print(f"{len(places):5}  of at most {rule.bound:3}  {'!' if len(places) > rule.bound else ' '} {rule.name}")
        if "-v" in sys.argv[1:]:
            print("".join(f"         {place}\n" for place in places), end="")
    return int(passed)


if __name__ == "__main__":
    sys.exit(main())
