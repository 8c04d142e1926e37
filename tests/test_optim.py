"""The optimizer in one kernel, the average in one pass, and what is logged when."""

import copy
import csv
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from tiny import AUTOENCODER, CLOOB, DENOISER, make_run
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from ldm_lab import ema
from ldm_lab.config import PartConfig, RunConfig, build
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch
from ldm_lab.training.caching import with_choices
from ldm_lab.training.diffusion import DiffusionTask
from ldm_lab.training.interrupt import Interrupt
from ldm_lab.training.task import Task


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Linear(16, 4))
    net[2].bias.requires_grad_(False)
    return net


def trained(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def test_adamw_is_fused_where_the_device_has_it_and_never_foreach_on_a_cpu():
    net, optim = network(), build("optim", {"lr": 0.01, "decay_on": "matrices"})
    fused, plain = optim.optimizer(net), optim.optimizer(net, fused=False)
    assert [group["fused"] for group in fused.param_groups] == [True, True]
    assert [(group["fused"], group["foreach"]) for group in plain.param_groups] == [(False, False)] * 2
    assert not optim.optimizer(nn.ModuleList([nn.Linear(2, 2, device="meta")])).param_groups[0]["fused"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_step_is_the_plain_one_but_for_rounding(dtype):
    one, other = network().to(dtype), network().to(dtype)
    for net, fused in ((one, True), (other, False)):
        optimizer = build("optim", {"lr": 0.01}).optimizer(net, fused)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(6, 8, dtype=dtype, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            optimizer.step()
    for mine, its in zip(one.parameters(), other.parameters()):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_run_goes_on_fused_or_not_whatever_it_was_before(before, after):
    """The stored state names an implementation; the new one's holds, and the steps are counted where it wants them."""
    net, optim = network(), build("optim", {"lr": 0.01})
    first = optim.optimizer(net, before)
    trained(net, first)
    state, other = copy.deepcopy(first.state_dict()), copy.deepcopy(net)
    assert state["param_groups"][0]["fused"] is before
    second = optim.optimizer(other, after)
    second.load_state_dict(state)
    assert second.param_groups[0]["fused"] is after
    assert state["param_groups"][0]["fused"] is before, "what was handed over stays as it is"
    trained(net, first)
    trained(other, second)
    for mine, its in zip(net.parameters(), other.parameters()):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("after", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
def test_a_run_goes_on_the_same_with_its_weights_in_another_order_in_memory(before, after):
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()

    def made(order: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=order)
        return model, build("optim", {"lr": 0.1}).optimizer(model)

    straight, optimizer = made(torch.contiguous_format)
    steps(straight, optimizer, range(4))
    first, optimizer = made(before)
    steps(first, optimizer, range(2))
    second, other = made(after)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, other, range(2, 4))
    assert torch.allclose(second.weight, straight.weight, atol=1e-5)


def test_the_average_moves_in_one_pass_and_sees_tensors_that_moved(monkeypatch):
    net = network()
    average = ema.averaged_copy(net)
    pairs = ema.Pairs(average, net)
    calls = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *args: calls.append(len(args[0])) or lerp(*args))
    expected = copy.deepcopy(average)
    for _ in range(3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
            net[0].running_mean.add_(1)
            for mine, its in zip(expected.parameters(), net.parameters()):
                mine.mul_(0.9).add_(its, alpha=0.1)
        pairs.update(0.9)
        average.to(torch.float64).to(torch.float32)  # as a model that waits elsewhere while another one works
    assert calls == [5, 5, 5]
    for mine, its in zip(average.parameters(), expected.parameters()):
        assert torch.allclose(mine, its, rtol=1e-6, atol=1e-7)
    assert torch.equal(average[0].running_mean, net[0].running_mean)
    assert torch.equal(average[2].bias, net[2].bias)


def counted_kernels(monkeypatch) -> list[int]:
    """Have averages moved as on a GPU; return a list that gets the number of tensors of each call."""
    calls, move_at_once = [], ema.move_at_once
    monkeypatch.setattr(ema, "FLAG_KERNEL", "cpu")
    monkeypatch.setattr(
        ema, "move_at_once", lambda moved, *args: calls.append(len(moved)) or move_at_once(moved, *args)
    )
    return calls


@pytest.mark.parametrize("left_out", [0.0, 1.0])
def test_an_average_that_a_flag_of_the_device_holds_back_moves_in_one_pass_too(left_out, monkeypatch):
    """One call for all tensors of a dtype, not one for each; what it moves toward stays as it is."""
    net = network()
    net[0].bias.data = net[0].bias.data.double()
    average = ema.averaged_copy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    before, toward = copy.deepcopy(average), copy.deepcopy(net)
    calls = counted_kernels(monkeypatch)
    ema.Pairs(average, net).update(0.9, torch.tensor(left_out))
    assert sorted(calls) == [1, 4]
    for mine, its, old, new in zip(*(list(m.parameters()) for m in (average, net, before, toward))):
        assert torch.equal(its, new)
        assert torch.equal(mine, old) if left_out else torch.allclose(mine, old.lerp(new, 0.1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("left_out", [None, 0.0, 1.0])
@pytest.mark.parametrize("other", ["channels_last", "half", "expanded", "double"])
def test_an_average_of_tensors_that_lie_otherwise_is_moved_one_by_one(other, left_out, monkeypatch):
    """The kernel that takes a flag walks through both memories alike: of tensors that do not match it knows nothing."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(5, 5))
    average = ema.averaged_copy(net)
    if other == "channels_last":
        net.to(memory_format=torch.channels_last)
    elif other == "expanded":  # with a gap behind each row
        average[0].weight.data = torch.rand(6, 4, 3, 6)[..., ::2]
        net[0].weight.data = torch.rand(6, 4, 3, 6)[..., ::2]
    else:
        net[0].to({"half": torch.float16, "double": torch.float64}[other])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    before, toward = copy.deepcopy(average), copy.deepcopy(net)
    calls = counted_kernels(monkeypatch)
    ema.Pairs(average, net).update(0.9, None if left_out is None else torch.tensor(left_out))
    assert sum(calls) == (0 if left_out is None else 2 if other in ("half", "double") else 3)
    for mine, its, old, new in zip(*(list(m.parameters()) for m in (average, net, before, toward))):
        assert torch.equal(its, new) and its.dtype == new.dtype and mine.dtype == old.dtype
        moved = old if left_out else old.lerp(new.to(old.dtype), 0.1)
        assert torch.allclose(mine, moved, rtol=1e-6, atol=1e-6)


def test_values_are_logged_at_logging_steps_alone(tmp_path, monkeypatch, program):
    """Neither at others, nor, as if they were new, where the run is stopped between two."""
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=32, ema=None, logging={"every": 2})
    calls = []
    log_dict = Task.log_dict
    monkeypatch.setattr(Task, "log_dict", lambda task, *args, **more: calls.append(1) or log_dict(task, *args, **more))
    stop = Interrupt.on_train_batch_end

    def stop_after_three(callback, trainer, task, outputs, batch, index):
        callback.time_is_up = callback.time_is_up or trainer.global_step == 3
        callback.told_to_stop = lambda: trainer.global_step == 3
        stop(callback, trainer, task, outputs, batch, index)

    monkeypatch.setattr(Interrupt, "on_train_batch_end", stop_after_three)
    assert program("train", "--config", yaml)[0] == 75
    rows = list(csv.DictReader((tmp_path / "runs/tiny/metrics.csv").open()))
    assert len(calls) == 1
    assert [row["step"] for row in rows] == ["1"]
    assert float(rows[0]["train/loss"]) > 0 and float(rows[0]["train/lr"]) == pytest.approx(0.001)


def test_frozen_encoders_in_bf16_give_nearly_the_same_in_fp32_and_say_so(tmp_path):
    sections = {"data": {}, "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    batch = Batch(["a", "b"], ["", ""], image=torch.rand(2, 3, 32, 32) * 2 - 1)
    given = {}
    for precision in (None, "bf16"):
        torch.manual_seed(0)
        parts = {"autoencoder": {**AUTOENCODER}, "conditioner": {**CLOOB}}
        if precision:
            for section in parts.values():
                section["precision"] = precision
        task = DiffusionTask(RunConfig.from_dict({**sections, **parts}), read_weights=False)
        x0, conditions = task.encode(batch)
        given[precision] = x0, conditions["embed"]
        assert task.model_config().to_dict()["autoencoder"].get("precision") == precision
    for exact, rough in zip(given[None], given["bf16"]):
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough)
        assert (exact - rough).norm() < 0.02 * exact.norm()
    both = RunConfig.from_dict({**sections, **parts, "cache": {"folder": str(tmp_path)}})
    assert with_choices(both)["cache"]["precision"] == "bf16-mixed", "and a cache is made alike"
    one = both.with_part("conditioner", PartConfig.from_dict("conditioner", CLOOB))
    assert with_choices(one)["cache"]["precision"] == "32-true"
    with pytest.raises(UserError, match=r"autoencoder\.precision: one of 'fp32', 'bf16'"):
        RunConfig.from_dict({**sections, "autoencoder": {**AUTOENCODER, "precision": "fp16"}})


def test_ddp_is_told_what_the_config_says():
    """What the strategy's own name says goes before; other strategies are left alone."""
    options = {"bucket_mb": 100, "static_graph": True, "gradient_compression": "bf16"}
    strategy = DDPStrategy(find_unused_parameters=True, static_graph=False)
    build("ddp", options).apply(SimpleNamespace(strategy=strategy))
    assert strategy._ddp_kwargs == {
        "gradient_as_bucket_view": True, "bucket_cap_mb": 100.0, "static_graph": False, "find_unused_parameters": True,
    }  # fmt: skip
    assert strategy._ddp_comm_hook is bf16_compress_hook
    build("ddp", options).apply(SimpleNamespace(strategy=SingleDeviceStrategy()))


def test_what_torch_s_ddp_cannot_do_is_refused(tmp_path, monkeypatch, program):
    """With a static graph it fails in the first step of which a batch is not sent."""
    monkeypatch.chdir(tmp_path)
    yaml = make_run(tmp_path, images=8, trainer={"accumulate_grad_batches": 2, "ddp": {"static_graph": True}})
    code, _, err = program("train", "--config", yaml)
    assert code == 2 and "trainer.ddp.static_graph: does not go with trainer.accumulate_grad_batches" in err
