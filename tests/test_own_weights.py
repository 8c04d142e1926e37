"""A conditioner that brings its own weights along, as a part around another library's model does.

It trains, caches, is saved by what pins its weights, and is sampled; `weights:` is never needed.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CLOOB, make_run
from torch import Tensor, nn

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import has_weights, load_part
from ldm_lab.conditions import Conditions, ConditionSpec, Embedding
from ldm_lab.config import register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner
from ldm_lab.io.atomic import existing_file, sha256

WIDTH, ROWS = 16, 32


@register("conditioner", "word_table")
class WordTable(Conditioner):
    """The mean of a text's words in a table of vectors, which lies in a folder of its own."""

    def __init__(self, *, folder: str) -> None:
        """`folder`: where table.safetensors lies."""
        super().__init__()
        self.folder = folder
        self.table = nn.Embedding(ROWS, WIDTH)

    @staticmethod
    def weights_identity(config: dict) -> str:
        return sha256(existing_file(Path(config["folder"]) / "table.safetensors", "word table"))

    def load_pretrained(self) -> None:
        self.load_state_dict(load_file(Path(self.folder) / "table.safetensors"))

    @property
    def spec(self) -> ConditionSpec:
        return {"embed": Embedding(WIDTH)}

    def embed(self, text: str) -> Tensor:
        rows = [zlib.crc32(word.encode()) % ROWS for word in text.split()] or [0]
        return self.table(torch.tensor(rows, device=self.table.weight.device)).mean(0)  # [D]

    def from_batch(self, batch: Batch) -> Conditions:
        return {"embed": torch.stack([self.embed(text) for text in batch.text])}  # [B, D]

    def from_prompts(self, texts: Sequence[str], images: Sequence[Image.Image]) -> Conditions:
        return {"embed": torch.stack([self.embed(text) for text in texts])}  # [n, D]


@pytest.fixture
def table(tmp_path) -> Path:
    torch.manual_seed(3)
    (tmp_path / "words").mkdir()
    path = tmp_path / "words" / "table.safetensors"
    save_file({"table.weight": torch.randn(ROWS, WIDTH)}, path)
    return path


def test_its_weights_are_loaded_and_pinned(table):
    config = {"name": "word_table", "folder": str(table.parent)}
    part = load_part("conditioner", config)
    assert torch.equal(part.table.weight, load_file(table)["table.weight"])
    assert not part.training and not part.table.weight.requires_grad
    assert has_weights("conditioner", config)
    assert embedder_of(config) == {"name": "word_table", "sha256": sha256(table)}
    with torch.device("meta"):
        assert load_part("conditioner", config, read_weights=False).table.weight.is_meta
    assert not has_weights("conditioner", CLOOB)
    table.unlink()
    with pytest.raises(UserError, match=r"table\.safetensors: no such file \(word table\)"):
        has_weights("conditioner", config)


def test_from_training_to_pictures(table, tmp_path, monkeypatch, program, caplog):
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=8, trainer={"max_steps": 2}, checkpoint={"every": 2}, conditioner=None)
    words = ["conditioner.name=word_table", f"conditioner.folder={table.parent}"]

    def done(*command) -> str:
        code, out, err = program(*command)
        assert code == 0, err
        return out

    done("train", "--config", yaml, *words)
    pinned = sha256(table)
    run = read_pickled("runs/tiny/last.ckpt")["ldm_lab"]
    assert run["frozen"]["conditioner"] == pinned
    assert not [name for name in read_pickled("runs/tiny/last.ckpt")["state_dict"] if "table" in name]
    model = read_model("runs/tiny")
    assert model.extra["conditioner"] == pinned
    assert model.config["conditioner"]["folder"] == str(table.parent)

    sampled = ("sample", "a red star", "--steps", 2, "-n", 1, "--checkpoint", "runs/tiny/ema.safetensors")
    done(*sampled, "--out", "first")
    assert "not the conditioner file" not in caplog.text

    done("ldm_lab.__main__", "cache", "--config", yaml, "--out", "cached", *words)
    meta = json.loads(Path("cached/meta.json").read_text())
    assert meta["description"]["conditioner.sha256"] == pinned and meta["complete"]
    done("train", "--config", yaml, "run=of_cache", *words, "cache.folder=cached")

    save_file({"table.weight": torch.randn(ROWS, WIDTH)}, table)
    done(*sampled, "--out", "second")
    assert "not the conditioner file that the model was trained with" in caplog.text
    code, _, err = program("train", "--config", yaml, "run=other", *words, "cache.folder=cached")
    assert code == 2 and "this cache was made with another conditioner" in err
