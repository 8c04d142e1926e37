"""pyproject.toml, environment.yml, the lock files and the imports say the same."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import house
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HARDWARE = ("bitsandbytes",)  # extras that need a GPU: not in the tests' environment
BASE = PROJECT["dependencies"]
EXTRAS = {
    extra: [entry for entry in entries if not entry.startswith("ldm_lab[")]
    for extra, entries in PROJECT["optional-dependencies"].items()
}
ALL = BASE + [entry for extra, entries in EXTRAS.items() if extra not in HARDWARE for entry in entries]


def names(entries: list[str]) -> set[str]:
    return {house.normal(re.match(r"[\w.-]+", entry)[0]) for entry in entries}


def locked(path: str) -> dict[str, set[str]]:
    """Return distribution -> versions of a lock file; several where they depend on the platform."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / path).read_text(), re.M):
        versions.setdefault(house.normal(name), set()).add(version)
    return versions


def test_environment_yml_says_the_same_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(pip) == sorted(ALL + [entry for extra in HARDWARE for entry in EXTRAS[extra]])
    assert f"python{PROJECT['requires-python']}" in environment


@pytest.mark.parametrize(("path", "entries"), [("requirements.lock", BASE), ("requirements-dev.lock", ALL)])
def test_every_dependency_is_locked_with_checksums(path, entries):
    text = (ROOT / path).read_text()
    assert not (missing := names(entries) - locked(path).keys()), f"not in {path}: {missing}; make lock"
    assert text.count("--hash=sha256:") > len(locked(path))
    assert "://" not in text and "--index-url" not in text, "a lock names no package hosts"
    for block in re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_first_lock_has_no_extras_and_the_second_agrees_with_it():
    base, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert not (names(ALL) - names(BASE)) & base.keys() - {"py4j", "protobuf"}
    assert all(dev.get(name) == versions for name, versions in base.items())


def test_extras_hold_what_they_hold():
    extras = PROJECT["optional-dependencies"]
    assert {"curation", "spark", "images", "bitsandbytes", "dev"} <= extras.keys()
    assert "ldm_lab[curation]" in extras["spark"]


def test_every_import_of_tests_benchmarks_and_examples_is_declared():
    here = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {path.stem for path in ROOT.glob("benchmarks/*.py")}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    own = here | folders | {"ldm_lab", "train", "sample", "tests", "benchmarks", "data_sets"}
    for folder in ("tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for _, top in house.imported(ast.parse(path.read_text())):
                known = top in own or house.normal(house.DISTRIBUTIONS.get(top, top)) in house.declared()
                assert known, f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not declare"


def test_this_python_is_an_allowed_one():
    least, most = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(least) <= sys.version_info.minor < int(most)


def test_messages_of_missing_extras_say_what_make_can_do():
    from ldm_lab.errors import install

    assert install("app") == "make setup EXTRAS=app, or pip install -e '.[app]'"
    assert re.search(r"^ifdef EXTRAS\n.*\$\(EXTRAS:%=--extra %\)", (ROOT / "Makefile").read_text(), re.M)
    for path in (ROOT / "ldm_lab").rglob("*.py"):
        assert "pip install 'ldm_lab[" not in path.read_text(), f"{path}: nothing is published under this name"
        said = re.findall(r"pip install[^\n]*", path.read_text())
        assert path.name == "errors.py" or not [line for line in said if "-e of one" not in line], f"{path}: {said}"
        for extra in re.findall(r"\binstall\(['\"](\w+)['\"]\)", path.read_text()):
            assert extra in EXTRAS, f"{path}: no extra {extra}"


def test_a_module_of_an_extra_that_is_not_installed_is_one_line(capsys):
    from ldm_lab.errors import EXTRAS as OF_EXTRAS
    from ldm_lab.errors import install, run_program

    def lacking(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    with pytest.raises(SystemExit, match="2"):
        run_program(lambda: lacking("transformers.models"))
    assert capsys.readouterr().err == f"error: transformers is not installed: {install('text')}\n"
    with pytest.raises(ModuleNotFoundError):
        run_program(lambda: lacking("ldm_lab.nothing"))
    core = {house.normal(re.match(r"[\w-]+", it)[0]) for it in PROJECT["dependencies"]}
    for path in (ROOT / "ldm_lab").rglob("*.py"):
        for _, top in house.imported(ast.parse(path.read_text())):
            package = house.normal(house.DISTRIBUTIONS.get(top, top))
            if top != "ldm_lab" and top not in sys.stdlib_module_names and package not in core:
                assert top in OF_EXTRAS, f"{path} imports {top}"
                assert any(package in house.normal(it) for it in PROJECT["optional-dependencies"][OF_EXTRAS[top]])


def test_data_files_of_the_package_are_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ldm_lab"]
    installed = {path for pattern in patterns for path in (ROOT / "ldm_lab").glob(pattern)}
    for path in (ROOT / "ldm_lab").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert path in installed, f"{path.relative_to(ROOT)} is not in [tool.setuptools.package-data]"


def test_every_folder_with_modules_is_a_package():
    for path in (ROOT / "ldm_lab").rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{path.parent.relative_to(ROOT)} has no __init__.py"


def test_the_command_is_installed():
    module, _, name = PROJECT["scripts"]["ldm-lab"].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_make_compiles_what_it_installs():
    """Where Python may not write bytecode, as in many containers, every start would compile torch anew: 3 seconds."""
    installs = re.findall(r"^\t\$\(UV\) pip install .*", (ROOT / "Makefile").read_text(), re.M)
    assert len(installs) == 3 and all("--compile-bytecode" in line for line in installs)
