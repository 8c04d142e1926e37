"""`python -m ldm_lab score`: every image once, whatever broke off in between; one process or two; bad input."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_sets import encoded, samples, write_files
from PIL import Image
from tiny import run_program

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.files import read_safetensors
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import build
from ldm_lab.curation.heads.head import load_head, save_head
from ldm_lab.curation.scoring import files as score_files
from ldm_lab.curation.scoring.files import read_embeddings, read_facts
from ldm_lab.data.tar import read_files, read_shard, write_shard

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def make_head(path: Path, embed_dim: int, embedder: dict, seed: int = 0, **keys: str) -> Path:
    section = {"name": "linear", "embed_dim": embed_dim, "embedder": embedder, "column": "aesthetic", **keys}
    head = build("head", section)
    torch.nn.init.normal_(head.weight, std=5, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.constant_(head.bias, 5)
    save_head(path, head, section, {})
    return path


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A tiny CLIP of open_clip's with random weights, two heads for it and one for another CLIP."""
    folder = tmp_path_factory.mktemp("tools")
    section = {"name": "clip", "architecture": ARCHITECTURE}
    torch.manual_seed(0)
    save_part(folder / "clip.safetensors", build("conditioner", section), section)
    embedder = embedder_of({"name": "clip", "weights": str(folder / "clip.safetensors")})
    make_head(folder / "a.safetensors", 12, embedder)
    make_head(folder / "b.safetensors", 12, embedder, seed=1, column="pwatermark", output="probability")
    make_head(folder / "other.safetensors", 12, {**embedder, "sha256": "0" * 64})
    make_head(folder / "wide.safetensors", 16, embedder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six shards of five images; 25 have a url, the last shard none; sample 7 has no caption."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        made = samples(range(shard * 5, shard * 5 + 5))
        for key, parts in made:
            n = int(key)
            url = {"url": f"http://x/{n}", "hash": 2**62 + n} if shard % 2 else {"URL": f"http://x/{n}", "hash": 1.5}
            parts["json"] = json.dumps(url if shard < 5 else {"other": [n]}).encode()
            if n == 7:
                del parts["txt"]
        write_shard(folder / f"{shard:05d}.tar", iter(made))
    return folder


@pytest.fixture
def score(tools, program):
    """Run the command in this process with the tiny CLIP and head."""

    def call(*args: str | Path, head: str = "a") -> tuple[int, str, str]:
        heads = ["--head", tools / f"{head}.safetensors"] if head else []
        common = ["--clip", f"weights={tools / 'clip.safetensors'}", "--accelerator", "cpu", "--workers", 0]
        return program("ldm_lab.__main__", "score", *args, *heads, *common)

    return call


def rows(folder: Path) -> dict[str, list]:
    """Return the columns of all Parquet files in a folder, in the order of their names."""
    tables = [pq.read_table(path).to_pydict() for path in sorted(folder.glob("**/*.scores.parquet"))]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}


# --------------------------------------------------------------------------------------------------------- what it does


@torch.no_grad()
def test_scores_are_those_of_the_parts_called_by_hand(score, shards, tools, tmp_path):
    code, out, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path / "out", "--batch-size", 3)
    assert code == 0, err
    assert "30 images scored in 6 of 6 shards: 30 samples read, none skipped" in out
    found = rows(tmp_path / "out")
    clip = load_part("conditioner", {"name": "clip", "weights": str(tools / "clip.safetensors")})
    head = load_head(tools / "a.safetensors").head
    raw = [item for path in sorted(shards.glob("*.tar")) for item in read_shard(str(path))]
    embeds = clip.from_prompts([], [Image.open(io.BytesIO(item.image)) for item in raw])["embed"]
    assert found["key"] == [item.key for item in raw]
    assert np.allclose(found["aesthetic"], head(embeds), atol=1e-4)
    texts = clip.encode_text([f"caption {n}" for n in range(30)])
    similarity = (embeds * texts).sum(dim=1)
    similar = [np.nan if value is None else value for value in found["similarity"]]
    assert np.isnan(similar[7]) and np.isnan(similar).sum() == 1, "no caption, no similarity"
    assert np.allclose(similar, np.where(np.arange(30) == 7, np.nan, similarity), atol=1e-5, equal_nan=True)
    assert found["url"] == [f"http://x/{n}" if n < 25 else None for n in range(30)]
    assert found["hash"] == [2**62 + n if (n // 5) % 2 and n < 25 else None for n in range(30)]
    schema = pq.read_schema(tmp_path / "out" / "00000.scores.parquet")
    assert [str(schema.field(name).type) for name in ("key", "url", "hash")] == ["string", "string", "int64"]
    assert all(str(schema.field(name).type) == "float" for name in ("aesthetic", "similarity"))


def test_the_file_says_what_made_it(score, shards, tools, tmp_path):
    assert score("--shards", f"{shards}/00000.tar", "--out", tmp_path)[0] == 0
    facts = read_facts(tmp_path / "00000.scores.parquet")
    loaded = load_head(tools / "a.safetensors")
    assert facts.embedder == loaded.head.embedder and facts.predictors == {"aesthetic": loaded.sha256}
    assert facts.read == 5 and facts.skipped == {}
    assert facts.heads["aesthetic"] == score_files.HeadFacts(str(tools / "a.safetensors"), "linear", {})


def test_several_heads_in_columns_of_their_own(score, shards, tools, tmp_path):
    heads = ["--head", tools / "b.safetensors", "--head", f"mine={tools / 'a.safetensors'}"]
    assert score("--shards", f"{shards}/*.tar", "--out", tmp_path, "--no-similarity", *heads)[0] == 0
    found = rows(tmp_path)
    assert list(found) == ["key", "url", "hash", "pwatermark", "mine", "aesthetic"]
    assert found["mine"] == found["aesthetic"] and all(0 < value < 1 for value in found["pwatermark"])
    code, _, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path / "x", "--head", tools / "a.safetensors")
    assert code == 2 and "there is a column aesthetic already" in err


def test_beside_the_shards_and_below_subfolders(score, shards, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "00000.tar").write_bytes((shards / "00000.tar").read_bytes())
    assert score("--shards", f"{tmp_path}/data/*/*.tar")[0] == 0
    assert (tmp_path / "data" / "one" / "00000.scores.parquet").is_file()
    rewrite = ["--rewrite", tmp_path / "new"]
    assert score("--shards", f"{tmp_path}/data/*/*.tar", "--out", tmp_path / "out", *rewrite)[0] == 0
    for name in ("one", "two"):
        assert (tmp_path / "out" / name / "00000.scores.parquet").is_file()
        assert (tmp_path / "new" / name / "00000.tar").is_file()


def test_rewritten_shards_have_the_scores_and_everything_else(score, shards, tmp_path):
    made = samples(range(4))
    made[1][1]["seg.npy"] = b"other data"
    made[2][1]["json"] = json.dumps({"url": "u", "deep": {"a": [1, None]}}).encode()
    del made[3][1]["json"]
    made.append(("00009", {"png": b"no image", "txt": b"x"}))
    write_shard(tmp_path / "in.tar", iter(made))
    code, out, err = score("--shards", tmp_path / "in.tar", "--out", tmp_path / "out", "--rewrite", tmp_path / "new")
    assert code == 0, err
    assert "undecodable image 1 (e.g. 00009)" in out
    again = dict(read_files(str(tmp_path / "new" / "in.tar")))
    assert list(again) == ["00000", "00001", "00002", "00003"]
    scores = dict(zip(*(rows(tmp_path / "out")[name] for name in ("key", "aesthetic"))))
    for key, parts in made[:4]:
        assert {e: d for e, d in again[key].items() if e != "json"} == {e: d for e, d in parts.items() if e != "json"}
        fields = json.loads(again[key]["json"])
        assert fields["aesthetic"] == scores[key] and -1 <= fields["similarity"] <= 1
    assert json.loads(again["00002"]["json"])["deep"] == {"a": [1, None]}


def test_embeddings_are_written_with_their_keys(score, shards, tools, tmp_path):
    assert score("--shards", f"{shards}/*.tar", "--out", tmp_path, "--embeddings")[0] == 0
    head = load_head(tools / "a.safetensors").head
    for number in range(6):
        embeds, keys, embedder = read_embeddings(tmp_path / f"{number:05d}.embeddings.safetensors")
        table = pq.read_table(tmp_path / f"{number:05d}.scores.parquet").to_pydict()
        assert embeds.dtype == torch.float16 and keys == table["key"] and embedder == head.embedder
        assert np.allclose(head(embeds), table["aesthetic"], atol=0.02)


def test_images_of_a_folder(score, tmp_path):
    write_files(tmp_path / "images", 7)
    code, out, err = score("--images", tmp_path / "images", "--out", tmp_path / "out")
    assert code == 0 and "7 images scored" in out, err
    assert sorted(rows(tmp_path / "out")["key"])[0] == "sub0/00000.png"
    (tmp_path / "images" / "sub0" / "00000.png").unlink()  # another set of images is another block
    code, out, _ = score("--images", tmp_path / "images", "--out", tmp_path / "out")
    assert code == 0 and "6 images scored" in out and len(rows(tmp_path / "out")["key"]) == 6


# ------------------------------------------------------------------------------------------------------ once, not twice


def test_killed_in_the_middle_each_image_is_scored_once(score, shards, tmp_path, monkeypatch):
    args = ("--shards", f"{shards}/*.tar", "--out", tmp_path / "out", "--embeddings")
    child = os.fork()
    if child == 0:  # a process of its own, which is killed as it is
        write = score_files.write_scores
        monkeypatch.setattr(score_files, "write_scores", lambda path, *a: (time.sleep(0.3), write(path, *a)))
        with open(os.devnull, "w") as silent:
            sys.stdout = sys.stderr = silent
            score(*args)
        os._exit(0)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").glob("*.parquet")}
    assert 2 <= len(before) < 6
    code, out, err = score(*args)
    assert code == 0 and "30 images scored in 6 of 6 shards" in out, err
    after = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").glob("*.parquet")}
    assert all(after[name] == seen for name, seen in before.items()), "what was done is not done again"
    assert rows(tmp_path / "out")["key"] == [f"{n:05d}" for n in range(30)]
    assert score("--shards", f"{shards}/*.tar", "--out", tmp_path / "whole")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_parquet_a_changed_shard_and_a_missing_file_are_made_again(score, shards, tmp_path):
    (tmp_path / "data").mkdir()
    for path in shards.glob("*.tar"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    args = ("--shards", f"{tmp_path}/data/*.tar", "--out", tmp_path / "out")
    assert score(*args)[0] == 0
    whole = files(tmp_path / "out")
    path = tmp_path / "out" / "00001.scores.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    write_shard(tmp_path / "data" / "00002.tar", iter(samples(range(40, 60))))
    code, out, _ = score(*args)
    assert code == 0 and "45 images scored" in out
    again = files(tmp_path / "out")
    assert [name for name in whole if again[name] != whole[name]] == ["00002.scores.parquet"]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert score(*args, "--embeddings")[0] == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


def test_other_scores_are_not_overwritten(score, shards, tools, tmp_path):
    args = ("--shards", f"{shards}/*.tar", "--out", tmp_path)
    assert score(*args)[0] == 0
    before = files(tmp_path)
    code, _, err = score(*args, head="b")
    assert code == 2 and "00000.scores.parquet: has scores of another predictors; take another --out" in err
    code, _, err = score(*args, "--no-similarity")
    assert code == 2 and "another similarity" in err
    assert files(tmp_path) == before


@pytest.mark.slow
def test_two_processes_give_the_same_files_as_one_and_a_killed_run_goes_on(tools, tmp_path):
    """On real photographs, by the command as a user types it."""
    if not PHOTOS.is_dir():
        pytest.skip("needs shared/data")
    clip, head = f"weights={tools / 'clip.safetensors'}", tools / "a.safetensors"
    common = ["-m", "ldm_lab", "score", "--shards", f"{PHOTOS}/*.tar", "--head", head, "--clip", clip]
    common += ["--accelerator", "cpu", "--workers", "0"]
    for out, more in (("one", []), ("two", ["--devices", "2"])):
        done = run_program(*common, "--out", tmp_path / out, *more, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("800 images scored in 8 of 8 shards: 800 samples read, none skipped") == 1
    assert len(files(tmp_path / "one")) == 8 and files(tmp_path / "one") == files(tmp_path / "two")
    check_killed(common, tmp_path, files(tmp_path / "one"))


def check_killed(command: list, folder: Path, whole: dict[str, bytes], shards: int = 8) -> None:
    """Kill the command once a shard is done, start it again, and compare with an uninterrupted run's files."""
    args = [sys.executable, *map(str, command), "--out", str(folder / "killed")]
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(args, cwd=folder, env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 600
    while not list((folder / "killed").glob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "killed").glob("*.parquet")}
    assert 1 <= len(done) < shards
    again = run_program(*command, "--out", folder / "killed", cwd=folder, timeout=900)
    assert again.returncode == 0, again.stderr
    assert all((folder / "killed" / name).stat().st_mtime_ns == seen for name, seen in done.items())
    assert files(folder / "killed") == whole
    keys = rows(folder / "killed")["key"]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
def test_photographs_by_vit_b_32(tmp_path):
    """A real architecture of open_clip's, with random weights and LAION's head: killed, and by two processes."""
    if not PHOTOS.is_dir():
        pytest.skip("needs shared/data")
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32-quickgelu").state_dict(), tmp_path / "vit.pt")
    for shard in range(3):  # eight photographs of each: this architecture takes its time on a CPU
        some = itertools.islice(read_files(str(PHOTOS / f"{shard:05d}.tar")), 8)
        write_shard(tmp_path / f"{shard:05d}.tar", some)
    head = Path(__file__).parent / "data" / "golden" / "aesthetic_heads" / "sa_0_4_vit_b_32_linear.pth"
    common = ["-m", "ldm_lab", "score", "--shards", f"{tmp_path}/*.tar", "--head", head]
    common += ["--clip", f"weights={tmp_path / 'vit.pt'}", "--accelerator", "cpu", "--workers", "0"]
    common += ["--batch-size", "4"]
    for out, more in (("one", []), ("two", ["--devices", "2"])):
        done = run_program(*common, "--out", tmp_path / out, *more, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
        assert "24 images scored in 3 of 3 shards" in done.stdout
    assert files(tmp_path / "one") == files(tmp_path / "two")
    check_killed(common, tmp_path, files(tmp_path / "one"), shards=3)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_corrupt_samples_are_counted_by_reason(score, tmp_path):
    made = dict(samples(range(12)))
    made["00001"]["png"] = made["00001"]["png"][:60]
    made["00002"]["png"] = b"no image"
    del made["00003"]["png"]
    made["00004"]["json"] = b"{not json"
    made["00005"]["txt"] = b"\xff\xfe bytes"
    made["00006"]["png"] = encoded(6, (1, 1))
    many = [*made.items(), ("00000", made["00000"])]
    write_shard(tmp_path / "0.tar", iter(many))
    write_shard(tmp_path / "1.tar", iter(samples(range(20, 24))))
    data = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: data.index(b"00022.png") + 600])  # within an image
    (tmp_path / "2.tar").write_bytes(b"not a tar file at all" * 100)
    code, out, err = score("--shards", f"{tmp_path}/?.tar", "--out", tmp_path / "out")
    assert code == 0, err
    for reason in ("truncated image 1", "undecodable image 1", "no image 1", "duplicate key 1", "broken shard 2"):
        assert reason in out
    keys = rows(tmp_path / "out")["key"]
    assert len(keys) == len(set(keys)) and {"00000", "00004", "00005", "00006", "00020"} <= set(keys)
    assert not {"00001", "00002", "00003"} & set(keys)
    code, out, _ = score("--shards", f"{tmp_path}/?.tar", "--out", tmp_path / "out")
    assert code == 0 and "truncated image 1" in out, "what was counted before is counted still"


def test_nothing_to_be_scored_is_an_error(score, tmp_path):
    write_shard(tmp_path / "0.tar", iter([("0", {"png": b"no image"})]))
    code, _, err = score("--shards", tmp_path / "0.tar", "--out", tmp_path / "out")
    assert code == 2 and "no image could be scored: 1 samples read, 1 skipped" in err


def test_a_server_that_is_not_there_leaves_the_shard_for_another_time(score, shards, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_lab.io.http.PAUSE", 0.001)
    address = "http://127.0.0.1:9/00009.tar"
    code, out, _ = score("--shards", shards / "00000.tar", address, "--out", tmp_path)
    assert code == 1 and "5 images scored in 1 of 2 shards" in out and f"such as {address}" in out
    assert not (tmp_path / "00009.scores.parquet").exists()


def test_heads_of_another_clip_or_width(score, shards, tmp_path):
    args = ("--shards", f"{shards}/*.tar", "--out", tmp_path / "out")
    code, _, err = score(*args, head="other")
    assert code == 2 and "other.safetensors: belongs to the embeddings of clip with weights of sha256 000000" in err
    code, _, err = score(*args, head="wide")
    assert code == 2 and "takes embeddings of width 16" in err and "these have 12" in err
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_released_head_with_another_clip(score, shards, tmp_path, golden_heads):
    head = golden_heads / "sa_0_4_vit_b_32_linear.pth"
    code, _, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path, "--head", f"v1={head}")
    assert code == 2 and "belongs to the embeddings of clip ViT-B-32-quickgelu openai, these are of clip with" in err


def test_embeddings_that_are_not_finite_are_left_out(score, shards, tmp_path, monkeypatch):
    from ldm_lab.embed import Encoder

    images = Encoder.images

    def broken(self, pixels):
        embeds = images(self, pixels).clone()
        embeds[1] = float("nan")
        return embeds

    monkeypatch.setattr(Encoder, "images", broken)
    code, out, _ = score("--shards", f"{shards}/00000.tar", "--out", tmp_path, "--embeddings")
    assert code == 0 and "non-finite embedding 1 (e.g. 00001)" in out and "4 images scored" in out
    assert rows(tmp_path)["key"] == ["00000", "00002", "00003", "00004"]
    assert read_safetensors(tmp_path / "00000.embeddings.safetensors")[0]["embed"].isfinite().all()


def test_no_room_and_no_folder(score, shards, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    code, _, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path / "file")
    assert code == 2 and "cannot be made" in err

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path / "out")
    assert code == 2 and "cannot be written: No space left on device" in err
    assert not list((tmp_path / "out").iterdir()), "nothing half-written"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--shards or --images, one of them"),
        (["--shards", "a.tar", "--images", "b"], "--shards or --images, one of them"),
        (["--shards", "missing.tar"], "no such file: missing.tar"),
        (["--shards", "pipe:cat x.tar", "--out", "o"], "a command has no name"),
        (["--shards", "http://x/0.tar"], "--out has to say where"),
        (["--images", "."], "--out has to say where"),
        (["--shards", "missing.tar", "--batch-size", "0"], "--batch-size: at least 1"),
        (["--shards", "missing.tar", "--head", "nothing"], "nothing: no such file"),
    ],
)
def test_requests_that_make_no_sense(score, args, message):
    code, _, err = score(*args)
    assert code == 2 and message in err


def test_rewriting_onto_the_shards_themselves(score, shards):
    code, _, err = score("--shards", f"{shards}/*.tar", "--rewrite", shards)
    assert code == 2 and "would overwrite" in err
    assert not list(shards.glob("*.parquet"))


def test_devices_that_are_not_there(score, shards, tmp_path):
    code, _, err = score("--shards", f"{shards}/*.tar", "--out", tmp_path, "--devices", "none")
    assert code == 2 and "--devices none" in err


def test_no_clip_for_a_head_of_ones_own(tools, shards, program):
    code, _, err = program(
        "ldm_lab.__main__", "score", "--shards", f"{shards}/*.tar", "--head", tools / "a.safetensors"
    )
    assert code == 2 and "--clip: has to be given, as the head belongs to clip with weights of sha256" in err


def test_a_head_in_a_file_with_weights_of_its_clip_needs_no_more(tmp_path):
    """Which CLIP it is stands in the head's own file, which is read later."""
    from argparse import Namespace

    from ldm_lab.commands.score import announce_weights

    head = Path(__file__).parent / "data" / "golden" / "aesthetic_heads" / "sa_0_4_vit_b_32_linear.pth"
    announce_weights(Namespace(head=[str(head)], clip=[f"weights={tmp_path / 'vit.pt'}"]))
