"""How many samples were read, and why some of them are not used."""

from dataclasses import dataclass, field
from typing import TypedDict

from ldm_lab.data.captions import NONE, PROBLEMS
from ldm_lab.data.samples import FilteredOut, SkippedSample
from ldm_lab.interfaces import ReaderState

EXAMPLES = 3  # keys kept per reason


class CountsState(TypedDict, total=False):
    """`Counts` as plain values, for files and checkpoints; what is empty may be left out."""

    read: int
    skipped: dict[str, int]
    examples: dict[str, list[str]]
    filtered: dict[str, int]
    judged: int
    captions: dict[str, int]


@dataclass
class Counts:
    """How many samples were read, how many of them skipped for which reason, how many left out as the config asks.

    Attributes:
        read: samples, the skipped and filtered ones included; a broken shard whose samples nobody knows counts as one.
        skipped: reason -> samples.
        examples: reason -> the first few keys.
        judged: samples that rules have looked at, those ahead in the shuffle buffer included.
        captions: where captions came from, or why they cannot be read -> used samples.
        filtered: "rule ..." or "no caption" -> samples; a sample that violates several rules counts for the first.
    """

    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    judged: int = 0
    captions: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, state: CountsState | ReaderState) -> "Counts":
        """Return the counts of a file or of a reader, as a copy."""
        if isinstance(state, ReaderState):
            state = CountsState(
                read=state.read, skipped=state.skipped, examples=state.examples, filtered=state.filtered,
                judged=state.judged, captions=state.captions,
            )  # fmt: skip
        return cls(
            state.get("read", 0),
            dict(state.get("skipped", {})),
            dict(state.get("examples", {})),
            dict(state.get("filtered", {})),
            state.get("judged", 0),
            dict(state.get("captions", {})),
        )

    def skip(self, problem: SkippedSample) -> None:
        """Count a sample that is not used; it has been counted as read."""
        one, examples = {problem.reason: problem.samples}, {problem.reason: [problem.key]}
        if isinstance(problem, FilteredOut):
            self.add(Counts(filtered=one, examples=examples, judged=problem.judged))
        else:
            self.add(Counts(skipped=one, examples=examples))

    def caption(self, place: str, key: str) -> None:
        """Count where the caption of a sample that is used came from, or why it cannot be read."""
        if place:
            self.add(Counts(captions={place: 1}, examples={place: [key]} if place in PROBLEMS else {}))

    def add(self, other: "Counts") -> None:
        """Add what was counted elsewhere."""
        self.read += other.read
        self.judged += other.judged
        for total, more in (
            (self.skipped, other.skipped),
            (self.filtered, other.filtered),
            (self.captions, other.captions),
        ):
            for reason, count in more.items():
                total[reason] = total.get(reason, 0) + count
        for reason, more_keys in other.examples.items():
            keys = self.examples.get(reason, []) + more_keys
            self.examples[reason] = list(dict.fromkeys(keys))[:EXAMPLES]  # each epoch meets them again

    def state(self) -> CountsState:
        """Return plain values, of which `of` makes the same counts."""
        state = CountsState(read=self.read, skipped=dict(self.skipped), examples=dict(self.examples))
        if self.filtered:
            state["filtered"] = dict(self.filtered)
        if self.judged:
            state["judged"] = self.judged
        if self.captions:
            state["captions"] = dict(self.captions)
        return state

    @property
    def share(self) -> float:
        """The share of skipped samples among the wanted ones, in [0, 1]."""
        return sum(self.skipped.values()) / max(self.wanted, 1)

    @property
    def wanted(self) -> int:
        """Samples that the config does not leave out."""
        return self.read - sum(self.filtered.values())

    @property
    def used(self) -> int:
        """Samples that were neither skipped nor filtered out."""
        return self.wanted - sum(self.skipped.values())

    def __str__(self) -> str:
        skipped, filtered = sum(self.skipped.values()), sum(self.filtered.values())
        waiting = self.judged - self.read  # in the shuffle buffer, behind the rules
        seen = max(self.read, self.judged)
        text = f"{seen:,} samples read, " + (
            f"{waiting:,} of them still in the shuffle buffer, " if waiting > 0 else ""
        )
        if filtered:
            share = filtered / max(seen, 1)
            text += f"{filtered:,} left out as asked ({share:.1%}): {self._reasons(self.filtered)}; "
        text += f"{skipped:,} skipped ({self.share:.1%}): {self._reasons(self.skipped)}" if skipped else "none skipped"
        if self.captions.keys() - {NONE}:
            text += f"; captions: {self._reasons(self.captions)}"
        return text

    def _reasons(self, counts: dict[str, int]) -> str:
        return "; ".join(
            f"{reason} {count:,}" + (f" (e.g. {', '.join(self.examples[reason])})" if reason in self.examples else "")
            for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])
        )
