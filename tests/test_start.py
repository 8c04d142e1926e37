"""What a run lacks is told before anything is downloaded, encoded or built, and all of it at once."""

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import DENOISER, make_run

from ldm_lab import config, downloads
from ldm_lab.downloads import Download, announcement, raise_refusals, refusals
from ldm_lab.errors import UserError
from ldm_lab.io.http import ConnectionBroken
from ldm_lab.pretrained import resolve
from ldm_lab.sampling.needs import announce_models
from ldm_lab.sampling.options import ModelOptions, SamplingOptions
from ldm_lab.training import runner, start

KL = Download("autoencoder.weights", "kl-f8", Path("/cache/kl-f8.zip"), 3 << 20, ("https://a/kl-f8.zip",), "https://a")
CLIP = Download("conditioner", "ViT-B-32 openai", Path("/cache/hub"), None, ("https://b",))


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """Anything that downloads, encodes or builds fails; the caches are empty."""

    def begun(*args, **options):
        raise AssertionError("it has begun")

    for module, name in ((resolve, "fetch"), (runner, "build_task"), (runner, "training_data")):
        monkeypatch.setattr(module, name, begun)
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def test_all_that_is_wrong_is_told_at_once(nothing_begins, tmp_path, program):
    yaml = make_run(tmp_path, images=4)
    wrong = (
        "data.shards=/no/{0..3}.tar", "demo.prompts=gone.txt", "init_from=ccld/yfcc_cgf", "autoencoder.weights=kl-f8",
        "conditioner.weights=conditioner.safetensor",
    )  # fmt: skip
    code, out, err = program("train", "--config", yaml, *wrong)
    assert code == 2 and out == ""
    assert err.startswith("error: 5 problems, found before anything was begun:\n")
    for line in (
        "data.shards: no such file: /no/0.tar and 3 more",
        "demo: gone.txt: no such prompts file",
        "ccld/yfcc_cgf: no such file (init_from). Did you mean ccld/yfcc_cfg?",
        "conditioner.safetensor: no such file (conditioner.weights). Did you mean conditioner.safetensors",
        "kl-f8 (size unknown): not in the cache, and downloads are switched off: put kl-f8.zip (from https://ommer-lab.com",
    ):
        assert line in err, line
    assert not (tmp_path / "runs").exists()


def test_offline_all_missing_weights_are_told(nothing_begins, tmp_path, program):
    yaml = make_run(tmp_path, images=4)
    words = ("autoencoder.weights=kl-f8", "conditioner.weights=cloob/vit_b_16_laion400m_16e", "init_from=ccld/yfcc_cfg")
    code, _, err = program("train", "--config", yaml, *words)
    assert code == 2 and err.count("not in the cache, and downloads are switched off") == 3, err


@pytest.mark.parametrize("command", ["cache", "scale"])
def test_commands_that_encode_tell_it_before_they_load_anything(nothing_begins, tmp_path, program, command):
    yaml = make_run(tmp_path, images=4)
    out = {"cache": "encoded", "scale": "scaled.safetensors"}[command]
    words = ("data.shards=gone.tar", "autoencoder.weights=kl-f8")
    code, _, err = program("ldm_lab.__main__", command, "--config", yaml, "--out", out, *words)
    assert code == 2 and "2 problems" in err and "data.shards: no such file: gone.tar" in err and "kl-f8" in err
    assert not (tmp_path / out).exists()


def test_an_objective_and_a_denoiser_that_do_not_go_together(nothing_begins, tmp_path, program):
    """The network of cloob-latent-diffusion has no channels for a variance; found at the first step before."""
    yaml = make_run(tmp_path, images=4)
    code, _, err = program("train", "--config", yaml, "objective={name: eps_hybrid}", "autoencoder.weights=gone.pt")
    assert code == 2 and "2 problems" in err and "gone.pt: no such file" in err
    assert "objective.bound: this denoiser has no channels for a learned variance; set objective.bound=false" in err
    run = config.load(yaml, ["objective={name: eps_hybrid, bound: false}"])
    assert run["denoiser"]["name"] == DENOISER["name"]
    assert start.check_start(run, tmp_path / "runs").count == 4, "the data are open"


def test_what_comes_is_announced_with_sizes_places_and_the_sum(capsys, monkeypatch):
    assert announcement([]) == ""
    assert announcement([KL]) == "to be downloaded: autoencoder.weights: kl-f8, 3.0 MiB, to /cache/kl-f8.zip"
    again = replace(KL, where="init_from")
    lines = announcement([KL, CLIP, again]).splitlines()
    assert lines[0] == "2 files are to be downloaded, 3.0 MiB and 1 of unknown size:" and len(lines) == 3
    assert lines[2] == "  conditioner: ViT-B-32 openai, size unknown, to /cache/hub"
    monkeypatch.setattr(resolve, "offline", lambda: False)
    resolve.announce([KL])
    assert capsys.readouterr() == ("", announcement([KL]) + "\n")


def test_sizes_that_are_not_known_are_asked_for(monkeypatch):
    """Of released files, once each; a server that does not answer is not waited for again."""
    asked = []

    def size_of(url):
        asked.append(url)
        if "kl-f8" in url:
            raise ConnectionBroken("no answer")
        return 5 << 20

    monkeypatch.setattr(resolve, "size_of", size_of)
    monkeypatch.setenv("LDM_LAB_CACHE", "/nothing/here")
    wanted = [resolve.to_download(name, "weights") for name in ("glide/base", "aesthetic/vit_l_14", "kl-f8", "kl-f4")]
    assert [its.size for its in resolve._sized([*wanted, CLIP])] == [5 << 20, 4071, None, None, None]
    assert len(asked) == 2


def test_what_cannot_come_is_refused(monkeypatch):
    assert refusals([KL, CLIP], offline=False) == []
    assert refusals([replace(KL, mirrors=())], offline=False) == [
        "autoencoder.weights: kl-f8 (3.0 MiB): no address is known to download it from: "
        "put kl-f8.zip (from https://a) at /cache/kl-f8.zip"
    ]
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda place: usage(2 << 20))
    with pytest.raises(UserError, match=r"^/: 3\.0 MiB are to be downloaded, and only 2\.0 MiB are free$"):
        raise_refusals(refusals([KL], offline=False))


def test_sampling_tells_all_that_is_missing(nothing_begins, tmp_path):
    (tmp_path / "ema.safetensors").touch()
    loading = ModelOptions(autoencoder="kl-f8", guide_model="ema.safetensor")
    with pytest.raises(UserError) as error:
        announce_models("glide/bass", ["glide/upsample"], loading, SamplingOptions(clip_guidance=3.0))
    text = str(error.value)
    for line in ("glide/bass: no such file (checkpoint). Did you mean glide/base",
                 "glide/upsample (size unknown): not in",
                 "ema.safetensor: no such file (guide_model). Did you mean ema.safetensors?", "autoencoder: kl-f8",
                 "clip_guidance: glide/clip-image-enc", "clip_guidance: glide/clip-text-enc"):  # fmt: skip
        assert line in text, line


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("KL-F8", "Did you mean kl-f8 "),
        ("vit_l_14", "Did you mean "),
        ("emma.safetensors", "Did you mean ema.safetensors?"),
        ("rums/a.pt", "Did you mean runs?"),
        ("qqqqqqq", ", and no released weights have that name (python -m ldm_lab pretrained list)"),
    ],
)
def test_a_mistyped_name_shows_the_nearest_and_not_all(tmp_path, monkeypatch, text, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ema.safetensors").touch()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=re.escape(hint)) as error:
        resolve.resolve_weights(text, "init_from")
    assert len(str(error.value)) < 200
    with pytest.raises(UserError, match=r"^no such released weights: 'kl-f88'; did you mean kl-f8 or kl-f\d+\?$"):
        resolve.cached_path("kl-f88")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.name=folder", "data.path=fotos"), "data.path: fotos: no such folder. Did you mean photos?"),
        (("init_from=photo/a.png",), "photo/a.png: no such file (init_from). Did you mean photos?"),
    ],
)
def test_a_mistyped_path_shows_the_nearest(program, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    code, _, err = program("train", "--config", make_run(tmp_path), *words)
    assert code == 2
    assert message in err
