"""State dicts in whatever training programs wrap them: the same weights come out."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.importer import detect_format, say_once
from ldm_lab.checkpoints.parts import load_part

TINY = {"ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema.", "ema_model.module.")


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    net = KLAutoencoder(**TINY)
    return {name: value for name, value in net.state_dict().items() if not name.startswith("latent_")}


def named(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def loaded(path) -> dict[str, torch.Tensor]:
    section = {"name": "kl_f8", "weights": str(path), "norm_groups": 4}
    whole = load_part("autoencoder", section).state_dict()
    return {name: value for name, value in whole.items() if not name.startswith("latent_")}


def assert_holds(path, expected) -> None:
    found = loaded(path)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("key", "prefix"),
    list(itertools.product((None, "state_dict", "model_state_dict", "model", "module", "ema"), PREFIXES)),
)
def test_dicts_and_prefixes(tmp_path, key, prefix):
    expected = state()
    inner = named(prefix, expected)
    torch.save(inner if key is None else {key: inner, "step": 7, "optimizer": {"state": {}}}, tmp_path / "a.pt")
    assert_holds(tmp_path / "a.pt", expected)
    if key is None:
        save_file(inner, tmp_path / "a.safetensors")
        assert_holds(tmp_path / "a.safetensors", expected)


def test_names_of_submodules_that_were_compiled(tmp_path):
    expected = state()
    names = {name: name.replace("encoder.", "encoder._orig_mod.") for name in expected}
    save_file({names[name]: value for name, value in expected.items()}, tmp_path / "a.safetensors")
    assert_holds(tmp_path / "a.safetensors", expected)


@pytest.mark.parametrize(
    "content",
    [
        lambda raw, ema: {"model": raw, "ema": ema},
        lambda raw, ema: {"state_dict": named("module.", raw), "state_dict_ema": ema},
        lambda raw, ema: {"model": raw, "ema": {"module": named("module.", ema), "decay": 0.99}},
        lambda raw, ema: {"model": raw, "ema": {"step": torch.tensor(3), **named("ema_model.", ema)}},
        lambda raw, ema: {"model": raw, "model_ema": {"n_averaged": torch.tensor(3), **named("module.", ema)}},
        lambda raw, ema: {**named("model.", raw), **named("ema.", ema)},
    ],
)
def test_an_average_is_taken_and_said_once(tmp_path, capfd, content):
    say_once.cache_clear()
    raw, ema = state(0), state(1)
    torch.save(content(raw, ema), tmp_path / "a.pt")
    assert_holds(tmp_path / "a.pt", ema)
    assert_holds(tmp_path / "a.pt", ema)
    said = [line for line in capfd.readouterr().err.splitlines() if "averaged weights (EMA" in line]
    assert len(said) == 1 and str(tmp_path / "a.pt") in said[0]


def test_tensors_that_are_not_averaged_are_those_as_trained(tmp_path):
    raw, ema = state(0), state(1)
    first = next(iter(raw))
    torch.save({"model": raw, "ema": {n: v for n, v in ema.items() if n != first}}, tmp_path / "a.pt")
    assert_holds(tmp_path / "a.pt", {**ema, first: raw[first]})
    assert "1 tensors that are not averaged" in detect_format(tmp_path / "a.pt").file.notes[0]


def test_an_average_of_something_else_is_left_aside_and_said(tmp_path):
    raw = state()
    for other in ({"other.weight": torch.zeros(2)}, [torch.zeros(2)]):
        torch.save({"model": raw, "ema": other}, tmp_path / "a.pt")
        assert_holds(tmp_path / "a.pt", raw)
        assert "left aside" in detect_format(tmp_path / "a.pt").file.notes[0]
