"""The commands in README and docs: all of them, one by one, and how each is checked."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FENCED = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```", re.M | re.S)
SHELL = ("", "bash", "sh", "shell", "console")
PROGRAM = re.compile(r"(?:^|\s)(?:-m ldm_lab |ldm-lab |(?=(?:\S*/)?(?:train|sample)\.py))(?P<words>.*)$")
END = re.compile(r"\s(?:\||>|<|&&|&)(?:\s|$)|;|\s&$")

# Pages whose blocks of a language are run by a test of their own; all other commands are run as tests/walks.py says.
RUN_BY = {
    ("docs/extending.md", "bash"): "tests/test_extending.py",
    ("docs/recipes.md", "bash"): "tests/test_recipes.py",
    ("docs/python.md", "python"): "tests/test_python_docs.py",
    ("docs/extending.md", "python"): "tests/test_extending.py",
    ("docs/slurm.md", "bash"): "tests/test_slurm.py",
}
# Pages whose blocks of Python are read and not run: why.
PARSED = {
    "docs/app.md": "asks a server; the tests of the app start one",
    "docs/sharing.md": "asks for a shared folder, which tests/test_sharing_diffusers.py makes",
}
# Blocks of no language that show something else than commands: how they begin. What programs print stands in ```text.
PICTURES = ("YAML + key=value", "a red star on a blue background")


@dataclass(frozen=True)
class Command:
    """A command in a page.

    Attributes:
        page: of the repository.
        line: number of its first line.
        language: of its block.
        text: in one line, without the explanation behind it.
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def program_words(self) -> list[str] | None:
        """The words behind `python -m ldm_lab`, or those of train.py and sample.py; None for another program."""
        match = PROGRAM.search(self.text)
        if match is None:
            return None
        words = [word for word in shlex.split(END.split(match["words"])[0], comments=True) if word != "$@"]
        return [re.sub(r"^\S*?(train|sample)\.py$", r"\1", words[0]), *words[1:]]

    @property
    def run_by(self) -> str | None:
        """The test that runs the page's blocks of this language, if one does."""
        return RUN_BY.get((self.page, self.language))


def blocks() -> Iterator[tuple[str, int, str, str]]:
    """Yield (page, number of the first line, language, text) of all fenced blocks."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in FENCED.finditer(text):
            yield page, text.count("\n", 0, match.start("body")) + 1, match["language"], match["body"]


def commands() -> Iterator[Command]:
    """Yield the commands of all blocks that are a shell's."""
    for page, first, language, body in blocks():
        if language not in SHELL or body.lstrip().startswith(PICTURES):
            continue
        held, began = "", first
        for number, line in enumerate(body.splitlines(), first):
            began = began if held else number
            held += line.strip()
            if held.endswith("\\"):
                held = held[:-1]
                continue
            text = re.sub(r"\s+#\s.*$", "", held).strip()
            if text and not text.startswith("#"):
                yield Command(page, began, language, text)
            held = ""
