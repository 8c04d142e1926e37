"""Who reads what and when: distinct shares, every sample once an epoch, a new order each epoch, exact resume."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from data_sets import keys, module, take, write_cache, write_files, write_shards

from ldm_lab.config import build, signature_options
from ldm_lab.data.datamodule import DataModule
from ldm_lab.data.files import Folder
from ldm_lab.data.order import Order, shuffled
from ldm_lab.data.shares import share
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch

KINDS = ("webdataset", "image_list", "folder", "cache")
COUNT = 48


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict]:
    """The same 48 samples as 12 shards, a list, a folder, a cache."""
    root = tmp_path_factory.mktemp("sets")
    write_shards(root / "shards", shards=12, per_shard=4)
    write_files(root / "images", COUNT)
    numbers = torch.arange(2 * COUNT, dtype=torch.float16)[:, None]  # [2 * COUNT, 1]
    write_cache(root / "cache", {"embed": numbers}, per_shard=10, variants=2)
    images = {"crop": "random", "flip": True}
    return {
        # A buffer of 3 makes runs of 12 samples: 3 shards, so that resuming meets several runs.
        "webdataset": {"name": "webdataset", "shards": f"{root}/shards/*.tar", "shuffle_buffer": 3, **images},
        "image_list": {"name": "image_list", "path": f"{root}/list.txt", **images},
        "folder": {"name": "folder", "path": f"{root}/images", **images},
        "cache": {"name": "cache", "path": f"{root}/cache"},
    }


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    assert [b.key for b in got] == [b.key for b in wanted]
    for a, b in zip(got, wanted):
        assert a.text == b.text and a.conditions.keys() == b.conditions.keys()
        tensors = [(a.image, b.image), (a.mean, b.mean), (a.logvar, b.logvar)]
        for one, other in [*tensors, *((a.conditions[name], b.conditions[name]) for name in a.conditions)]:
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_distinct_and_cover_everything(sections, kind):
    """One pass of two ranks with two loader processes each reads every sample once."""
    ranks = [module({**sections[kind], "workers": 2}, rank, 2, epochs=1) for rank in (0, 1)]
    read = [keys(take(data)) for data in ranks]
    assert not set(read[0]) & set(read[1])
    assert len(read[0]) + len(read[1]) == len({*read[0], *read[1]}) == COUNT


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_has_another_order(sections, kind):
    read = keys(take(module(sections[kind]), 3 * COUNT // 4))
    epochs = [read[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
    assert all(len(set(epoch)) == COUNT for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_depends_on_the_seed_alone(sections, kind):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    once = take(module(sections[kind]), 5)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(take(module(sections[kind]), 5), once)
    assert torch.equal(torch.get_rng_state(), state)  # the training's noise is its own
    assert keys(take(module(sections[kind], seed=1), 5)) != keys(once)


def test_shards_mix_within_the_buffer(sections):
    """With a large buffer neighbors come from different shards; without one, shards stay whole."""
    for buffer, mixed in ((100, True), (0, False)):
        read = keys(take(module({**sections["webdataset"], "shuffle_buffer": buffer}), COUNT // 4))
        shards = [int(key) // 4 for key in read]
        assert (max(len(list(run)) for _, run in itertools.groupby(shards)) < 4) == mixed


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_delivers_what_an_uninterrupted_run_would_have(sections, kind, workers):
    """After batch 5 (in mid-epoch) and after batch 17 (in the second one), random crops and flips included.

    The batches that the loader has prepared ahead do not count, only those that were consumed. The state goes the way
    a checkpoint goes.
    """
    section = {**sections[kind], "workers": workers}
    whole = take(module(section), 24)
    for consumed in (5, 17):
        data = module(section)
        for number, batch in enumerate(data.train_dataloader()):
            if number == consumed + 2:
                break
            if number < consumed:
                data.consumed(batch)
        file = io.BytesIO()
        torch.save([data.rank_state()], file)
        file.seek(0)
        resumed = module(section)
        resumed.load_rank_states(torch.load(file, weights_only=True), 0)
        assert_same(take(resumed, 24 - consumed), whole[consumed:])


def test_resume_restores_each_rank(sections):
    section = sections["webdataset"]
    whole = [take(module(section, rank, 2), 9) for rank in (0, 1)]
    states = []
    for rank in (0, 1):
        data = module(section, rank, 2)
        take(data, 4)
        states.append(data.rank_state())
    for rank in (0, 1):
        data = module(section, rank, 2)
        data.load_rank_states(states, rank)
        assert_same(take(data, 5), whole[rank][4:])
        after = data.rank_state()
        data.setup()  # as another call of the Trainer does: the position stays
        assert data.rank_state() == after


def test_states_may_come_before_the_data_is_listed(sections):
    first = module(sections["image_list"])
    take(first, 3)
    section = {**sections["image_list"], "image_size": 8, "batch_size": 4, "workers": 0}
    resumed = DataModule(build("data", section), seed=0)
    resumed.load_rank_states([first.rank_state()], 0)
    resumed.setup()
    assert_same(take(resumed, 2), take(first, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_skips_without_decoding(sections, kind, monkeypatch):
    """A resumed reader decodes the batches that it delivers and no others."""
    data = module(sections[kind])
    take(data, 8)
    resumed = module(sections[kind])
    resumed.load_rank_states([data.rank_state()], 0)
    decoded = []
    decode = resumed.source.decode
    monkeypatch.setattr(resumed.source, "decode", lambda item, order: decoded.append(item) or decode(item, order))
    take(resumed, 2)
    assert len(decoded) == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 7}, "seed 0 -> 7"),
        ({"path": "fewer"}, "images 48 -> 20"),
        ({"seed": 7, "workers": 2}, "workers 1 -> 2"),
    ],
)
def test_resume_with_other_data_goes_on_with_the_next_epoch(sections, tmp_path, change, told, capsys):
    states = []
    for rank in (0, 1):
        data = module(sections["folder"], rank, 2)
        take(data, 8)  # 24 of 48 images per epoch: in the second one
        states.append(data.rank_state())
    section = dict(sections["folder"])
    if "path" in change:
        write_files(tmp_path / "images", 20)
        section["path"] = str(tmp_path / "images")
    section["workers"] = change.get("workers", 0)
    resumed = module(section, 0, 2, change.get("seed", 0))
    resumed.load_rank_states(states, 0)
    said = capsys.readouterr().out
    assert told in said and "this run goes on with epoch 2" in said
    assert resumed.rank_state()["counts"]["read"] == 32  # each rank's own
    assert {batch.state.position[0] for batch in take(resumed, 2)} == {2}


def test_augmentation_changes_with_the_epoch(sections):
    batches = take(module(sections["folder"]), 2 * COUNT // 4)
    images = {}
    for batch in batches:
        for key, image in zip(batch.key, batch.image):
            images.setdefault(key, []).append(image)
    differing = sum(not torch.equal(*pair) for pair in images.values())
    assert differing > COUNT / 2


@pytest.mark.parametrize(
    ("kind", "rank_count", "workers", "told"),
    [
        ("webdataset", 2, 8, r"12 shards are too few for 16 readers \(2 processes x 8 workers\).*workers to at most 6"),
        (
            "webdataset",
            13,
            0,
            r"12 shards are too few for 13 readers \(13 processes x 1 workers\).*at most 12 processes",
        ),
        ("folder", 1, 49, "48 images are too few for 49 readers"),
    ],
)
def test_too_few_for_the_readers(sections, kind, rank_count, workers, told):
    with pytest.raises(UserError, match=told):
        module({**sections[kind], "workers": workers}, 0, rank_count)


def test_shares_partition_for_any_number_of_readers():
    for count, readers in ((10, 3), (7, 7), (100, 1), (5, 4)):
        permutation = Order(1, 2).permutation(count)
        shares = [list(permutation.units(share(2, r, readers, count).places)) for r in range(readers)]
        assert sorted(np.concatenate(shares)) == list(range(count))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 50])
def test_shuffle_buffer_loses_nothing(size):
    items = list(range(20))
    got = list(shuffled(items, size, random.Random(0)))
    assert sorted(got) == items
    assert (got == items) == (size < 2)
    assert got == list(shuffled(items, size, random.Random(0)))
    assert all(item <= place + size for place, item in enumerate(got))  # nothing comes before it was read


def test_the_permutation_is_pinned():
    """A resumed run must find the order of the run that it continues, whatever versions it meets."""
    assert list(Order(0, 0).permutation(8).units(range(8))) == [2, 0, 7, 1, 5, 6, 4, 3]
    assert Order(0, 0).random("a").random() == 0.07632444599368138


def test_options_of_the_base_classes_are_keys():
    known = signature_options(Folder)
    assert next(iter(known)) == "path"
    assert {"image_size", "crop", "flip", "min_size", "require_text", "batch_size", "workers"} < set(known)
    assert "common" not in known
