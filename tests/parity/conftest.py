"""`pytest tests/parity --golden FOLDER` compares ldm_lab with the recordings in a folder of one's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import Case

DEFAULT = Path(__file__).resolve().parents[1] / "data" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="FOLDER", help=f"folder of recorded cases (default: {DEFAULT})")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """Return the folder of recorded cases."""
    # Without a default here a plain `pytest` would fail: it meets this file after the command line has been read.
    folder = Path(request.config.getoption("--golden", default=None) or DEFAULT)
    assert folder.is_dir(), f"--golden {folder}: no such folder"
    return folder


@pytest.fixture
def case(golden: Path) -> Callable[..., Case]:
    """Return a function from a name to the recorded case; without such a case the test is skipped."""

    def load(name: str, at_most: float = float("inf")) -> Case:
        return Case(golden, name, at_most)

    return load
