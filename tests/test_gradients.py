"""Gradients: one norm for clipping, guard and log; steps that are left out where a flag on the device says so."""

import copy

import pytest
import torch
from fake_cuda import fake_cuda, to_gpu
from torch import nn

from ldm_lab import ema
from ldm_lab.training.divergence import Detector, Spikes
from ldm_lab.training.gradients import Gate, RunningStatistics, clip_gradients, gradient_norm

NAN, INF = float("nan"), float("inf")


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5), nn.Linear(5, 3)).to(dtype)


def fill(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs_own_bit_for_bit(scale, dtype):
    ours, theirs = network(dtype), network(dtype)
    for module in (ours, theirs):
        fill(module, 1, scale)
        module[0].bias.grad = None
    norm = gradient_norm(ours.parameters())
    clip_gradients(list(ours.parameters()), 1.0, norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


def optimizers():
    def adamw(**options):
        return lambda module: torch.optim.AdamW(module.parameters(), 1e-2, **options)

    return {"fused": adamw(fused=True), "loop": adamw(foreach=False), "foreach": adamw(foreach=True)}


def learned(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return copies of all that a step changes."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*module.parameters(), *states]]


@pytest.mark.parametrize("kind", optimizers())
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_left_out_changes_nothing_and_others_change_no_bit(kind, scaled):
    """With a scaler of fp16 and without: steps 0, 1 and 3 are those of an ungated optimizer, step 2 is not made."""
    module, plain = network(), network()
    optimizer, other = optimizers()[kind](module), optimizers()[kind](plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6) if scaled else None
    gate = Gate(optimizer, scaler)
    for step in range(4):
        fill(module, step, 4.0 if scaled else 1.0)
        if scaled:
            scaler.scale(torch.ones(()))
            if kind != "fused":
                scaler.unscale_(optimizer)  # Lightning does
            gate.unscale()
        bad = step == 2
        if bad:
            module[0].weight.grad[0, 0] = 7.0  # finite: the flag alone decides
        before = learned(module, optimizer)
        gate.leave_out(torch.tensor(float(bad)))
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        after = learned(module, optimizer)
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        else:
            fill(plain, step)
            other.step()
            assert all(torch.equal(a, b) for a, b in zip(after, learned(plain, other), strict=True)), step
    assert scaler is None or scaler.get_scale() == 4.0, "a step that the guard leaves out is not the scale's fault"


def test_a_scalers_own_skip_stays_one():
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gate = Gate(optimizer, scaler)
    scaler.scale(torch.ones(()))
    fill(module, 0)
    module[0].bias.grad[0] = INF
    before = learned(module, optimizer)
    gate.unscale()
    gate.leave_out(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, learned(module, optimizer)))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
def test_an_average_moves_by_the_same_bits_or_not_at_all(decay):
    model, average = network(), network()
    fill(model, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(p.grad)
    before, plain = copy.deepcopy(average), copy.deepcopy(average)
    ema.update(average, model, decay, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), before.parameters()))
    ema.update(average, model, decay, torch.zeros(()))
    ema.update(plain, model, decay)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), plain.parameters()))


def test_statistics_of_batch_norms_are_put_back():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    statistics = RunningStatistics([module])
    assert len(statistics.buffers) == 3
    for flag in (0.0, 1.0):
        statistics.keep()
        before = [b.clone() for b in module.buffers()]
        module(torch.full((2, 3, 4, 4), NAN if flag else 1.5))
        statistics.put_back(torch.tensor(flag))
        assert all(torch.equal(a, b) == bool(flag) for a, b in zip(before, module.buffers()))
        assert all(torch.isfinite(b).all() for b in module.buffers())


@pytest.mark.parametrize(
    ("losses", "norm", "scaled", "event", "left_out"),
    [
        ([0.5, 0.25], 1.0, False, 0, 0),
        ([NAN, 0.25], 1.0, False, 1, 1),
        ([0.25, -INF], 1.0, False, 1, 1),
        ([0.5], NAN, False, 1, 1),
        ([0.5], INF, False, 1, 1),
        ([0.5], INF, True, 0, 1),  # the scale was too large
        ([INF], INF, True, 1, 1),
        ([1e38, 1e38, 1e38, 1e38], 1.0, False, 1, 1),  # no sum
    ],
)
def test_what_is_an_event(losses, norm, scaled, event, left_out):
    detector = Detector()
    for loss in losses:
        detector.add(torch.tensor(loss))
    assert float(detector.judge(torch.tensor(norm), scaled)) == left_out
    assert float(detector.last.event) == event and float(detector.last.left_out) == left_out
    assert len(detector.last.losses) == len(losses)


def judged(detector: Detector, losses: list[float]) -> list[int]:
    """Return which of some steps are left out."""
    found = []
    for loss in losses:
        detector.add(torch.tensor(loss))
        found.append(int(detector.judge(torch.tensor(1.0), scaled=False)))
    return found


def test_after_an_event_all_is_held_until_the_host_knows():
    assert judged(Detector(), [1, NAN, 1, 1]) == [0, 1, 1, 1]
    assert judged(Detector(holds=False), [1, NAN, 1, 1]) == [0, 1, 0, 0]
    detector = Detector()
    judged(detector, [NAN])
    detector.release()
    assert judged(detector, [1.0]) == [0]


def test_spikes_are_far_above_the_median_of_steps_that_were_learned_from():
    detector = Detector(holds=False, holds_spikes=False)
    detector.spikes = Spikes(factor=5.0, window=8)
    calm = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9]
    assert judged(detector, calm) == [0] * 8, "no judgment before the window is full"
    median, spread = 1.0, 1.4826 * 0.1
    limit = float(detector.spikes.limit(torch.device("cpu")))
    assert limit == pytest.approx(median + 5 * spread, rel=1e-5)
    assert judged(detector, [limit * 1.01, 100.0, NAN, limit * 0.99]) == [1, 1, 1, 0]
    assert float(detector.spikes.losses.max()) < limit, "what is left out does not raise the bar"
    assert judged(detector, [-100.0]) == [0], "a small loss is none"


def test_spikes_among_equal_losses_need_more_than_rounding():
    detector = Detector(holds_spikes=False)
    detector.spikes = Spikes(factor=10.0, window=8)
    assert judged(detector, [1.0] * 8 + [1.0001, 1.1]) == [0] * 9 + [1]


def test_a_statistic_goes_on_where_it_was():
    whole, first = Spikes(5.0, 8), Spikes(5.0, 8)
    losses = [1.0, 1.3, 0.7, 1.1, 0.9, 1.2, 1.0, 0.8, 1.05, 0.95, 1.15]
    for spikes, some in ((whole, losses), (first, losses[:6])):
        for loss in some:
            spikes.add(torch.tensor(loss), torch.zeros(()))
    second = Spikes(5.0, 8)
    second.load_state_dict(first.state_dict())
    for loss in losses[6:]:
        second.add(torch.tensor(loss), torch.zeros(()))
    assert torch.equal(whole.losses, second.losses) and whole.seen == second.seen
    other = Spikes(5.0, 9)
    other.load_state_dict(first.state_dict())
    assert other.seen == 0, "another window is another statistic"


def test_nothing_here_waits_for_the_numbers_of_a_gpu():
    """On a GPU that is not there: whatever the host would have to know of it is refused."""
    with fake_cuda() as gpu:
        model = to_gpu(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        average = to_gpu(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
        detector, statistics = Detector(), RunningStatistics([model])
        detector.spikes = Spikes(5.0, 8)
        parameters = list(model.parameters())
        for step in range(10):
            if step == 1:
                gpu.waits.clear()  # the statistic has moved there
            statistics.keep()
            for p in parameters:
                p.grad = torch.empty_like(p)
            detector.add(torch.empty((), device="cuda"))
            norm = gradient_norm(parameters)
            clip_gradients(parameters, 1.0, norm)
            left_out = detector.judge(norm, scaled=False)
            statistics.put_back(left_out)
            ema.update(average, model, 0.99, left_out)
        assert left_out.device.type == "cuda" and not gpu.waits


@pytest.mark.parametrize(("holds", "holds_spikes"), [(True, False), (False, True)])
def test_an_infinite_loss_is_no_spike(holds, holds_spikes):
    """So each kind is held or not as its own policy wants it."""
    for bad, held in ((INF, holds), (1e3, holds_spikes)):
        detector = Detector(holds, holds_spikes)
        detector.spikes = Spikes(5.0, 8)
        assert judged(detector, [1.0] * 8 + [bad, 1.0]) == [0] * 8 + [1, int(held)]
