"""Networks whose weights come from a file are not drawn first; nothing else changes by that."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import AUTOENCODER, CLOOB, DENOISER, embedding, make_run
from tiny_glide import UNET, conditions
from torch import nn

from ldm_lab.checkpoints import initialization, parts
from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.checkpoints.initialization import no_initial_weights
from ldm_lab.config import build
from ldm_lab.sampling import loading

NETWORKS = {
    "ccld_unet": lambda: build("denoiser", DENOISER, 4, embedding(16)),
    "glide_unet": lambda: build("denoiser", UNET, 3, conditions()),
    "kl_f8": lambda: build("autoencoder", AUTOENCODER),
    "cloob": lambda: build("conditioner", CLOOB),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_weights_are_not_drawn_and_all_else_is_as_ever(make):
    torch.manual_seed(0)
    drawn = make()
    with no_initial_weights():
        net = make()
        for layer in (nn.Linear(5, 4), nn.Conv2d(2, 2, 3), nn.Embedding(3, 3)):
            for fill in (nn.init.xavier_normal_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.trunc_normal_):
                before = torch.get_rng_state()
                fill(layer.weight)
                assert torch.equal(torch.get_rng_state(), before), fill
    kept = {name for name, value in drawn.state_dict().items() if value.numel() > 1 and value.std() == 0}
    assert all(torch.equal(net.state_dict()[name], drawn.state_dict()[name]) for name in kept), "constants"
    own = dict(drawn.named_buffers())
    assert all(torch.equal(value, own[name]) for name, value in net.named_buffers())
    net.load_state_dict(drawn.state_dict())
    assert all(torch.equal(value, drawn.state_dict()[name]) for name, value in net.state_dict().items())


def test_what_is_built_later_is_drawn_as_ever():
    torch.manual_seed(3)
    expected = nn.Linear(4, 4).weight
    with no_initial_weights(follow=False):
        torch.manual_seed(3)
        assert torch.equal(nn.Linear(4, 4).weight, expected)
    torch.manual_seed(3)
    assert torch.equal(nn.Linear(4, 4).weight, expected)


def context(number: int, asked: list[bool]):
    """Return the context in whose place it is: of the first run one that changes nothing."""

    def entered(follow: bool = True):
        asked.append(follow)
        return (nullcontext(), no_initial_weights(follow))[number]

    return entered


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a run of two steps."""
    from ldm_lab.config import load
    from ldm_lab.training.runner import run

    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yaml = make_run(folder, images=16, run="base", checkpoint={"every": 2}, trainer={"max_steps": 2})
        assert run(load(yaml, [])) == 0
        assert run(load(yaml, ["run=lora", "init_from=runs/base", "lora.rank=2"])) == 0
    return folder


WAYS = {
    "resumed": ["resume.checkpoint=runs/base/last.ckpt", "trainer.max_steps=3"],
    "init_from": ["init_from=runs/base"],
    "init_from, and a new layer": ["init_from=runs/base", "conditioner={name: none, embed_dim: 24}"],
    "without an average": ["init_from=runs/base", "ema=null"],
    "an average that is new": ["resume.checkpoint=runs/base/last.ckpt", "trainer.max_steps=3", "ema.decay=[0.1, 0.2]"],
    "LoRA": ["init_from=runs/base", "lora.rank=2"],
    "LoRA, resumed": ["init_from=runs/base", "lora.rank=2", "resume.checkpoint=runs/lora/last.ckpt",
                      "trainer.max_steps=3"],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same_bit_for_bit(base, program, monkeypatch, way):
    monkeypatch.chdir(base)
    options, followed, states = WAYS[way], [], []
    name = f"way{len(list((base / 'runs').iterdir()))}"
    for number in range(2):
        monkeypatch.setattr(initialization, "no_initial_weights", context(number, followed))
        code, out, err = program("train", "--config", "tiny.yaml", *options, f"run={name}_{number}")
        assert code == 0 and ("stays as initialized" in out) == ("new layer" in way), err
        states.append(read_pickled(base / f"runs/{name}_{number}/last.ckpt")["state_dict"])
    assert followed == [way != "LoRA"] * 2
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_pictures_are_the_same(base, program, monkeypatch):
    monkeypatch.chdir(base)
    pictures, entered = [], []
    for number in range(2):
        for place in (loading, parts):
            monkeypatch.setattr(place, "no_initial_weights", context(number, entered))
        words = ["a red circle", "--checkpoint", "runs/base", "-n", "1", "--steps", "2", "--out", f"out{number}"]
        code, _, err = program("sample", *words)
        assert code == 0, err
        pictures.append(Image.open(f"out{number}/00000.png").tobytes())
    assert pictures[0] == pictures[1] and entered == [True] * 6
