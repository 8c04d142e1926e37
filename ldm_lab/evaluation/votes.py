"""Votes of a comparison whose columns' names were hidden: files that its page saves, added up."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Fields, parse_json

FORMAT = "ldm_lab votes"
LARGEST_FILE = 2**26  # bytes
NORMAL = 1.959964  # of a standard normal distribution, 95 % lie within so many deviations of 0


@dataclass
class Tally:
    """What several files of votes say.

    Attributes:
        columns: the models' names.
        wins: how often each of them was chosen.
        ties: how often none was.
        voters: how many files there are.
    """

    comparison: str
    title: str
    columns: Sequence[str]
    wins: list[int] = field(default_factory=list)
    ties: int = 0
    voters: int = 0

    @property
    def decided(self) -> int:
        """How many votes chose a column."""
        return sum(self.wins)

    def lines(self) -> list[str]:
        """Return the result as lines of a table."""
        votes = f"{self.decided + self.ties} votes of {self.voters} {'files' if self.voters != 1 else 'file'}"
        lines = [f"{printable(self.title)}: {votes}, {self.ties} of them without a preference"]
        names = list(map(printable, self.columns))
        width = max(map(len, names))
        for name, wins in sorted(zip(names, self.wins, strict=True), key=lambda pair: -pair[1]):
            low, high = interval(wins, self.decided)
            share = wins / self.decided if self.decided else 0.0
            lines.append(f"  {name:{width}}  {wins:5}  {share:6.1%}  (95 %: {low:.1%} to {high:.1%})")
        return [*lines, f"  by chance each would have {1 / len(self.columns):.1%}"]


def printable(text: str) -> str:
    """Return a text without what a terminal would obey: control characters are written as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def interval(wins: int, votes: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share (Wilson 1927); (0, 1) without any votes."""
    if votes == 0:
        return 0.0, 1.0
    share, z2 = wins / votes, NORMAL**2
    middle = (share + z2 / (2 * votes)) / (1 + z2 / votes)
    half = NORMAL * math.sqrt(share * (1 - share) / votes + z2 / (4 * votes**2)) / (1 + z2 / votes)
    return max(0.0, middle - half), min(1.0, middle + half)


def add_up(paths: Sequence[str]) -> Tally:
    """Return what files of votes say together; a file that is given twice counts once, which is said.

    Raises:
        UserError: a file that is none of votes, or of another comparison than the first.
    """
    tally: Tally | None = None
    seen: dict[str, str] = {}
    for path in paths:
        content = _read(path)
        digest = hashlib.sha256(content).hexdigest()
        if digest in seen:
            print(f"note: {path}: is the same as {seen[digest]}, and counted once", file=sys.stderr)
            continue
        seen[digest] = path
        votes = Fields(parse_json(content))
        columns = votes.all_texts("columns")
        comparison, title = votes.text("comparison"), votes.text("title")
        if votes.text("format") != FORMAT or not columns or comparison is None or title is None:
            raise UserError(f"{path}: no file of votes, as a comparison's page saves them")
        if tally is None:
            tally = Tally(comparison, title, columns, [0] * len(columns))
        if (comparison, columns) != (tally.comparison, tally.columns):
            raise UserError(f"{path}: votes on another comparison ({title!a}) than {paths[0]} ({tally.title!a})")
        _count(tally, votes, path)
    if tally is None:
        raise UserError("--votes: no file is given")
    return tally


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: no file of votes: it is larger than {LARGEST_FILE // 2**20} MiB")
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of votes") from None


def _count(tally: Tally, votes: Fields, path: str) -> None:
    """Add a file's votes, of each row the last one."""
    choices: dict[int, int | None] = {}
    for vote in votes.listed("votes") or []:
        row, choice = vote.count("row"), vote.count("choice")
        if row is None or (choice is None) == vote.has("choice") or (choice or 0) >= len(tally.columns):
            raise UserError(f"{path}: a vote that is none: row and choice (or null) are needed, a column's number")
        choices[row] = choice
    tally.voters += 1
    for choice in choices.values():
        if choice is None:
            tally.ties += 1
        else:
            tally.wins[choice] += 1
