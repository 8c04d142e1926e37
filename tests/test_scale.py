"""The latent scale: the recorded statistic, its measuring, the command."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import AUTOENCODER, ROOT

from ldm_lab import __main__ as commands
from ldm_lab.checkpoints.files import read_safetensors
from ldm_lab.checkpoints.native import save_part
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import PartConfig, build, to_yaml
from ldm_lab.data.shapes import write_shards
from ldm_lab.errors import run_program
from ldm_lab.interfaces import Autoencoder
from ldm_lab.training.scale import image_batches, latent_scale, measure_scale


class Known(Autoencoder):
    """An autoencoder whose posterior is N(3, 2^2), whatever the image."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.latent_std.fill_(std)

    def moments(self, image):
        mean = torch.full((len(image), 4, 16, 16), 3.0)
        return mean, torch.full_like(mean, float(np.log(4.0)))


def test_the_statistic_is_the_recorded_one():
    recorded = np.load(ROOT / "tests/data/golden/ccld_train.npz")
    ours = latent_scale(torch.from_numpy(recorded["scale_latents"]))
    assert ours == pytest.approx(float(recorded["autoencoder_scale"]), rel=1e-6)


def test_it_is_a_mean_of_variances_not_the_variance_of_all():
    batches = [torch.tensor([0.0, 2.0]), torch.tensor([10.0, 16.0])]  # unbiased variances 2 and 18
    assert latent_scale(batches) == pytest.approx(10**0.5)


def test_posterior_samples_are_measured_whatever_the_scale_is_now():
    images = [torch.zeros(8, 3, 32, 32)] * 4
    torch.manual_seed(5)
    measured = measure_scale(Known(1.0), images)
    assert measured == pytest.approx(2.0, rel=0.02)
    assert measure_scale(Known(7.0), images) == pytest.approx(measured, rel=1e-6)
    torch.manual_seed(6)
    assert measure_scale(Known(1.0), images) == measured, "it brings its own random numbers"
    assert torch.initial_seed() == 6 and torch.equal(torch.rand(2), torch.rand(2, generator=torch.manual_seed(6)))


def test_batches_are_full_whatever_the_readers_give(tmp_path):
    write_shards(tmp_path / "shards", count=22, shards=2, size=32, seed=0)
    data = {
        "name": "webdataset",
        "shards": str(tmp_path / "shards/*.tar"),
        "image_size": 32,
        "batch_size": 1,
        "workers": 2,
    }
    batches = list(image_batches(PartConfig.from_dict("data", data), 0, 3, 7))  # each reader has 11 images: 7 and 4
    assert [tuple(b.shape) for b in batches] == [(7, 3, 32, 32)] * 3
    assert len({image.numpy().tobytes() for b in batches for image in b}) == 21, "no image twice"


@pytest.fixture
def scale(tmp_path, monkeypatch, capsys):
    """Run `python -m ldm_lab scale` on a random autoencoder and 24 drawn shapes: (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "shards", count=24, shards=3, size=32, seed=0)
    torch.manual_seed(0)
    save_part(tmp_path / "ae.safetensors", build("autoencoder", AUTOENCODER), AUTOENCODER)
    config = {
        "task": "autoencoder",
        "data": {"name": "webdataset", "shards": str(tmp_path / "shards/*.tar"), "image_size": 32, "batch_size": 5,
                 "workers": 0},
        "autoencoder": {"name": "kl_f8", "weights": "ae.safetensors"},
    }  # fmt: skip
    Path("run.yaml").write_text(to_yaml(config))

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ldm_lab", "scale", "--config", "run.yaml", *args])
        with pytest.raises(SystemExit) as end:
            run_program(commands.main)
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return call


def test_the_command_measures_and_stores(scale, tmp_path):
    code, out, _ = scale("--batches", "3", "--batch-size", "8", "--out", "out/scaled.safetensors")
    assert code == 0
    tensors, metadata = read_safetensors(tmp_path / "out" / "scaled.safetensors")
    assert f"latent std {float(tensors['latent_std']):.4f} on 24 images (before: 1.0000)" in out
    assert metadata["scale_images"] == "24"
    scaled = load_part("autoencoder", {"name": "kl_f8", "weights": "out/scaled.safetensors"})
    original = load_part("autoencoder", {"name": "kl_f8", "weights": "ae.safetensors"})
    assert float(original.latent_std) == 1.0, "the given file is left as it was"
    assert all(
        torch.equal(a, b)
        for (n, a), b in zip(scaled.state_dict().items(), original.state_dict().values())
        if not n.startswith("latent_")
    )
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(scaled.encode(images) * scaled.latent_std, original.encode(images))
    again = scale("--batches", "3", "--batch-size", "8", "autoencoder.weights=out/scaled.safetensors")[1]
    assert f"latent std {float(tensors['latent_std']):.4f}" in again


def test_the_command_takes_the_images_that_are_there(scale):
    """24 of the 2,048 that it asks for: as a whole batch and a part of one, or all in one."""
    code, out, err = scale()
    assert code == 0, err
    assert "data: 2,048 images were asked for, all 24 that are there were measured" in out
    whole = float(re.search(r"latent std (\S+) on 24 images", out)[1])
    code, out, _ = scale("--batch-size", "16", "--out", "scaled.safetensors")
    assert code == 0 and "512 images were asked for, all 24" in out
    assert float(re.search(r"latent std (\S+) on 24 images", out)[1]) == pytest.approx(whole, rel=0.02)
    assert read_safetensors(Path("scaled.safetensors"))[1]["scale_images"] == "24"
    code, _, err = scale("data.min_size=100")
    assert (
        code == 2 and "no image can be used: data: 24 samples read, 24 left out as asked (100.0%): too small 24" in err
    )


def test_a_smaller_batch_counts_for_less():
    batches = [torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([10.0, 16.0])]  # unbiased variances 4/3 and 18
    assert latent_scale(batches) == pytest.approx(((4 / 3 + 18 / 2) / 1.5) ** 0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batches", "0"], "--batches: at least 1 is needed, not 0"),
        (["--out", "scaled.ckpt"], "--out: the file is written as .safetensors, so its name"),
        (["autoencoder.weights=null", "autoencoder.ch=32"], "autoencoder.weights: has to be given"),
        (["autoencoder.weights=gone.safetensors"], "gone.safetensors: no such file"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_line(scale, args, message):
    code, _, err = scale(*args)
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert not Path("scaled.ckpt").exists()
