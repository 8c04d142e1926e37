"""docs/recipes.md as a new user follows it: its commands, as they stand, against a server on this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm_lab.curation.scoring.job import sample_hash
from ldm_lab.curation.store.format import ScoreStore, hash_of
from ldm_lab.data.samples import RawSample
from ldm_lab.data.tar import read_shard

ROOT = Path(__file__).resolve().parents[1]
COUNT = 300  # pictures
IMG2DATASET = os.environ.get("IMG2DATASET") or shutil.which("img2dataset")  # it has an environment of its own


def commands() -> list[str]:
    """Return the commands of the recipes that are meant to be run here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """Run the server in a folder that looks like a checkout; give that folder and the server's address."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("configs", "assets", "examples", "train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "examples/serve_shapes.py", "--count", str(COUNT), "--port", "0"]
    server = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        lines = [server.stdout.readline().strip() for _ in range(3)]
        assert lines[:2] == ["data/cc12m/cc12m.tsv", "data/laion/laion2B-en-aesthetic/part-00000.parquet"], lines
        yield folder, re.search(r"http://\S+(?=;)", lines[2]).group()
    finally:
        server.terminate()
        server.wait()


def environment() -> dict[str, str]:
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if IMG2DATASET:
        path.append(str(Path(IMG2DATASET).parent))
    python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PATH": os.pathsep.join(path), "PYTHONPATH": python, "NO_ALBUMENTATIONS_UPDATE": "1"}


def test_what_is_served(served):
    folder, address = served
    lines = (folder / "data/cc12m/cc12m.tsv").read_text().splitlines()
    urls, captions = zip(*(line.split("\t") for line in lines))
    assert len(lines) == COUNT + COUNT // 25 > len(set(urls)) == COUNT
    assert any(caption.startswith('"') for caption in captions)
    table = pq.read_table(folder / "data/laion/laion2B-en-aesthetic/part-00000.parquet").to_pylist()
    assert {row["URL"] for row in table} == set(urls)
    assert all(row["hash"] == hash_of(row["URL"], row["TEXT"]) for row in table)
    assert {row["aesthetic"] > 7 for row in table} == {True, False}
    with urllib.request.urlopen(f"{address}/7.jpg") as response:
        assert response.headers["Content-Type"] == "image/jpeg"
        assert response.read().startswith(b"\xff\xd8")
    with urllib.request.urlopen(f"{address}/51.jpg") as response:
        assert response.headers["Content-Type"] == "text/html"
    for dead in ("20.jpg", "robots.txt", "../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/{dead}")


def test_the_tsv_becomes_a_table_without_losses(served, tmp_path):
    folder, _ = served
    select = next(command for command in commands() if "select/cc12m.yaml" in command)
    words = [word.replace("out=data/cc12m/urls", f"out={tmp_path}/urls") for word in shlex.split(select)]
    subprocess.run(words, cwd=folder, env=environment(), check=True, capture_output=True)
    rows = pq.read_table(tmp_path / "urls").to_pylist()
    lines = {tuple(line.split("\t")) for line in (folder / "data/cc12m/cc12m.tsv").read_text().splitlines()}
    assert sorted((row["URL"], row["TEXT"]) for row in rows) == sorted(lines)


def test_a_scored_sample_has_the_hash_of_its_url_and_caption():
    fields = {"url": "http://a/1", "caption": "star"}
    assert sample_hash(fields) == hash_of("http://a/1", "star")
    assert sample_hash({**fields, "caption": None}) == hash_of("http://a/1", None)
    assert sample_hash({**fields, "hash": -5}) == -5
    for unknown in ({"url": "http://a/1"}, {"caption": "star"}, {**fields, "caption": "\ud800"}, {**fields, "url": 1}):
        assert sample_hash(unknown) is None


@pytest.mark.slow
@pytest.mark.skipif(not IMG2DATASET, reason="img2dataset is neither on the path nor named by $IMG2DATASET")
def test_from_urls_to_a_training_run(served):
    folder, _ = served
    outputs: dict[str, str] = {}
    for command in commands():
        words = shlex.split(command)
        if "train.py" in words:
            words += ["trainer.max_steps=4", "demo.every=4", "data.batch_size=16", "trainer.threads=1"]
        begin = time.monotonic()
        done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        print(f"{time.monotonic() - begin:6.1f} s  {command}")
        outputs[command] = done.stdout + done.stderr

    dead = {n for n in range(1, COUNT + 1) if n % 20 == 0 or n % 50 == 1}
    stats = [json.loads(path.read_text()) for path in (folder / "data/cc12m/images").glob("*_stats.json")]
    assert sum(shard["count"] for shard in stats) == COUNT
    assert sum(shard["successes"] for shard in stats) == COUNT - len(dead)
    samples = [item for path in sorted((folder / "data/cc12m/images").glob("*.tar")) for item in read_shard(str(path))]
    assert len(samples) == COUNT - len(dead)
    assert all(isinstance(item, RawSample) and item.image and item.text for item in samples)

    scored = sorted(folder.glob("data/cc12m/images/*.scores.parquet"))
    scores = [row for path in scored for row in pq.read_table(path).to_pylist()]
    assert sorted(row["key"] for row in scores) == sorted(item.key for item in samples)
    table = pq.read_table(folder / "data/laion/laion2B-en-aesthetic").to_pylist()
    warm = {row["hash"]: row["aesthetic"] for row in table}
    pairs = [(row["aesthetic"], warm[row["hash"]]) for row in scores]  # the head's, and what it was trained toward
    assert sum(abs(ours - given) for ours, given in pairs) / len(pairs) < 1.5

    for run in ("cc12m", "laion"):
        out = next(out for command, out in outputs.items() if f"run={run}" in command)
        assert "left out as asked" in out and "rule aesthetic" in out, out
    assert (folder / "runs/cc12m/ema.safetensors").is_file() and (folder / "runs/laion/ema.safetensors").is_file()
    assert (folder / "out/cc12m/grid.png").is_file()
    store = ScoreStore(folder / "data/laion/aesthetic-tags-kv")
    assert len(store) == COUNT + COUNT // 25
    best = pq.read_table(folder / "data/cc12m/best").to_pylist()
    expected = {hash_ for hash_, (ours, _) in zip((row["hash"] for row in scores), pairs) if np.float16(ours) > 7}
    assert {hash_of(row["URL"], row["TEXT"]) for row in best} == expected
