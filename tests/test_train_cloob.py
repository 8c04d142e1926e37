"""Training CLOOB's towers: what a run leaves behind, captions, diagnostics, wrong input."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CLOOB, ROOT, run_program

from ldm_lab.batch import Batch
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import load, part_class, to_yaml
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import UserError
from ldm_lab.training.cloob import agreement, required_captions


def make_run(folder: Path, images: int = 64, **sections: dict) -> Path:
    """Write a tiny CLOOB run on drawn shapes; return the path of its YAML. `sections` are laid over it."""
    write_shards(folder / "shards", count=images, shards=2, size=32, seed=0)
    config = {
        "task": "cloob", "run": "tiny", "seed": 1,
        "data": {"name": "webdataset", "shards": str(folder / "shards" / "*.tar"), "image_size": 32, "batch_size": 16,
                 "workers": 0, "require_text": True},
        "conditioner": CLOOB, "loss": {"name": "infoloob"}, "optim": {"lr": 2e-3, "decay_on": "matrices"},
        "trainer": {"accelerator": "cpu", "max_steps": 4, "threads": 1},
        "checkpoint": {"every": 2, "keep": 0}, "logging": {"every": 1},
    }  # fmt: skip
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs go under the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def column(run: Path, name: str) -> list[float]:
    with open(run / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def test_a_run_learns_and_leaves_a_usable_conditioner(here, program):
    yaml = make_run(
        here, images=16, trainer={"max_steps": 40}, checkpoint={"every": 40}
    )  # the same batch again and again
    code, _, err = program("train", "--config", yaml)
    assert code == 0, err
    run = here / "runs" / "tiny"
    first, last = slice(0, 3), slice(-5, None)
    losses = column(run, "train/loss")
    # log 15 is the loss of towers that know nothing, and where the retrieval makes all rows equal
    assert len(losses) == 40 and np.mean(losses[first]) > np.log(15) > np.mean(losses[last]) + 0.5
    chance = 1 / 16
    for direction in ("image_to_text", "text_to_image"):
        assert np.mean(column(run, f"train/{direction}")[last]) >= 2 * chance
    assert np.mean(column(run, "train/paired_cosine")[last]) > np.mean(column(run, "train/unpaired_cosine")[last]) + 0.1
    assert all(0 <= gap <= 2 for gap in column(run, "train/gap"))
    trained = load_part("conditioner", {"name": "cloob", "weights": str(run / "cloob.safetensors")})
    saved = read_pickled(run / "last.ckpt")["state_dict"]
    assert torch.equal(trained.image_encoder.proj.weight, saved["model.image_encoder.proj.weight"])
    assert trained.from_batch(Batch(["a", "b"], ["", ""], torch.zeros(2, 3, 32, 32)))["embed"].shape == (2, 16)


def test_a_learned_temperature_is_trained_logged_and_kept_in_range(here, program):
    yaml = make_run(here, loss={"learn_inv_tau": True, "convention": "ml_jku", "inv_tau": 99.9}, optim={"lr": 0.1})
    assert program("train", "--config", yaml)[0] == 0
    run = here / "runs" / "tiny"
    temperatures = column(run, "train/inv_tau")
    assert temperatures[0] == pytest.approx(99.9, rel=1e-4)
    assert len(set(temperatures)) > 1 and max(temperatures) <= 100.001


def test_a_frozen_image_tower_stays_while_a_text_tower_with_more_words_learns(here, program):
    """The second half of the quickstart's CLOOB: what fits is taken over, of the text tower all is trained."""
    assert program("train", "--config", make_run(here), "run=first", "trainer.max_steps=1")[0] == 0
    first = here / "runs" / "first" / "cloob.safetensors"
    yaml = make_run(here, conditioner={**CLOOB, "vocab_size": 640}, optim={"freeze": ["image_tower"]})
    code, out, err = program("train", "--config", yaml, f"init_from={first}")
    assert code == 0, err
    assert "text_encoder.embed.weight stays as initialized" in out + err
    before, after = (load_part("conditioner", {"name": "cloob", "weights": str(path)}) for path in
                     (first, here / "runs" / "tiny" / "cloob.safetensors"))  # fmt: skip
    assert torch.equal(before.image_encoder.proj.weight, after.image_encoder.proj.weight)
    for name, value in before.image_encoder.state_dict().items():
        assert torch.equal(value, after.image_encoder.state_dict()[name]), name
    for name, value in before.text_encoder.state_dict().items():
        assert not torch.equal(value, after.text_encoder.state_dict()[name]), name


@pytest.mark.slow
def test_two_processes_see_each_other_s_pairs(here):
    """The first step's loss over 2 x 8 pairs is that of the same 16 pairs in one process."""
    yaml = make_run(here, data={"batch_size": 8}, trainer={"devices": 2, "max_steps": 1})
    done = run_program(ROOT / "train.py", "--config", yaml, cwd=here)
    assert done.returncode == 0, done.stderr
    task = part_class("task", {"name": "cloob"})
    from ldm_lab.data.datamodule import DataModule

    config = load(yaml)
    torch.manual_seed(config.seed)
    fresh = task(config)
    shares = []
    for rank in (0, 1):
        from ldm_lab.config import build

        data = DataModule(build("data", config["data"]), seed=1, rank=rank, world_size=2)
        data.setup()
        shares.append(next(iter(data.train_dataloader())))
    model = fresh.model
    image = torch.cat([model.encode_image(share.image) for share in shares])
    tokens = torch.cat([model.tokenize(share.text) for share in shares])
    loss = fresh.loss(image, F.normalize(model.text_encoder(tokens), dim=-1))
    assert column(here / "runs" / "tiny", "train/loss") == [pytest.approx(float(loss.detach()), rel=1e-4)]


def test_a_sample_without_a_caption_is_named():
    assert required_captions(Batch(["a", "b"], ["one", "two"])) == ["one", "two"]
    with pytest.raises(UserError, match=r"b has no caption; data\.require_text=true"):
        required_captions(Batch(["a", "b"], ["one", " \n"]))


def test_agreement_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    found = agreement(image, text)
    # cosines: [[1, .6, 0], [0, .8, 1], [.6, 1, .8]]
    assert float(found["image_to_text"]) == pytest.approx(1 / 3)
    assert float(found["text_to_image"]) == pytest.approx(1 / 3)
    assert float(found["paired_cosine"]) == pytest.approx((1 + 0.8 + 0.8) / 3)
    assert float(found["unpaired_cosine"]) == pytest.approx((0.6 + 0 + 0 + 1 + 0.6 + 1) / 6)
    assert float(found["gap"]) == pytest.approx(0.0, abs=1e-6)
    assert float(agreement(image, -text)["gap"]) == pytest.approx(float((image + text).mean(0).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 1}}, "InfoLOOB compares pairs with each other and needs at least 2"),
        ({"conditioner": {"weights": "x.pkl"}}, "conditioner.weights: is for a frozen network"),
        ({"conditioner": {"dropout": 0.2}}, "conditioner.dropout: is for a frozen network"),
        ({"loss": {"name": "reconstruction", "inv_tau": 1.0}}, "loss.inv_tau: no such key"),
    ],
)
def test_wrong_options_end_in_one_line(here, program, sections, message):
    code, _, err = program("train", "--config", make_run(here, **sections))
    assert code == 2
    assert message in err.strip().splitlines()[-1]
