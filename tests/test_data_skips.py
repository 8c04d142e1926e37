"""Bad samples are skipped and counted by reason; a run of mostly bad ones stops and says so."""

import shutil

import pytest
from data_sets import encoded, keys, module, samples, take, write_files

from ldm_lab.config import build
from ldm_lab.data import loader
from ldm_lab.data.source import Source
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """40 samples in 4 shards: one truncated image, one that is none, one of 1x1 pixels, one without image, two without
    caption, an empty caption; shard 3 breaks off after its sixth sample."""
    root = tmp_path_factory.mktemp("broken")
    all_samples = dict(samples(range(40)))
    all_samples["00003"]["png"] = all_samples["00003"]["png"][:60]
    all_samples["00007"]["png"] = b"not an image"
    all_samples["00012"]["png"] = encoded(12, (1, 1))
    del all_samples["00015"]["png"]
    del all_samples["00021"]["txt"], all_samples["00022"]["txt"]
    all_samples["00022"]["json"] = b'{"caption": "of the metadata, which is no part of training"}'
    all_samples["00023"]["txt"] = b" \n"
    for shard in range(4):
        write_shard(root / f"{shard}.tar", list(all_samples.items())[shard * 10 : shard * 10 + 10])
    whole = (root / "3.tar").read_bytes()
    write_shard(root / "six.tar", list(all_samples.items())[30:36])
    six = len((root / "six.tar").read_bytes().rstrip(b"\0"))
    (root / "six.tar").unlink()
    (root / "3.tar").write_bytes(whole[: six + 512 + 700])  # in the header or data of the seventh sample's first part
    return root


EXPECTED = {"truncated image": 1, "undecodable image": 1, "too small": 1, "no image": 1, "broken shard": 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("require_text", [False, True])
def test_counts_by_reason(broken, workers, require_text):
    section = {"name": "webdataset", "shards": f"{broken}/*.tar", "require_text": require_text, "max_skipped": 0.5}
    data = module({**section, "workers": workers}, epochs=1)
    read = keys(take(data))
    bad = {3, 7, 12, 15} | ({21, 22, 23} if require_text else set())
    assert sorted(read) == [f"{n:05d}" for n in range(36) if n not in bad]
    assert dict(data.skipped) == EXPECTED
    assert dict(data.filtered) == ({"no caption": 3} if require_text else {})
    state = data.rank_state()["counts"]
    assert state["read"] == 37  # 36 samples and a broken shard
    assert state["examples"]["too small"] == ["00012"]
    assert state["examples"]["broken shard"] == [f"{broken}/3.tar"]
    assert "too small 1 (e.g. 00012)" in data.summary() and "37 samples read" in data.summary()


def test_captions_of_samples_without_one_are_empty(broken):
    data = module({"name": "webdataset", "shards": f"{broken}/2.tar", "shuffle_buffer": 0}, epochs=1)
    texts = [text for batch in take(data) for text in batch.text]
    assert texts[:5] == ["caption 20", "", "", "", "caption 24"]


@pytest.mark.parametrize("name", ["folder", "image_list"])
def test_files(tmp_path, name):
    write_files(tmp_path / "images", 20)
    (tmp_path / "images/sub0/00004.png").write_bytes(encoded(4)[:50])
    (tmp_path / "images/sub1/00005.txt").unlink()
    (tmp_path / "images/sub0/00006.png").write_bytes(encoded(6, (400, 15)))
    (tmp_path / "images/sub0/notes.md").write_text("no image")
    (tmp_path / "images/.hidden").mkdir()
    shutil.copy(tmp_path / "images/sub0/00000.png", tmp_path / "images/.hidden/00000.png")
    with open(tmp_path / "list.txt", "a") as file:
        file.write("  images/gone.png  \n\nimages\n" if name == "image_list" else "")
    path = {"folder": "images", "image_list": "list.txt"}[name]
    data = module({"name": name, "path": str(tmp_path / path), "require_text": True, "max_skipped": 0.9}, epochs=1)
    assert len(keys(take(data))) == 17
    more = {"missing file": 1, "unreadable file": 1} if name == "image_list" else {}
    assert dict(data.skipped) == {"truncated image": 1, "too small": 1, **more} and data.filtered == {"no caption": 1}


def test_of_samples_with_one_key_the_first_counts(tmp_path, monkeypatch):
    """Next to each other, or anywhere in the shard; a second copy of all samples is no reason to give up."""
    monkeypatch.setattr(loader, "CONSECUTIVE_FAILURES", 5)
    pair = [("00001", {"png": encoded(n), "txt": f"caption {n}".encode()}) for n in (1, 2)]
    write_shard(tmp_path / "0.tar", [*samples(range(1)), *pair, *samples(range(2, 20)), *samples(range(20))])
    section = {"name": "webdataset", "shards": f"{tmp_path}/0.tar", "shuffle_buffer": 0, "max_skipped": 0.6}
    data = module(section, epochs=1)
    batches = take(data)
    assert keys(batches) == [f"{n:05d}" for n in range(20)]
    assert batches[0].text[1] == "caption 1" and dict(data.skipped) == {"duplicate key": 21}


def test_a_shard_without_an_end_is_cut(tmp_path):
    """Between two samples nothing else tells it; all that is there is used."""
    write_shard(tmp_path / "0.tar", samples(range(8)))
    whole = (tmp_path / "0.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    (tmp_path / "0.tar").write_bytes(whole[: -(-end // 512) * 512])
    data = module({"name": "webdataset", "shards": f"{tmp_path}/0.tar", "max_skipped": 0.5}, epochs=1)
    assert len(keys(take(data))) == 8 and dict(data.skipped) == {"broken shard": 1}


def test_an_empty_caption_is_no_missing_one(broken):
    """23 has a caption file of blanks, 21 and 22 have none."""
    data = module({"name": "webdataset", "shards": f"{broken}/2.tar", "require_text": "file"}, epochs=1)
    assert len(keys(take(data))) == 8 and dict(data.filtered) == {"no caption": 2} and not data.skipped
    data = module({"name": "webdataset", "shards": f"{broken}/2.tar", "max_pixels": 28 * 20 - 1, "max_skipped": 0.9})
    with pytest.raises(UserError, match="too many pixels"):
        take(data, 1)


def test_a_wish_for_captions_is_no_fault_of_the_images(tmp_path, monkeypatch):
    """40 captions among 200 images train, in shards and in a folder; one image that is truncated counts for itself."""
    monkeypatch.setattr(Source, "judged_after", 50)
    few = [(key, parts if n % 5 == 0 else {"png": parts["png"]}) for n, (key, parts) in enumerate(samples(range(200)))]
    few[0][1]["png"] = few[0][1]["png"][:60]
    write_shard(tmp_path / "0.tar", few)
    data = module({"name": "webdataset", "shards": f"{tmp_path}/0.tar", "require_text": True}, epochs=3)
    assert set(keys(take(data))) == {key for key, parts in few[1:] if "txt" in parts}
    assert data.filtered == {"no caption": 480} and data.skipped == {"truncated image": 3}
    assert "480 left out as asked (80.0%): no caption 480 (e.g." in data.summary()
    assert "3 skipped (2.5%): truncated image 3" in data.summary(), "a share of those that are wanted"


def test_counts_survive_a_resume(broken):
    section = {"name": "webdataset", "shards": f"{broken}/*.tar", "max_skipped": 0.5}
    whole = module(section, epochs=2)
    take(whole)
    first = module(section, epochs=2)
    take(first, 7)
    second = module(section, epochs=2)
    second.load_rank_states([first.rank_state()], 0)
    take(second)
    assert second.rank_state() == whole.rank_state()
    assert sum(whole.skipped.values()) == 2 * sum(EXPECTED.values())


def test_a_run_that_skips_too_much_stops(broken, monkeypatch):
    """5 of 37 are bad, 13.5 %; judged after 100, when it may be a little more or less."""
    monkeypatch.setattr(Source, "judged_after", 100)
    section = {"name": "webdataset", "shards": f"{broken}/*.tar"}
    assert len(take(module({**section, "max_skipped": 0.2}), 60)) == 60
    data = module({**section, "max_skipped": 0.1})
    with pytest.raises(UserError, match=r"too many unusable samples: 1\d\d samples read.*broken shard.*allows 10.0%"):
        take(data, 60)
    assert data.rank_state()["counts"]["read"] < 120


@pytest.mark.parametrize("workers", [0, 2])
def test_a_wholly_broken_data_set_stops(tmp_path, workers):
    """Instead of turning for ever; the message comes out of a loader process as one line."""
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", [(f"{shard}{n}", {"jpg": b"<html>404</html>"}) for n in range(4)])
    with pytest.raises(UserError) as error:
        take(module({"name": "webdataset", "shards": f"{tmp_path}/*.tar", "workers": workers}), 1)
    message = str(error.value)
    assert "no usable sample in a long time" in message
    assert "skipped (100.0%): undecodable image" in message and "e.g. " in message
    assert "\n" not in message and "Traceback" not in message


def test_a_long_stretch_of_bad_samples_stops_before_the_epoch_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CONSECUTIVE_FAILURES", 50)
    write_shard(tmp_path / "0.tar", [(f"{n}", {"jpg": b"x"}) for n in range(1000)])
    with pytest.raises(UserError, match="50 samples read, 50 skipped"):
        take(module({"name": "webdataset", "shards": f"{tmp_path}/0.tar"}), 1)


def test_unreachable_shards_stop_a_run_that_went_well_so_far(tmp_path, monkeypatch):
    """A server that goes down: by then the share of skipped samples is tiny and would stay so for days."""
    monkeypatch.setattr(loader, "CONSECUTIVE_FAILURES", 100)
    write_shard(tmp_path / "0.tar", samples(range(200)))
    data = module({"name": "webdataset", "shards": f"{tmp_path}/0.tar"})
    batches = iter(data.train_dataloader())
    for _ in range(50):
        next(batches)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UserError, match=r"4 samples read, 4 skipped .*: unreachable shard 4"):
        next(batches)


def test_one_unreadable_shard_does_not_stop_a_reader_that_has_no_other(tmp_path):
    """With as many shards as readers a bad shard is a reader's whole epoch; in the next one it has another shard."""
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", samples(range(shard * 40, shard * 40 + 40)))
    (tmp_path / "1.tar").write_bytes(b"garbage" * 200)
    for rank in (0, 1):
        data = module({"name": "webdataset", "shards": f"{tmp_path}/*.tar"}, rank, 2)
        assert len(take(data, 30)) == 30
        assert set(data.skipped) == {"broken shard"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size", 0), ("workers", -1), ("image_size", 0), ("max_skipped", 1.0), ("max_skipped", -0.1)],
)
def test_values_out_of_range(key, value):
    section = {"name": "folder", "path": "x", "image_size": 8, "batch_size": 4, key: value}
    with pytest.raises(UserError, match=rf"data\.{key}: .*needed, not {value}"):
        build("data", section)
