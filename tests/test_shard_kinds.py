"""Shards as people make them: unsorted, with dots, links, accents in two forms, without a sample, with holes."""

import bz2
import gzip
import io
import lzma
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from data_sets import encoded, keys, module, samples, take, write_shards

from ldm_lab.data import tar
from ldm_lab.data.samples import APART, DUPLICATE, LINK, OF_LINKS, UNSORTED, RawSample
from ldm_lab.data.tar import read_files, read_shard, write_shard

SHARDS = Path(__file__).parent / "data" / "cases" / "shards"
WANTED = {f"{n:05d}": f"photo number {n}" for n in range(24)}


def make(path: Path, members: list[tuple[str, bytes | str]], kind: int = tarfile.PAX_FORMAT) -> str:
    """Write a tar file; a text in the place of bytes is the target of a hard link, after "->" of a symbolic one."""
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                member.linkname = content.removeprefix("->")
                archive.addfile(member)
                continue
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def read(address: str, **options) -> tuple[dict[str, str], dict[str, int]]:
    """Return key -> caption, and the counts of what was skipped."""
    data = module({"name": "webdataset", "shards": address, "max_skipped": 0.9, "batch_size": 1, **options}, epochs=1)
    batches = take(data)
    return {key: text for batch in batches for key, text in zip(batch.key, batch.text)}, dict(data.skipped)


def parts(numbers: range) -> dict[str, bytes]:
    return {f"{key}.{kind}": data for key, files in samples(numbers) for kind, data in files.items()}


# ------------------------------------------------------------------------------------------------------------ unsorted


@pytest.mark.parametrize("how", ["local", "gz", "pipe"])
@pytest.mark.parametrize("listed", [2**28, 0])
def test_the_case_of_a_grouped_shard(tmp_path, how, listed, monkeypatch):
    """`tar cf x.tar *.jpg *.txt`: every caption is at the end."""
    monkeypatch.setattr(tar, "LISTED", listed)
    path = SHARDS / "grouped.tar"
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    write_shard(tmp_path / "more.tar", samples(range(100, 104)))
    address = {"local": str(path), "gz": f"{tmp_path}/x.tar.gz", "pipe": f"pipe:cat {path}"}[how]
    found, skipped = read([address, f"{tmp_path}/more.tar"], require_text=True)
    assert not skipped and {k: v for k, v in found.items() if v.startswith("photo")} == WANTED


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", ["shuffled", "json at the end", "by kind, json first"])
def test_files_of_a_sample_that_lie_apart(tmp_path, order, stream):
    members = list(parts(range(12)).items())
    if order == "shuffled":  # as a folder's own order may be
        random.Random(1).shuffle(members)
    else:
        rank = {"json": 1} if order == "json at the end" else {"json": 1, "txt": 2, "png": 3}
        members.sort(key=lambda member: rank.get(member[0].partition(".")[2], 0))
    path = make(tmp_path / "x.tar", members)
    found = list(read_shard(f"pipe:cat {path}" if stream else path))
    whole = {key: (files["png"], files["txt"], files["json"]) for key, files in samples(range(12))}
    if stream and order == "json at the end":  # the first ones looked sorted
        assert {item.key for item in found if isinstance(item, RawSample)} == set(whole)
        assert {item.reason for item in found if not isinstance(item, RawSample)} <= {APART}
    else:
        assert {item.key: (item.image, item.text, item.json) for item in found} == whole
        assert len(found) == 12


@pytest.mark.parametrize("listed", [2**28, 0])
def test_a_late_disorder_is_mended_in_local_shards_and_counted_in_streams(tmp_path, monkeypatch, listed):
    monkeypatch.setattr(tar, "LISTED", listed)
    members = list(parts(range(20)).items())
    late = [member for member in members if member[0] in ("00015.txt", "00017.png")]
    path = make(tmp_path / "x.tar", [member for member in members if member not in late] + late)
    assert len(read(path)[0]) == 20 and read(path)[1] == {}
    found, skipped = read(f"pipe:cat {path}")
    assert len(found) == 19 and skipped == {APART: 2, "no image": 1}


def test_a_stream_without_room_is_refused_with_the_command_that_sorts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "HELD", 30_000)
    found, skipped = read(f"pipe:cat {SHARDS / 'grouped.tar'}")
    assert skipped in ({APART: 24}, {UNSORTED: 1}) or APART in skipped
    assert "--sort=name" in UNSORTED and "--sort=name" in APART
    pictures = make(tmp_path / "x.tar", [(f"{n:05d}.png", encoded(n)) for n in range(300)])
    found, skipped = read(f"pipe:cat {pictures}")
    assert len(found) == 300 and not skipped, "pictures alone need no room"


def test_pictures_alone_and_repeated_keys(tmp_path):
    pictures = [(f"{n:05d}.png", encoded(n)) for n in range(12)]
    for address in (make(tmp_path / "x.tar", pictures), f"pipe:cat {tmp_path}/x.tar"):
        assert len(read(address)[0]) == 12
    twice = make(tmp_path / "y.tar", pictures + pictures)
    for address in (twice, f"pipe:cat {twice}"):
        found, skipped = read(address)
        assert len(found) == 12 and skipped == {DUPLICATE: 12}


def test_a_broken_unsorted_shard_gives_what_is_whole(tmp_path):
    path = Path(make(tmp_path / "x.tar", [*((f"{n}.png", encoded(n)) for n in range(9)),
                                          *((f"{n}.txt", b"x" * 2000) for n in range(9))]))  # fmt: skip
    path.write_bytes(path.read_bytes()[:-12_000])
    found = list(read_shard(str(path)))
    assert found[-1].reason == "broken shard" and sum(isinstance(item, RawSample) for item in found) == 7


# ---------------------------------------------------------------------------------------------------------------- names


def test_the_case_of_dots_in_names(capsys):
    address = str(SHARDS / "dots.tar")
    _, skipped = read(address)
    ((reason, count),) = skipped.items()
    assert "data.key_until=last_dot" in reason and count == 1
    assert "names have dots in them; data.key_until=last_dot" in capsys.readouterr().out
    found, skipped = read(address, key_until="last_dot", require_text=True)
    assert not skipped and sorted(found.values()) == sorted(WANTED.values())
    assert "./holiday 2.0 no. 07" in found


@pytest.mark.parametrize("stream", [False, True])
def test_accents_in_both_forms(tmp_path, stream):
    """The pictures come from macOS, their captions do not; sorted by bytes they lie apart."""
    names = ["cafe\u0301", "zebra", "na\xefve", "o\u0308l"]
    texts = ["caf\xe9", "zebra", "nai\u0308ve", "\xf6l"]
    members = sorted([*((f"{n}.png", encoded(1)) for n in names), *((f"{n}.txt", n.encode()) for n in texts)])
    path = make(tmp_path / "x.tar", members)
    found, skipped = read(f"pipe:cat {path}" if stream else path, require_text=True)
    assert len(found) == 4 and not skipped


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_folders_and_droppings(tmp_path, kind):
    deep = "/".join(["a_folder_with_a_long_name"] * 8)
    members = [(f"{deep}/{n}.{e}", d) for n in range(2) for e, d in (("png", encoded(n)), ("txt", b"x"))]
    droppings = [(f"__MACOSX/{deep}/._0.png", b"x"), ("__MACOSX/0.png", b"x"), ("._1.png", b"x"), (".DS_Store", b"x")]
    path = make(tmp_path / "x.tar", [*members, *droppings], kind)
    with tarfile.open(path, "a", format=kind) as archive:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert read(path) == ({f"{deep}/0": "x", f"{deep}/1": "x"}, {})


def test_names_that_are_not_utf8(tmp_path):
    name = b"caf\xe9".decode(errors="surrogateescape")
    path = make(tmp_path / "x.tar", [(f"{name}.png", encoded(1)), (f"{name}.txt", b"x")], tarfile.GNU_FORMAT)
    found, skipped = read(path)
    assert list(found.values()) == ["x"] and not skipped


# ---------------------------------------------------------------------------------------------------------------- links


def test_links_within_a_shard(tmp_path):
    """GNU tar stores a second name of a file as a link to the first."""
    members = [
        ("a.png", encoded(1)), ("a.txt", b"of a"), ("b.png", "a.png"), ("b.txt", b"of b"),
        ("sub/c.png", "->../a.png"), ("sub/c.txt", "->../a.txt"), ("d.png", "->/etc/passwd"), ("d.txt", b"of d"),
        ("e.png", "->f.png"), ("e.txt", b"of e"), ("f.png", encoded(2)), ("f.txt", b"of f"),
    ]  # fmt: skip
    path = make(tmp_path / "x.tar", members)
    found, skipped = read(path)
    assert found == {"a": "of a", "b": "of b", "sub/c": "of a", "e": "of e", "f": "of f"}
    assert skipped == {LINK: 1}
    images = {item.key: item.image for item in read_shard(path) if isinstance(item, RawSample)}
    assert images["b"] == images["sub/c"] == images["a"] != images["e"] == images["f"]
    found, skipped = read(f"pipe:cat {path}")
    assert set(found) == {"a", "f"} and skipped == {LINK: 4}, "of a stream the target has gone by"


def test_a_shard_of_links_alone_is_named(tmp_path, capsys):
    write_shards(tmp_path, 2, 4)
    case = str(SHARDS / "symlinks.tar")
    data = module({"name": "webdataset", "shards": [f"{tmp_path}/*.tar", case], "max_skipped": 0.9}, epochs=1)
    assert len(keys(take(data))) == 8
    assert f"{OF_LINKS} 1 (e.g. {case})" in data.summary()
    assert f"data: 1 shard without an image: {case}" in capsys.readouterr().out


def test_shards_without_a_sample_are_named(tmp_path, capsys):
    empty, other = make(tmp_path / "empty.tar", []), make(tmp_path / "other.tar", [("README", b"x")])
    write_shards(tmp_path / "more", 1, 4)
    found, skipped = read([f"{tmp_path}/more/*.tar", empty, other])
    assert len(found) == 4 and skipped == {"shard without a sample": 2}
    assert f"2 shards without an image: {empty}, {other}" in capsys.readouterr().out


def test_files_with_holes(tmp_path):
    """GNU tar's sparse files, read in a stream and by the list of files."""
    picture = encoded(1)
    plain = tmp_path / "0.png"
    with plain.open("wb") as file:
        file.write(picture)
        file.truncate(2**20)
    (tmp_path / "0.txt").write_text("zero")
    for name, order in (("a.tar", ["0.png", "0.txt"]), ("b.tar", ["0.png", "1.png", "0.txt", "1.txt"])):
        for other in ("1.png", "1.txt"):
            (tmp_path / other).write_bytes((tmp_path / other.replace("1", "0")).read_bytes())
        made = subprocess.run(["tar", "--sparse", "-cf", name, *order], cwd=tmp_path, capture_output=True)
        if made.returncode:
            pytest.skip("no GNU tar here")
        read_back = {item.key: item for item in read_shard(str(tmp_path / name))}
        assert read_back["0"].image == plain.read_bytes() and read_back["0"].text == b"zero"


# ---------------------------------------------------------------------------------------------------- what was found


def test_what_the_first_shard_shows(tmp_path, capsys):
    write_shards(tmp_path, 3, 4)
    make(tmp_path / "00000.tar", [*parts(range(4)).items(), ("9.mp4", b"x"), ("8.jpg", "->gone")])
    module({"name": "webdataset", "shards": [f"{tmp_path}/*.tar", "pipe:cat x"]})
    out = capsys.readouterr().out
    assert "data: 4 shards, 1 not local\n" in out
    assert "data: 00000.tar: 4 images, with 4 .txt, 4 .json\n" in out
    assert "data: 00000.tar: files without an image: 1 .mp4\n" in out
    assert "data: 00000.tar: 1 link to files that are not in it; tar -h stores the files\n" in out
    assert "data: captions of the first 4 samples: 4 .txt; 0 without\n" in out
    module({"name": "webdataset", "shards": "pipe:cat x"})
    assert "what they hold is told at the end" in capsys.readouterr().out


def test_rules_tell_shares_of_all_that_they_have_judged(tmp_path):
    """In a short run most kept samples are still in the shuffle buffer; what was left out has gone past it."""
    scored = [
        (key, {**files, "json": b'{"aesthetic": 9}' if n % 2 else b'{"aesthetic": 1}'})
        for n, (key, files) in enumerate(samples(range(60)))
    ]
    write_shard(tmp_path / "0.tar", scored)
    section = {
        "name": "webdataset",
        "shards": f"{tmp_path}/0.tar",
        "rules": {"aesthetic": {"above": 5}},
        "batch_size": 3,
    }
    data = module(section, epochs=1)
    take(data, 3)
    assert "60 samples read, 21 of them still in the shuffle buffer, 30 left out as asked (50.0%)" in data.summary()
    resumed = module(section, epochs=1)
    resumed.load_rank_states([data.rank_state()], 0)
    take(resumed)
    assert "60 samples read, 30 left out as asked (50.0%)" in resumed.summary()
    assert dict(resumed.filtered) == {"rule aesthetic": 30}


def test_files_are_read_whatever_they_are(tmp_path):
    path = make(tmp_path / "x.tar", [("a.x", b"1"), ("b.x", b"2"), ("a.y", b"3"), ("b.y", b"4")])
    assert dict(read_files(path)) == {"a": {"x": b"1", "y": b"3"}, "b": {"x": b"2", "y": b"4"}}
    assert dict(read_files(path, ("y",))) == {"a": {"y": b"3"}, "b": {"y": b"4"}}


def test_several_tar_files_in_a_row(tmp_path, capsys):
    """`cat a.tar b.tar > c.tar`, or a command that does so: tar -i reads all, and so does training."""
    write_shards(tmp_path, 3, 4)
    whole = b"".join((tmp_path / f"0000{n}.tar").read_bytes() for n in range(3))
    (tmp_path / "c.tar").write_bytes(whole)
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(whole))
    for address in (f"{tmp_path}/c.tar", f"{tmp_path}/c.tar.gz", f"pipe:cat {tmp_path}/0000*.tar"):
        found, skipped = read(address)
        assert len(found) == 12 and not skipped, address
    assert "c.tar: 12 images, with 12 .txt, 12 .json" in capsys.readouterr().out
    end = len(whole.rstrip(b"\0"))
    (tmp_path / "c.tar").write_bytes(whole[: -(-end // 512) * 512])
    found, skipped = read(f"{tmp_path}/c.tar")
    assert len(found) == 12 and skipped == {"broken shard": 1}, "cut off where the last one ends"
    (tmp_path / "c.tar").write_bytes(whole + b"something else" * 60)
    assert read(f"{tmp_path}/c.tar")[1] == {"broken shard": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_header_of_a_monstrous_size_is_a_break(tmp_path, stream):
    """A size in base 256 that a damaged, or hostile, header states; nothing may wait for its end."""
    path = make(tmp_path / "x.tar", [("a.png", encoded(1)), ("b.png", encoded(2)), ("c.png", encoded(3))])
    data = bytearray(Path(path).read_bytes())
    third = sum(512 + -(-len(encoded(n)) // 512) * 512 for n in (1, 2))
    data[third + 124 : third + 136] = b"\x80" + (2**60).to_bytes(11, "big")
    data[third + 148 : third + 156] = b" " * 8
    data[third + 148 : third + 156] = b"%06o\0 " % sum(data[third : third + 512])
    Path(path).write_bytes(data)
    found, skipped = read(f"pipe:cat {path}" if stream else path)
    assert len(found) == 2 and skipped == {"broken shard": 1}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("place", [7, 700, 20_480])
def test_compressed_shards_of_several_parts(tmp_path, pack, place):
    """bgzip, pbzip2 and pixz write them, and so does `cat a.tar.gz b.tar.gz`; tarfile reads the first part."""
    write_shards(tmp_path, 2, 4)
    whole = b"".join((tmp_path / f"0000{n}.tar").read_bytes() for n in range(2))
    path = tmp_path / "c.tar.x"
    path.write_bytes(pack(whole[:place]) + pack(whole[place:]))
    for address in (str(path), f"pipe:cat {path}"):
        found, skipped = read(address)
        assert len(found) == 8 and not skipped, address
    path.write_bytes(path.read_bytes()[:-9])
    assert read(str(path))[1]["broken shard"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "data.shards='pipe:zstd -dc FILE' reads"),
        (b"PK\3\4" + bytes(600), "it is a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html>" * 80, "it is a saved web page"),
    ],
)
def test_shards_of_other_kinds_are_named(tmp_path, content, told):
    (tmp_path / "x.tar").write_bytes(content)
    (problem,) = read_shard(f"{tmp_path}/x.tar")
    assert problem.reason == "broken shard" and told in problem.key
