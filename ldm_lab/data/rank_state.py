"""Where the ranks of a run stand in the data, as a checkpoint has it, and how another run goes on from there."""

from collections import Counter
from typing import NamedTuple, TypedDict

from ldm_lab.data.contents import are_contents, differing_contents
from ldm_lab.data.counts import Counts, CountsState
from ldm_lab.data.loader import Progress
from ldm_lab.data.shares import Stretch, deal
from ldm_lab.errors import UserError

LIMIT = 2**62  # of all numbers in a state


class RankState(TypedDict):
    """Where a rank stands in the data, as plain values for a checkpoint.

    Attributes:
        seed: of the order.
        processes: of the run.
        workers: readers per rank.
        unit, count: what is dealt out to them, and how many.
        items: stands for what the items of a unit and their order depend on.
        contents: stands for names and contents of the data, as `contents.contents_of` has it; "" if nobody knows.
        turn: the reader that gives the next batch.
        left: of each reader the stretches before its next whole epoch, as `shares.Stretch`.
        counts: of what was read.
    """

    seed: int
    processes: int
    workers: int
    unit: str
    count: int
    items: str
    contents: str
    turn: int
    left: list[list[list[int]]]
    counts: CountsState


class GoingOn(NamedTuple):
    """How a rank goes on.

    Attributes:
        progress: where it stands.
        lines: what is different from before and what follows from it, in words.
    """

    progress: Progress
    lines: list[str]


def go_on(states: list[RankState], now: RankState, rank: int) -> GoingOn:
    """Return how a rank goes on from the states of all ranks of a run, which may have had others.

    Args:
        states: in the order of the ranks.
        now: of this rank, before it has read anything.
        rank: this process among those of the run that goes on.

    Raises:
        UserError: the states are damaged.
    """
    check(states)
    before = states[0]
    left = [[Stretch(*stretch) for stretch in reader] for state in states for reader in state["left"]]
    same_ranks = before["processes"] == now["processes"]
    counts = Counts.of(states[rank]["counts"]) if same_ranks else Counts()
    if rank == 0 and not same_ranks:  # what all ranks have counted so far lives on in one of them
        for state in states:
            counts.add(Counts.of(state["counts"]))
    readers, mine = now["workers"] * now["processes"], slice(rank * now["workers"], (rank + 1) * now["workers"])
    numbers = {"processes": (before["processes"], now["processes"]), "workers": (before["workers"], now["workers"])}
    changed = [f"{what} {one} -> {other}" for what, (one, other) in numbers.items() if one != other]
    if other_data := changed_data(before, now):
        epoch = max(reader[-1].epoch if reader else 0 for reader in left)
        line = f"{', '.join(other_data + changed)}: another order, so this run goes on with epoch {epoch + 1} of it"
        end = [Stretch(epoch, now["count"], now["count"])]
        return GoingOn(Progress([end] * now["workers"], counts=counts), [line])
    lines = []
    if before["items"] != now["items"]:
        left = [[stretch._replace(begun=0, offset=0) for stretch in reader] for reader in left]
        lines.append(f"other items in the {now['unit']}, or another order of them: those that were begun begin anew")
    turn = states[rank]["turn"] if same_ranks and before["workers"] == now["workers"] else 0
    if len(left) != readers:
        dealt = deal(left, readers, now["count"])
        lines.append(f"{', '.join(changed)}: {dealt_out(dealt, now['unit'])}{too_far(left, dealt)}")
        left = dealt
    return GoingOn(Progress(left[mine], turn, counts), lines)


def changed_data(before: RankState, now: RankState) -> list[str]:
    """Return what makes the order another one, as "what before -> now"."""
    changed = [] if before["seed"] == now["seed"] else [f"seed {before['seed']} -> {now['seed']}"]
    if (before["unit"], before["count"]) != (now["unit"], now["count"]):
        unit = "" if before["unit"] == now["unit"] else f" {before['unit']}"
        changed.append(f"{now['unit']} {before['count']}{unit} -> {now['count']}")
    elif others := differing_contents(before["contents"], now["contents"]):
        changed.append(f"other data than before, {others}")
    return changed


def dealt_out(dealt: list[list[Stretch]], unit: str) -> str:
    """Return how much is left of which epochs for how many readers, in words."""
    numbers: Counter[int] = Counter()
    for stretch in (stretch for reader in dealt for stretch in reader):
        numbers[stretch.epoch] += len(stretch.places)
    told = " and ".join(f"{number:,} of epoch {epoch}" for epoch, number in sorted(numbers.items()) if number)
    if not told:
        return f"no {unit} are left of epoch {max(numbers)}, epoch {max(numbers) + 1} begins"
    begun = any(stretch.begun for reader in dealt for stretch in reader)
    return f"the {unit} that are left, {told}{', some of them begun' if begun else ''}, go to {len(dealt)} readers"


def too_far(left: list[list[Stretch]], dealt: list[list[Stretch]]) -> str:
    """Return what comes again because some readers were epochs ahead of others, in words; "" if nothing does."""
    first, last = min(reader[0].epoch if reader else 0 for reader in left), dealt[0][-1].epoch
    furthest = max(reader[-1].epoch if reader else 0 for reader in left)
    if furthest <= last:
        return ""
    apart = f"some readers were {furthest - first} epochs behind others"
    return f"; {apart}: what was read of epochs behind {last} comes again"


def check(states: list[RankState]) -> None:
    """Raise UserError if this is nothing that the ranks of a run have saved."""
    try:
        sound = bool(states) and all(_is_sound(state, len(states)) for state in states)
        sound = sound and len({(state["workers"], state["count"], state["unit"]) for state in states}) == 1
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise UserError("resume.checkpoint: the position in the data is damaged; init_from takes over the weights")


def _is_sound(state: RankState, ranks: int) -> bool:
    """Return whether a state has the values it should have; other types raise whatever their use raises."""
    counts = state["counts"]
    tallies = [counts.get(name, {}) for name in ("skipped", "filtered", "captions")] if isinstance(counts, dict) else []
    examples = counts.get("examples", {}) if tallies else {}
    return (
        len(tallies) == 3
        and _are_counts([state["processes"], state["workers"], state["count"], state["turn"], abs(state["seed"])])
        and state["processes"] == ranks
        and state["workers"] == len(state["left"]) > state["turn"]
        and isinstance(state["unit"], str)
        and isinstance(state["items"], str)
        and are_contents(state["contents"])
        and all(_are_stretches(reader, state["count"]) for reader in state["left"])
        and _are_counts([counts.get("read", 0), counts.get("judged", 0)])
        and all(_are_tallies(its) for its in tallies)
        and isinstance(examples, dict)
        and all(isinstance(key, str) for reason in examples for key in (reason, *examples[reason]))
    )


def _are_counts(values: list[int]) -> bool:
    return all(type(value) is int and 0 <= value < LIMIT for value in values)


def _are_tallies(tallies: dict[str, int]) -> bool:
    return (
        isinstance(tallies, dict)
        and all(isinstance(name, str) for name in tallies)
        and _are_counts(list(tallies.values()))
    )


def _are_stretches(reader: list[list[int]], count: int) -> bool:
    """Return whether a reader's stretches are some, with their epochs in order."""
    stretches = [Stretch(*stretch) for stretch in reader if _are_counts(stretch)]
    epochs = [stretch.epoch for stretch in stretches]
    return (
        len(stretches) == len(reader)
        and epochs == sorted(epochs)
        and all(
            s.step and s.stop <= count and s.begun <= len(s.places) and bool(s.begun) == bool(s.offset)
            for s in stretches
        )
    )
