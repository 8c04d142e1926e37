"""Folders as people have them: img2dataset's files, Stanford Dogs, image and text pairs; a limited number of images."""

import json
import os

import pytest
from data_sets import encoded, keys, module, take, write_files

from ldm_lab.config import build
from ldm_lab.data.files import class_name
from ldm_lab.errors import UserError


def captions(section: dict) -> dict[str, str]:
    batches = take(module({"workers": 0, "batch_size": 1, **section}, epochs=1))
    return {key: text for batch in batches for key, text in zip(batch.key, batch.text)}


def test_the_files_layout_of_img2dataset(tmp_path):
    """As sbucaptions lies on the disk: failed downloads have a JSON and no image, statistics lie beside the folders."""
    for n in range(4):
        folder = tmp_path / f"0000{n % 2}"
        folder.mkdir(exist_ok=True)
        failed = n == 3
        metadata = {"caption": f"from json {n}", "status": "failed_to_download" if failed else "success"}
        (folder / f"00000000{n}.json").write_text(json.dumps(metadata))
        if not failed:
            (folder / f"00000000{n}.jpg").write_bytes(encoded(n, kind="jpeg"))
    (tmp_path / "00000" / "000000000.txt").write_text("from txt 0\n")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert captions({"name": "folder", "path": str(tmp_path), "require_text": True}) == {
        "00000/000000000.jpg": "from txt 0",
        "00000/000000002.jpg": "from json 2",
        "00001/000000001.jpg": "from json 1",
    }


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((content, "") for content in ("", "[1]", '{"caption": null}', '{"caption": 3}', "{}")),
        ("{", "json of the caption is not readable"),
        ("\udcff", "caption is not UTF-8 (data.captions.encoding names its encoding)"),
    ],
)
def test_metadata_without_a_caption(tmp_path, content, problem):
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "a.json").write_bytes(content.encode(errors="surrogateescape"))
    assert captions({"name": "folder", "path": str(tmp_path)}) == {"a.png": ""}
    data = module({"name": "folder", "path": str(tmp_path), "require_text": True, "batch_size": 1}, epochs=1)
    take(data)
    assert data.filtered == ({} if problem else {"no caption": 1})
    assert data.skipped == ({problem: 1} if problem else {})


def test_stanford_dogs(tmp_path):
    folders = ("n02085620-Chihuahua", "n02105412-flat-coated_retriever", "n02089078-black-and-tan_coonhound")
    for i, folder in enumerate(folders):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder[:9]}_{i}.png").write_bytes(encoded(i))
    (tmp_path / "loose.png").write_bytes(encoded(9))
    found = captions({"name": "class_folders", "path": str(tmp_path), "require_text": True})
    assert set(found.values()) == {"Chihuahua", "flat-coated retriever", "black-and-tan coonhound"}
    assert len(found) == 3, "an image in no class folder has no class"
    found = captions({"name": "class_folders", "path": str(tmp_path), "caption": "a photo of a {}"})
    assert "a photo of a Chihuahua" in found.values()
    with pytest.raises(UserError, match=r"data\.caption: one {} is needed"):
        build("data", {"name": "class_folders", "path": "x", "caption": "a dog", "image_size": 8, "batch_size": 1})
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encoded(1))
    with pytest.raises(UserError, match="no class folder with images"):
        module({"name": "class_folders", "path": str(tmp_path / "flat")})


def test_names_of_classes():
    assert class_name("n02113624-toy_poodle") == "toy poodle"
    assert class_name("golden retriever") == "golden retriever"
    assert class_name("n0211-x") == "n0211-x"


@pytest.mark.parametrize("name", ["folder", "image_list"])
def test_a_limit_is_spread_evenly(tmp_path, name):
    write_files(tmp_path / "images", 20)
    path = tmp_path / ("images" if name == "folder" else "list.txt")
    section = {"name": name, "path": str(path), "batch_size": 1}
    every = sorted(keys(take(module(section, epochs=1))))
    few = sorted(keys(take(module({**section, "limit": 5}, epochs=1))))
    assert few == every[::4]
    assert sorted(keys(take(module({**section, "limit": 100}, epochs=1)))) == every
    assert sorted(keys(take(module({**section, "limit": None}, epochs=1)))) == every
    with pytest.raises(UserError, match="limit: at least 1"):
        module({**section, "limit": 0})


def test_a_list_is_one_of_its_files_where_it_has_captions(tmp_path):
    """So that other captions in it are noticed, by a cache and by an evaluation."""
    write_files(tmp_path / "images", 2)
    path = tmp_path / "own.txt"
    for caption, files in (("", []), ("\ta star", [("own.txt", path)])):
        path.write_text("".join(f"{name}{caption}\n" for name in (tmp_path / "list.txt").read_text().split()))
        source = module({"name": "image_list", "path": str(path), "batch_size": 1}).source
        assert [its for its in source.files() if its[0] == "own.txt"] == files


def test_captions_are_asked_for_and_there_are_none(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(encoded(n))
    with pytest.raises(UserError, match=r"none of the 3 images has a caption: no photo\.txt"):
        module({"name": "folder", "path": str(tmp_path), "require_text": True})


def test_a_pipe_among_the_files_does_not_keep_the_reader_waiting(tmp_path):
    write_files(tmp_path / "images", 4)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    (tmp_path / "images" / "sub0" / "00002.txt").unlink()
    os.mkfifo(tmp_path / "images" / "sub0" / "00002.txt")
    data = module({"name": "folder", "path": str(tmp_path / "images"), "batch_size": 1, "max_skipped": 0.9}, epochs=1)
    assert sorted(keys(take(data))) == ["sub0/00000.png", "sub1/00001.png", "sub1/00003.png"]
    assert "unreadable file 2" in data.summary() and "pipe.png" in data.summary()


@pytest.mark.parametrize("ending", ["txt", "TXT", "Txt"])
def test_captions_are_found_however_their_ending_is_written(tmp_path, ending):
    (tmp_path / "photo.JPG").write_bytes(encoded(1, kind="jpeg"))
    (tmp_path / f"photo.{ending}").write_text("a photo")
    (batch,) = take(module({"name": "folder", "path": str(tmp_path), "batch_size": 1}, epochs=1))
    assert batch.text == ["a photo"]
