"""Votes of a comparison whose columns' names were hidden: files that its page saves, added up."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
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
        voters: how many people's votes these are.
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
        votes = f"{self.decided + self.ties} votes of {self.voters} {'voters' if self.voters != 1 else 'voter'}"
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


@dataclass(frozen=True)
class Ballot:
    """A file of votes.

    Attributes:
        path: as it was given.
        comparison: the id of what is voted on.
        title, columns, rows: of it; how many rows it has.
        voter: an id that the page has drawn in a browser, one for each comparison.
        saved: when the file was written.
        choices: of each row that was voted on, a column's number, or None for no preference.
    """

    path: str
    comparison: str
    title: str
    columns: Sequence[str]
    rows: int
    voter: str
    saved: datetime
    choices: Mapping[int, int | None]


def add_up(paths: Sequence[str]) -> Tally:
    """Return what files of votes say together: of each voter the newest file counts; what does not count is said.

    Raises:
        UserError: a file that is none of votes, or of another comparison than the first.
    """
    ballots = [_parsed(content, path) for path, content in _different(paths)]
    if not ballots:
        raise UserError("--votes: no file is given")
    first = ballots[0]
    for other in ballots[1:]:
        if (other.comparison, other.columns, other.rows) != (first.comparison, first.columns, first.rows):
            raise UserError(
                f"{other.path}: votes on another comparison ({other.title!a}) than {first.path} ({first.title!a})"
            )
    tally = Tally(first.comparison, first.title, first.columns, [0] * len(first.columns))
    for ballot in _newest(ballots):
        if not ballot.choices:
            _note(f"{ballot.path}: has no votes, and is not counted")
            continue
        tally.voters += 1
        for choice in ballot.choices.values():
            if choice is None:
                tally.ties += 1
            else:
                tally.wins[choice] += 1
    return tally


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


def _different(paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return (path, content) of the files, each content once."""
    seen: dict[bytes, str] = {}
    for path in paths:
        content = _read(path)
        if content in seen:
            _note(f"{path}: is the same as {seen[content]}, and counted once")
        seen.setdefault(content, path)
    return [(path, content) for content, path in seen.items()]


def _newest(ballots: Sequence[Ballot]) -> list[Ballot]:
    """Return each voter's newest file, of two of the same time the one that was given last."""
    by_voter: dict[str, list[Ballot]] = {}
    for ballot in ballots:
        by_voter.setdefault(ballot.voter, []).append(ballot)
    newest = []
    for its in by_voter.values():
        *older, last = sorted(its, key=lambda ballot: ballot.saved)
        if older:
            names = ", ".join(ballot.path for ballot in older)
            them = "it" if len(older) == 1 else "them"
            _note(f"{names}: the voter of {last.path} has saved {them} earlier; not counted")
        newest.append(last)
    return newest


def _read(path: str) -> bytes:
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of votes") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a file of votes; {path}/votes-*.json names those in it") from None
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: no readable file of votes: {reason}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: no file of votes: it is larger than {LARGEST_FILE // 2**20} MiB")
    return content


def _parsed(content: bytes, path: str) -> Ballot:
    """Return a file's votes. Raises UserError where it is none of those that pages save."""
    votes = Fields(parse_json(content))
    columns, rows = votes.all_texts("columns"), votes.count("rows")
    comparison, title, voter = votes.text("comparison"), votes.text("title"), votes.text("voter")
    if votes.text("format") != FORMAT or not columns or not rows or comparison is None or title is None:
        raise UserError(f"{path}: no file of votes, as a comparison's page saves them")
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{path}: no file of votes: two columns are called {twice[0]!a}")
    saved = _time(votes.text("saved"))
    if not voter or saved is None:
        raise UserError(f"{path}: no file of votes: voter (an id) and saved (a time with its zone) are needed")
    if (listed := votes.listed("votes")) is None:
        raise UserError(f"{path}: no file of votes: it has no list of votes")
    choices = dict(_vote(vote, rows, len(columns), path) for vote in listed)
    return Ballot(path, comparison, title, columns, rows, voter, saved, choices)


def _time(text: str | None) -> datetime | None:
    """Return a time that knows its zone; None for anything else."""
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return None if time.tzinfo is None else time


def _vote(vote: Fields, rows: int, columns: int, path: str) -> tuple[int, int | None]:
    """Return (row, choice) of a vote."""
    row, choice = vote.count("row"), vote.count("choice")
    if row is None or (choice is None and not vote.is_null("choice")) or (choice or 0) >= columns:
        raise UserError(f"{path}: a vote that is none: row and choice (or null) are needed, a column's number")
    if row >= rows:
        raise UserError(f"{path}: a vote that is none: row {row} of a comparison whose {rows} rows are counted from 0")
    return row, choice
