"""Latents that are spread otherwise than `autoencoder.latent_std` says: a run says so, once, and only then."""

import pytest
import torch
from torch import Tensor

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.interfaces import Autoencoder
from ldm_lab.training import spread
from ldm_lab.training.spread import LatentSpread


class Latents(Autoencoder):
    """Latents with a spread of their own: the images themselves."""

    channels, downscale = 3, 1

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image, torch.full_like(image, -30.0)


def told(capsys, autoencoder: Autoencoder, raw_std: float, batches: int = 3, size: int = 32, goes_on=False) -> str:
    """Return what is said of batches of latents [size, 3, 8, 8] whose raw spread is `raw_std`."""
    watched, generator = LatentSpread(autoencoder, goes_on), torch.Generator().manual_seed(0)
    for _ in range(batches):
        raw = torch.randn(size, 3, 8, 8, generator=generator)
        raw = (raw - raw.mean()) / raw.std() * raw_std + 0.3
        watched.watch(autoencoder.normalize(raw))
    watched.report()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("latent_std", "raw_std", "off"),
    [(2.55, 5.49, "115%"), (5.49, 2.55, "54%"), (1.0, 1.3, "30%"), (2.55, 2.55, ""), (1.0, 1.15, ""), (1.0, 0.85, "")],
)
def test_a_spread_that_is_over_20_percent_off_is_said_once(latent_std, raw_std, off, capsys):
    autoencoder = Latents()
    autoencoder.set_latent_statistics(0.1, latent_std)
    said = told(capsys, autoencoder, raw_std)
    if not off:
        assert said == ""
        return
    assert said.startswith(f"autoencoder.latent_std: off by {off}: the latents of the first 64 images have a spread of")
    assert said.count("\n") == 1 and f"autoencoder.latent_std={raw_std:.3g} sets it" in said and "ldm_lab scale" in said


def test_few_images_are_looked_at_in_the_end(capsys):
    autoencoder = Latents()
    assert "the first 4 images have a spread of 2" in told(capsys, autoencoder, 2.0, batches=1, size=4)
    assert told(capsys, autoencoder, 2.0, batches=0) == ""


def test_a_std_for_each_channel_and_weights_to_begin_with_have_their_own_remedies(capsys):
    autoencoder = Latents()
    assert "keep it if they were trained with it" in told(capsys, autoencoder, 2.0, goes_on=True)
    autoencoder.set_latent_statistics(None, [1.0, 1.0, 1.0])
    said = told(capsys, autoencoder, 2.0)
    assert "off by 100%" in said and "latent_std=" not in said


def test_pixels_and_no_spread_at_all_are_passed_over(capsys):
    assert told(capsys, IdentityAutoencoder(), 0.3) == ""
    watched = LatentSpread(Latents(), False)
    watched.watch(torch.zeros(spread.ENOUGH, 3, 2, 2))
    assert capsys.readouterr().out == ""


def test_a_run_and_its_check_say_it(tmp_path, monkeypatch, capsys):
    """A run on images, and `--check` on its one batch; with the right number both are silent."""
    from tiny import make_run

    from ldm_lab.__main__ import main

    monkeypatch.chdir(tmp_path)
    config = make_run(tmp_path, autoencoder={"latent_std": 50.0}, trainer={"max_steps": 2})
    main(["train", "--config", str(config)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("autoencoder.latent_std: off by")]
    assert len(said) == 1 and "of the first 8 images" in said[0]
    right = said[0].partition("so it would be ")[2].partition(";")[0]
    main(["train", "--config", str(config), "run=tried", "--check"])
    assert "of the first 4 images" in capsys.readouterr().out
    main(["train", "--config", str(config), "run=right", f"autoencoder.latent_std={right}"])
    assert "off by" not in capsys.readouterr().out
