"""Going on with another number of processes, loader processes or another batch size: every sample once an epoch."""

import json
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from data_sets import encoded, keys, module, take, write_cache, write_files, write_shards
from tiny import make_run, run_program

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.data.loader import walk
from ldm_lab.data.order import TABLE, Order
from ldm_lab.data.rank_state import RankState
from ldm_lab.data.samples import FilteredOut, Judged, SkippedSample
from ldm_lab.data.shares import EPOCHS_APART, Stretch, deal, stretches, untouched
from ldm_lab.data.source import Source
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError

COUNT = 90


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict]:
    """The same 90 samples as 18 shards, a folder, a list, a cache."""
    root = tmp_path_factory.mktemp("sets")
    write_shards(root / "shards", shards=18, per_shard=5)
    write_files(root / "images", COUNT)
    write_cache(root / "cache", {"embed": torch.arange(COUNT, dtype=torch.float16)[:, None]}, per_shard=16)
    return {
        "webdataset": {"name": "webdataset", "shards": f"{root}/shards/*.tar", "shuffle_buffer": 3},  # 3 to a group
        "folder": {"name": "folder", "path": f"{root}/images"},
        "image_list": {"name": "image_list", "path": f"{root}/list.txt"},
        "cache": {"name": "cache", "path": f"{root}/cache"},
    }


def run(
    section: dict, processes: int, steps: int | None, states: list[RankState] | None = None, epochs: int | None = None
) -> tuple[list[str], list[RankState]]:
    """Return the keys that all ranks of a run train on in some steps, or to the end, and where they stand then."""
    trained, after = [], []
    for rank in range(processes):
        data = module(section, rank, processes, epochs=epochs)
        if states:
            data.load_rank_states(states, rank)
        trained += keys(take(data, steps))
        after.append(data.rank_state())
    return trained, after


def run_in_parts(section: dict, parts: list[tuple[int, int, int, int | None]], epochs: int = 1) -> list[str]:
    """Return the keys of a run in parts of (processes, workers, batch size, steps); the last one ends the epochs."""
    trained, states = [], None
    for processes, workers, batch_size, steps in parts:
        options = {**section, "workers": workers, "batch_size": batch_size}
        more, states = run(options, processes, steps, states, epochs)
        trained += more
    return trained


CHAINS = {
    "2 to 1": [(2, 0, 4, 5), (1, 0, 4, None)],
    "1 to 2": [(1, 0, 4, 7), (2, 0, 4, None)],
    "2 to 3": [(2, 0, 4, 5), (3, 0, 4, None)],
    "2 to 3 to 1": [(2, 0, 4, 3), (3, 0, 4, 2), (1, 0, 4, None)],
    "before the first step": [(2, 0, 4, 0), (3, 0, 4, None)],
    "twice at once": [(2, 0, 4, 4), (5, 0, 4, 0), (3, 0, 4, None)],
    "batch 4 to 6": [(2, 0, 4, 5), (2, 0, 6, None)],
    "all at once": [(2, 0, 4, 5), (3, 0, 6, 2), (1, 0, 5, 1), (2, 0, 3, None)],
    "more readers than are left": [(2, 0, 4, 11), (18, 0, 4, None)],
}
WORKERS = {
    "0 to 3": [(1, 0, 4, 6), (1, 3, 4, None)],
    "3 to 1": [(1, 3, 4, 6), (1, 1, 4, None)],
    "all at once": [(2, 1, 4, 4), (1, 3, 6, 3), (3, 0, 4, None)],
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", ["webdataset", "folder", "image_list", "cache"])
def test_every_sample_comes_once_in_the_epoch(sections, kind, chain):
    trained = run_in_parts(sections[kind], CHAINS[chain])
    assert sorted(trained) == sorted(keys(take(module(sections[kind], epochs=1))))
    assert len(set(trained)) == COUNT


@pytest.mark.parametrize("chain", WORKERS)
@pytest.mark.parametrize("kind", ["webdataset", "folder", "cache"])
def test_every_sample_comes_once_with_other_loader_processes(sections, kind, chain):
    trained = run_in_parts(sections[kind], WORKERS[chain])
    assert len(trained) == len(set(trained)) == COUNT


def test_the_next_epoch_is_shared_as_always(sections):
    """Behind the epoch that was dealt out, the readers have the shares and the order of a run that was not stopped."""
    section = sections["folder"]
    _, states = run(section, 2, 5)
    first, after = run(section, 3, None, states, epochs=1)
    resumed = [keys(take(resumed_module(section, 3, rank, after), 7)) for rank in range(3)]
    whole = [keys(take(module(section, rank, 3), 15)) for rank in range(3)]
    for mine, theirs in zip(resumed, whole):
        assert mine == theirs[30:58]
    assert len(first) == COUNT - 40


def resumed_module(section: dict, processes: int, rank: int, states: list[RankState]):
    data = module(section, rank, processes)
    data.load_rank_states(states, rank)
    return data


def test_augmentation_goes_by_epoch_and_key_alone(sections):
    """A sample that comes after the change has the crop and the flip that it would have had without it."""
    section = {**sections["folder"], "crop": "random", "flip": True}
    whole = {key: image for batch in take(module(section, epochs=1)) for key, image in zip(batch.key, batch.image)}
    _, states = run(section, 2, 5)
    for rank in range(3):
        data = module(section, rank, 3, epochs=1)
        data.load_rank_states(states, rank)
        for batch in take(data):
            assert all(torch.equal(whole[key], image) for key, image in zip(batch.key, batch.image))


def test_readers_in_two_epochs(sections):
    """One reader is in the second epoch already: both epochs are exact."""
    section = sections["folder"]
    states = []
    trained = []
    for rank, steps in ((0, 9), (1, 13)):  # 45 images a reader: 9 batches of 4 are in the first epoch, 13 in the second
        data = module(section, rank, 2, epochs=2)
        trained += keys(take(data, steps))
        states.append(data.rank_state())
    assert [state["left"][0][-1][0] for state in states] == [0, 1]
    trained += run(section, 3, None, states, epochs=2)[0]
    assert set(Counter(trained).values()) == {2}


def test_no_reader_waits_for_another(sections):
    """Readers for whom nothing is left of the epoch go on with the next one; all give as many batches as are wanted."""
    _, states = run(sections["folder"], 2, 11)
    for rank in range(18):
        data = module(sections["folder"], rank, 18)
        data.load_rank_states(states, rank)
        batches = take(data, 4)
        assert [len(batch) for batch in batches] == [4] * 4


def test_as_many_readers_in_other_places_go_on_as_they_were(sections, capsys):
    """Two processes of one reader, or one process of two: each reader keeps its share, nothing is dealt out."""
    section = sections["webdataset"]
    whole, _ = run(section, 2, 8)
    first, states = run(section, 2, 3)
    capsys.readouterr()
    second, _ = run({**section, "workers": 2}, 1, 10, states)
    assert sorted(first + second) == sorted(whole)
    assert "that are left" not in capsys.readouterr().out


def test_what_has_changed_is_said_once(sections, capsys):
    _, states = run(sections["folder"], 2, 5)
    capsys.readouterr()
    run({**sections["folder"], "workers": 1}, 3, 1, states)
    said = capsys.readouterr().out
    line = "data: processes 2 -> 3: the images that are left, 50 of epoch 0, go to 3 readers\n"
    assert said.count("that are left") == 1 and line in said


def test_skipped_samples_are_neither_read_twice_nor_forgotten(tmp_path):
    """Broken images, a broken shard, and samples that a rule leaves out: all are counted once over the whole epoch."""
    for shard in range(8):
        names = range(shard * 6, shard * 6 + 6)
        write_shard(
            tmp_path / f"{shard}.tar",
            [
                (
                    f"{n:03d}",
                    {"png": b"no" if n % 7 == 0 else encoded(n), "json": json.dumps({"punsafe": n % 3 / 2}).encode()},
                )
                for n in names
            ],
        )
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:2000])
    section = {"name": "webdataset", "shards": f"{tmp_path}/*.tar", "shuffle_buffer": 2, "max_skipped": 0.9,
               "rules": {"punsafe": {"below": 0.9}}, "batch_size": 3}  # fmt: skip
    whole = module(section, epochs=1)
    wanted = keys(take(whole))
    for middle in (1, 3):
        first, states = run(section, 2, 3, epochs=1)
        second, states = run(section, middle, 1, states, epochs=1)
        last = [module(section, rank, 2, epochs=1) for rank in (0, 1)]
        for rank, data in enumerate(last):
            data.load_rank_states(states, rank)
        trained = first + second + [key for data in last for key in keys(take(data))]
        assert sorted(trained) == sorted(wanted)
        assert last[0].skipped + last[1].skipped == whole.skipped
        assert last[0].filtered + last[1].filtered == whole.filtered


def test_other_rules_read_the_begun_shards_again(sections, capsys):
    """What comes of a shard, or how it is shuffled, has changed: no place within it means anything any more."""
    first, states = run(sections["webdataset"], 1, 4)
    capsys.readouterr()
    trained, _ = run({**sections["webdataset"], "shuffle_buffer": 5}, 1, None, states, epochs=1)
    assert (
        "other items in the shards, or another order of them: those that were begun begin anew"
        in capsys.readouterr().out
    )
    assert set(first) | set(trained) == set(keys(take(module(sections["webdataset"], epochs=1))))
    assert len(first) + len(trained) - COUNT <= 15  # a group


def test_resuming_reads_one_group_again(sections, monkeypatch):
    """However far a run has come: at most the shards of one group are opened before the first new sample."""
    for steps in (1, 11, 100):
        _, states = run(sections["webdataset"], 1, steps)
        data = module({**sections["webdataset"], "batch_size": 1})
        data.load_rank_states(states, 0)
        opened: list[str] = []
        monkeypatch.setattr(
            data.source, "samples", lambda at, o=opened, read=data.source.samples: o.append(at) or read(at)
        )
        next(iter(data.train_dataloader()))
        assert len(opened) <= 4, (steps, opened)  # a group of three, and the first of the next one


class Units(Source):
    """Units of different numbers of items, some of which a rule leaves out."""

    def __init__(self, count: int, shuffle_buffer: int | None) -> None:
        super().__init__(batch_size=1)
        self.count, self.shuffle_buffer = count, shuffle_buffer

    def items(self, unit: int) -> Iterator[SkippedSample | Judged | int]:
        for item in range(1 + unit % 4):
            out = (unit + item) % 4 == 0
            yield FilteredOut("rule", f"{unit} {item}") if out else 1000 * unit + item
        if unit % 3 == 0:
            yield Judged(unit)


def names_of(source: Units) -> Counter:
    """Return every item that an epoch has."""
    if source.shuffle_buffer is None:
        return Counter(range(source.count))
    return Counter(name_of(item) for unit in range(source.count) for item in source.items(unit))


def name_of(item: SkippedSample | Judged | int) -> str | int:
    return item.key if isinstance(item, FilteredOut) else f"judged {item.count}" if isinstance(item, Judged) else item


@pytest.mark.parametrize("shuffle_buffer", [None, 0, 1, 4])
def test_any_chain_of_changes_is_exact(shuffle_buffer):
    """Random numbers of readers, places, units: in every epoch that was ended, each item came once."""
    exact = 0
    for trial in range(40):
        chance = random.Random(trial)
        source = Units(chance.choice([6, 8, 40, 200]), shuffle_buffer)
        seen: dict[int, Counter] = {}
        left: list[list[Stretch]] = [[]] * chance.randint(1, 6)
        apart = 0  # epochs between the slowest and the fastest reader
        for _ in range(chance.randint(1, 6)):
            apart = max(apart, max(map(last_epoch, left)) - min(its[0].epoch if its else 0 for its in left))
            left = deal(left, chance.randint(1, 6), source.count) if chance.random() < 0.8 else left
            pace = chance.randint(0, source.count)
            for reader, its in enumerate(left):
                left[reader] = advance(source, its, reader, len(left), max(0, pace + chance.randint(-3, 3)), seen)
        last = max(map(last_epoch, left))
        for reader, its in enumerate(left):
            advance(source, its, reader, len(left), None, seen, epochs=last + 1)
        if apart <= EPOCHS_APART:
            exact += 1
            for epoch in range(last + 1):
                assert seen[epoch] == names_of(source), (trial, epoch)
    assert exact > 25


def last_epoch(left: list[Stretch]) -> int:
    return left[-1].epoch if left else 0


def advance(
    source: Units,
    left: list[Stretch],
    reader: int,
    readers: int,
    items: int | None,
    seen: dict[int, Counter],
    epochs: int | None = None,
) -> list[Stretch]:
    """Read some items, or all of the epochs, and return what is left of the reader then."""
    after = left
    if items == 0:
        return after
    for behind, stretch in stretches(left, reader, readers, source.count, epochs):
        for position, item in walk(source, Order(1, stretch.epoch), stretch):
            seen.setdefault(stretch.epoch, Counter())[name_of(item)] += 1
            after = [position, *left[len(left) - behind :]]
            items = None if items is None else items - 1
            if items == 0:
                return after
    return after


def test_a_state_stays_small():
    """Hundreds of changes within an epoch: the state does not grow with their number."""
    source = Units(100_000, None)
    left: list[list[Stretch]] = [[]] * 8
    for change in range(200):
        left = deal(left, 5 + change % 7, source.count)
        left = [advance(source, its, reader, len(left), 20, {}) for reader, its in enumerate(left)]
        assert max(len(its) for its in left) <= 8


def test_readers_far_apart_begin_anew_together(sections, capsys):
    """A reader with little that is usable runs ahead; the others are not kept busy with making up for it."""
    left = [[Stretch(50, 3, 12, 2)], [Stretch(4, 5, 12, 2)]]
    dealt = deal(left, 3, 12)
    assert {its[-1].epoch for its in dealt} == {6}
    state = module(sections["folder"]).rank_state()
    states = [{**state, "processes": 2, "left": [[[epoch, 1, COUNT, 2, 0, 0]]]} for epoch in (50, 4)]
    module(sections["folder"]).load_rank_states(states, 0)
    said = capsys.readouterr().out
    assert "some readers were 46 epochs behind others: what was read of epochs behind 6 comes again" in said


def test_untouched_places():
    assert untouched([Stretch(0, 6, 20, 2), Stretch(0, 9, 20, 2)], 20) == 8
    assert untouched([Stretch(0, 6, 20, 2)], 20) == 20
    assert untouched([Stretch(0, 0, 20, 1)], 20) == 0
    assert untouched([], 20) == 20


@pytest.mark.parametrize("count", [1, 2, 17, 1000, TABLE, TABLE + 1, 100_003])
def test_every_unit_has_one_place(count):
    for epoch in (0, 1):
        units = Order(5, epoch).permutation(count).at(np.arange(count))
        assert np.array_equal(np.sort(units), np.arange(count))


def test_large_permutations_are_shuffled():
    """Neighbors, and the place itself, say nothing about a unit; epochs say nothing about each other."""
    count = 100_000
    units, others = (Order(5, epoch).permutation(count).at(np.arange(count)) for epoch in (0, 1))
    for one, other in ((units[:-1], units[1:]), (units, np.arange(count)), (units, others)):
        pairs, _, _ = np.histogram2d(one, other, 16)
        expected = len(one) / 256
        assert ((pairs - expected) ** 2 / expected).sum() < 400  # chi-squared of 225 degrees: 225 +- 21


def test_a_large_permutation_is_pinned():
    permutation = Order(0, 0).permutation(10**12)
    assert permutation.table is None
    assert list(permutation.units(range(10**11, 10**12, 4 * 10**11))) == [478475848901, 888733566791, 258427981332]


@pytest.mark.parametrize(
    "change",
    [
        {"left": []}, {"left": [[[0, 1]]]}, {"left": [[["a"] * 6]]}, {"left": [[[0, 0, 99, 1, 0, 0]]]},
        {"left": [[[0, 0, 9, 0, 0, 0]]]}, {"left": [[[0, 0, 9, 1, 0, 5]]]}, {"left": [[[-1, 0, 9, 1, 0, 0]]]},
        {"left": [[[2, 0, 9, 1, 0, 0], [1, 0, 9, 1, 0, 0]]]}, {"left": None},
        {"turn": 1}, {"turn": "x"}, {"workers": 2}, {"workers": None}, {"processes": 2}, {"seed": "a"},
        {"count": 2**70}, {"unit": 3}, {"items": None}, {"counts": None}, {"counts": {"read": "many"}},
        {"counts": {"skipped": {"a": "b"}}}, {"counts": {"examples": {"a": [1]}}},
        {"counts": {"examples": 1}}, {"counts": {"skipped": 1}}, {"counts": {"examples": {"a": None}}},
    ],
)  # fmt: skip
def test_a_damaged_position_is_told(sections, change):
    data = module(sections["folder"])
    state = {**data.rank_state(), **change}
    with pytest.raises(UserError, match=r"resume\.checkpoint: the position in the data is damaged"):
        data.load_rank_states([state], 0)


@pytest.mark.parametrize("change", [{"workers": 2, "left": [[], []]}, {"count": 8}, {"unit": "shards"}])
def test_ranks_of_different_runs_are_told(sections, change):
    state = {**module(sections["folder"]).rank_state(), "processes": 2}
    with pytest.raises(UserError, match="the position in the data is damaged"):
        module(sections["folder"]).load_rank_states([state, {**state, **change}], 0)


@pytest.mark.parametrize("states", [[], None, ["x"], [{}]])
def test_no_position_at_all_is_told(sections, states):
    with pytest.raises(UserError, match="the position in the data is damaged"):
        module(sections["folder"]).load_rank_states(states, 0)


SPY = """
import json, os, sys
from pytorch_lightning import Callback
from ldm_lab.config import load
from ldm_lab.errors import run_program
from ldm_lab.training import diffusion, runner

class Spy(Callback):
    keys = []
    def on_train_batch_end(self, trainer, task, outputs, batch, index):
        self.keys += batch.key
    def on_train_end(self, trainer, task):
        with open(f"{os.environ['PART']}_{trainer.global_rank}.json", "w") as file:
            json.dump(self.keys, file)

own = diffusion.DiffusionTask.callbacks
diffusion.DiffusionTask.callbacks = lambda task, folder: [*own(task, folder), Spy()]
run_program(lambda: runner.run(load(sys.argv[1], sys.argv[2:])))
"""


@pytest.mark.slow
def test_every_sample_comes_once_with_other_processes(tmp_path):
    """Two processes, three, then one with two loader processes, stopped in mid-epoch each time: whole trainings."""
    write_files(tmp_path / "images", 108)
    yaml = make_run(tmp_path, checkpoint={"every": 100})
    folder = ["data.name=folder", f"data.path={tmp_path}/images"]
    (tmp_path / "spy.py").write_text(SPY)
    trained: list[str] = []
    parts = [
        (2, 4, ["data.batch_size=4"]),
        (3, 8, ["data.batch_size=6"]),
        (1, 10, ["data.batch_size=2", "data.workers=2"]),
    ]
    for number, (processes, until, options) in enumerate(parts):
        options = [
            *folder,
            *options,
            f"trainer.devices={processes}",
            f"trainer.max_steps={until}",
            "resume.checkpoint=last",
        ]
        ran = run_program("spy.py", yaml, *options, "trainer.strategy=ddp", cwd=tmp_path, timeout=400, PART=str(number))
        assert ran.returncode == 0, ran.stderr[-3000:]
        for rank in range(processes):
            trained += json.loads((tmp_path / f"{number}_{rank}.json").read_text())
    assert len(trained) == len(set(trained)) == 4 * 8 + 4 * 18 + 2 * 2 == 108
    state = read_pickled(tmp_path / "runs/tiny/last.ckpt")["ldm_lab"]
    assert state["samples_seen"] == 108
