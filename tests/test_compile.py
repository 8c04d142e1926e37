"""The compiled network: the gradients of the plain one, and the names of its weights."""

import copy

import pytest
import torch
from tiny import DENOISER, embedding, make_run
from tiny_glide import UNET, conditions

from ldm_lab.checkpoints.files import read_pickled
from ldm_lab.config import RunConfig, build
from ldm_lab.errors import UserError
from ldm_lab.training import compiling, diffusion
from ldm_lab.training.compiling import compile_network
from ldm_lab.training.task import Task


def gradients(net, *inputs):
    net.zero_grad()
    out = net(*inputs)
    out.square().mean().backward()
    return {"out": out.detach(), **{n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}}


def ccld(checkpointing=False):
    torch.manual_seed(0)
    net = build(
        "denoiser", {**DENOISER, "blocks_per_level": 1, "gradient_checkpointing": checkpointing}, 4, embedding(8)
    )
    return net, (torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 8))


def glide(checkpointing=False):
    torch.manual_seed(0)
    net = build("denoiser", {**UNET, "dropout": 0.0, "gradient_checkpointing": checkpointing}, 3, conditions())
    with torch.no_grad():
        for parameter in net.parameters():  # those that begin at zero hide the others' gradients
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(0, 600, (2, 6))
    return net, (torch.randn(2, 3, 16, 16), torch.tensor([3.0, 70.0]), ids, ids > 200)


CASES = [
    ("aot_eager", "blocks", ccld, True),
    pytest.param("aot_eager", "model", ccld, True, marks=pytest.mark.slow),
    pytest.param("aot_eager", "blocks", glide, True, marks=pytest.mark.slow),
    pytest.param("aot_eager", "model", glide, False, marks=pytest.mark.slow),
    pytest.param("inductor", "blocks", ccld, False, marks=pytest.mark.slow),
    pytest.param("inductor", "blocks", glide, True, marks=pytest.mark.slow),
    pytest.param("inductor", "model", ccld, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("backend", "what", "make", "checkpointing"), CASES)
def test_gradients_are_those_of_the_plain_network(backend, what, make, checkpointing):
    torch._dynamo.reset()
    net, inputs = make(checkpointing)
    expected, names = gradients(net, *inputs), list(net.state_dict())
    compile_network(net, what, checkpointing, backend)
    got = gradients(net, *inputs)
    assert got.keys() == expected.keys()
    # The gradient of a bias in front of a norm that takes it out again is zero; what there is of it is rounding.
    rounding = 1e-6 * max(value.abs().max() for name, value in expected.items() if name != "out")
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=rounding + 1e-4 * value.abs().max()), name
    assert list(net.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert not any("recompile_limit" in reason for reason in torch._dynamo.utils.counters["unimplemented"])
    assert list(copy.deepcopy(net).state_dict()) == names


def test_a_network_without_blocks_is_taken_as_a_whole_and_each_block_has_room_to_be_compiled():
    net, _ = ccld()
    blocks = len(net.block_modules())
    assert compile_network(net, "blocks") == f"trainer.compile: {blocks} blocks, when they first run"
    assert torch._dynamo.config.recompile_limit >= 4 * blocks
    assert all(block._compiled_call_impl for block in net.block_modules()) and net._compiled_call_impl is None
    net.block_types = ()
    assert "as a whole" in compile_network(net, "blocks")
    assert net._compiled_call_impl is not None


def test_a_run_goes_on_compiled_or_not(tmp_path, monkeypatch, program):
    """Averages, exports and checkpoints are those of the plain network; so are the numbers, but for rounding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        diffusion, "compile_network", lambda net, what, checkpoints: compile_network(net, what, checkpoints, "eager")
    )
    yaml = make_run(tmp_path, images=32, denoiser={"blocks_per_level": 1})
    assert program("train", "--config", yaml, "trainer.max_steps=3", "run=plain")[0] == 0
    code, out, _ = program("train", "--config", yaml, "trainer.max_steps=2", "run=both", "trainer.compile=blocks")
    assert code == 0 and "trainer.compile: " in out
    code, out, _ = program("train", "--config", yaml, "trainer.max_steps=3", "run=both", "resume.checkpoint=last")
    assert code == 0 and "trainer.compile: 'blocks' -> None" in out
    one, other = (read_pickled(tmp_path / f"runs/{run}/last.ckpt")["state_dict"] for run in ("plain", "both"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def test_a_compiler_that_is_not_there_is_one_line(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)

    def no_compiler(*_, **__):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(compiling, "compile_network", no_compiler)
    monkeypatch.setattr(diffusion.DiffusionTask, "training_step", no_compiler)
    yaml = make_run(tmp_path, images=32)
    code, _, err = program("train", "--config", yaml, "trainer.compile=model")
    assert code == 2 and "trainer.compile=model: torch could not compile the network" in err
    assert "No working C++ compiler found" in err and len(err.strip().splitlines()[-1]) < 500


def test_only_denoisers_are_compiled():
    with pytest.raises(UserError, match=r"trainer\.compile: blocks is for a denoiser"):
        Task(RunConfig.from_dict({"data": {}}), read_weights=False).compile_network("blocks")
