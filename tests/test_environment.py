"""pyproject.toml, environment.yml and the lock file say the same."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def declared() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return project["dependencies"] + [entry for extra in extras for entry in extra if not entry.startswith("ldm_lab[")]


def test_environment_yml_says_the_same_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    assert sorted(pip) == sorted(declared())
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"python{python}" in environment


def test_every_dependency_is_locked_with_checksums():
    lock = (ROOT / "requirements.lock").read_text()
    locked = {name.lower().replace("_", "-") for name in re.findall(r"^([A-Za-z0-9_.-]+)==", lock, re.M)}
    for entry in declared():
        name = re.match(r"[A-Za-z0-9_.-]+", entry)[0].lower().replace("_", "-")
        assert name in locked, f"{name} is not in requirements.lock: make lock"
    assert lock.count("--hash=sha256:") > len(locked)
