"""Weightings of noise levels, and flow matching: the same error in other units, times as they should be drawn."""

import pytest
import torch

from ldm_lab.config import build
from ldm_lab.interfaces import Denoiser, Prediction
from ldm_lab.objectives.weighting import loss_weight, per_x0
from ldm_lab.schedules import Cosine, Discrete, Linear

B, C = 64, 3


class Fixed(Denoiser):
    """A network that puts out a tensor, whatever it is asked; it remembers what it was."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, time, **conditions):
        self.x, self.time = x, time
        return self.output


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(B, C, 4, 4, generator=generator) for _ in range(3))
    return x0, noise, output, torch.linspace(0.03, 0.97, B)


OBJECTIVES = {
    "v": ({"name": "v_cosine"}, Cosine()),
    "velocity": ({"name": "flow_matching"}, Linear()),
    "eps": ({"name": "eps_hybrid", "bound": False, "timesteps": 100}, Discrete(timesteps=100)),
}


@pytest.mark.parametrize("target", OBJECTIVES)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "soft_min_snr"])
def test_a_weighting_means_the_same_for_every_target(batch, target, weighting):
    """The loss is the squared error of x0, weighted by what the papers say for x0."""
    x0, noise, output, t = batch
    section, schedule = OBJECTIVES[target]
    gamma = 2.0
    objective, net = build("objective", {**section, "weighting": weighting, "gamma": gamma}), Fixed(output)
    loss = objective.loss_terms(net, x0, {}, t, noise)["loss"]
    t = net.time if target != "eps" else (net.time * 100).round() / 100
    prediction = objective.predict(net, net.x, t, {})
    error = (prediction.x0 - x0).square().flatten(1).mean(1)
    snr = schedule.log_snr(t).exp()
    unweighted = {"eps": snr, "v": snr + 1, "velocity": 1 / t**2}[target]
    weight = {
        "uniform": unweighted,
        "min_snr": torch.minimum(snr, torch.tensor(gamma)),
        "soft_min_snr": snr * gamma / (snr + gamma),
    }[weighting]
    assert torch.allclose(loss, weight * error, rtol=2e-3)
    assert (snr < gamma).any() and (snr > gamma).any()


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity"])
def test_weights_are_finite_at_the_ends(target):
    ends = torch.tensor([float("-inf"), -30.0, 0.0, 30.0, float("inf")])
    for weighting in ("uniform", "min_snr", "soft_min_snr"):
        weight = loss_weight(weighting, 5.0, ends, target)
        assert torch.isfinite(weight).all() and (weight >= 0).all()
    assert torch.equal(per_x0(torch.zeros(1), "v"), torch.tensor([2.0]))


def test_the_velocity_is_read_as_clean_sample_and_noise(batch):
    x0, noise, _, t = batch
    objective, net = build("objective", {"name": "flow_matching"}), Fixed(noise - x0)
    terms = objective.loss_terms(net, x0, {}, t, noise)
    assert terms.keys() == {"loss"} and terms["loss"].max() == 0
    read: Prediction = objective.predict(net, net.x, t, {})
    assert torch.allclose(read.x0, x0, atol=1e-5) and torch.allclose(read.eps, noise, atol=1e-5)


def test_times_of_flow_matching_are_logit_normal():
    u = (torch.arange(10_000) + 0.5) / 10_000
    even = build("objective", {"name": "flow_matching", "logit_std": None})
    assert torch.equal(even.times(u), u)
    t = build("objective", {"name": "flow_matching", "logit_mean": 0.5, "logit_std": 2.0}).times(u).double()
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-2) and logit.std().item() == pytest.approx(2, abs=1e-2)
    first = build("objective", {"name": "flow_matching"}).times(torch.zeros(1))
    assert first.item() == 0 and t.dtype == torch.float64 and (t.diff() > 0).all()


def test_training_and_sampling_with_flow_matching(tmp_path, monkeypatch, program):
    from tiny import make_run

    monkeypatch.chdir(tmp_path)
    config = make_run(tmp_path, images=16, objective={"name": "flow_matching", "weighting": "min_snr"})
    code, _, err = program("train", "--config", config, "trainer.max_steps=2", "checkpoint.every=2")
    assert code == 0, err
    for sampler in ("unipc", "heun", "ddim"):
        code, _, err = program(
            "sample", "--checkpoint", "runs/tiny", "a red circle", "--steps", "3", "--sampler", sampler,
            "--out", tmp_path / sampler,
        )  # fmt: skip
        assert code == 0, err
        assert len(list((tmp_path / sampler).glob("*.png"))) >= 1
