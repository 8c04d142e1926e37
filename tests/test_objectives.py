"""Weightings of noise levels, and flow matching: the same error in other units, times as they should be drawn."""

import pytest
import torch
from tiny import shipped

from ldm_lab.condition_sources.if_low_res import IFLowRes
from ldm_lab.condition_sources.noised_low_res import NoisedLowRes
from ldm_lab.conditions import Embedding, TokenIds, TokenStates, blank_conditions
from ldm_lab.config import build
from ldm_lab.config.registry import infos
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser, Prediction
from ldm_lab.objectives.targets import as_prediction, target
from ldm_lab.objectives.weighting import loss_weight, per_x0
from ldm_lab.schedules import Cosine, Discrete, Linear, LogSNR

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
    **{
        f"continuous {p}": ({"name": "continuous", "prediction": p, "curve": c}, LogSNR(c))
        for p, c in (("eps", "cosine"), ("x0", "linear"), ("v", "cosine"))
    },
}


@pytest.mark.parametrize("target", OBJECTIVES)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "soft_min_snr", "snr"])
def test_a_weighting_means_the_same_for_every_target(batch, target, weighting):
    """The loss is the squared error of x0, weighted by what the papers say for x0."""
    x0, noise, output, t = batch
    section, schedule = OBJECTIVES[target]
    gamma = 2.0
    objective, net = build("objective", {**section, "weighting": weighting, "gamma": gamma}), Fixed(output)
    loss = objective.loss_terms(net, x0, {}, t, noise)["loss"]
    t = (net.time * 100).round() / 100 if target == "eps" else t
    prediction = objective.predict(net, net.x, t, {})
    error = (prediction.x0 - x0).square().flatten(1).mean(1)
    snr = schedule.log_snr(t).exp()
    units = {"eps": snr, "v": snr + 1, "velocity": 1 / t**2, "x0": torch.ones_like(snr)}
    unweighted = units[target.removeprefix("continuous ")]
    weight = {
        "uniform": unweighted,
        "min_snr": torch.minimum(snr, torch.tensor(gamma)),
        "soft_min_snr": snr * gamma / (snr + gamma),
        "snr": snr,
    }[weighting]
    assert torch.allclose(loss, weight * error, rtol=2e-3)
    assert (snr < gamma).any() and (snr > gamma).any()


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity"])
def test_weights_are_finite_at_the_ends(target):
    ends = torch.tensor([float("-inf"), -30.0, 0.0, 30.0, float("inf")])
    for weighting in ("uniform", "min_snr", "soft_min_snr"):
        weight = loss_weight(weighting, 5.0, ends, target)
        assert torch.isfinite(weight).all() and (weight >= 0).all()
    for weighting in ("snr", "p2"):
        weight = loss_weight(weighting, None, ends if target != "x0" else ends[:-1], target)
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


@pytest.mark.parametrize("curve", ["cosine", "linear"])
def test_eps_x0_and_v_are_made_of_one_another(curve):
    """Whatever is predicted, x0 and eps come back to 1e-6 in float64, and every other prediction of them."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 500, 1, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.cat([torch.linspace(0, 0.9999, 499, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    alpha, sigma = (level[:, None, None, None] for level in LogSNR(curve).alpha_sigma(t))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    x = alpha * x0 + sigma * eps
    for first in ("eps", "x0", "v"):
        read = as_prediction(first, target(first, x0, eps, alpha, sigma), x, alpha, sigma)
        assert (read.x0 - x0).abs().max() < 1e-6 and (read.eps - eps).abs().max() < 1e-6
        for second in ("eps", "x0", "v"):
            there = as_prediction(second, target(second, read.x0, read.eps, alpha, sigma), x, alpha, sigma)
            assert (there.x0 - x0).abs().max() < 1e-6 and (there.eps - eps).abs().max() < 1e-6


@pytest.mark.parametrize("curve", ["cosine", "linear"])
def test_log_snr_curves_know_their_times(curve):
    schedule, t = LogSNR(curve, 0.999), torch.linspace(0, 0.999, 50, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(schedule.t_of_sigma_over_alpha(sigma / alpha), t, atol=1e-9)
    assert schedule.t_of_sigma_over_alpha(torch.zeros(1)) == 0
    assert torch.allclose(schedule.grid(4), torch.tensor([1, 0.75, 0.5, 0.25]) * 0.999)
    assert schedule.grid(10, "karras")[0].item() == pytest.approx(0.999, abs=1e-4)
    assert (schedule.grid(10, "log_snr", 20.0).diff() < 0).all()
    for steps, spacing in (("fast27", None), (5, "respaced")):
        with pytest.raises(UserError, match=rf"this model's noise schedule is continuous \({curve}\)"):
            schedule.grid(steps, spacing)


@pytest.mark.parametrize("sampler", sorted(infos("sampler")))
def test_every_sampler_ends_at_the_clean_sample(sampler):
    """A schedule with some noise left at t = 0 leaves none in the result, but for ddpm, whose step ends there."""
    schedule, x0 = LogSNR("cosine", 0.999), torch.full((1, 1, 4, 4), 0.5)
    generator = torch.Generator().manual_seed(0)

    def predict(x, t):
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t))
        return Prediction(x0=x0, eps=(x - alpha * x0) / sigma)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    made = build("sampler", {"name": sampler, "steps": 8}).sample(predict, noise(x0), schedule=schedule, noise=noise)
    assert torch.allclose(made, x0, atol=0.02 if sampler == "ddpm" else 1e-4)


def test_the_last_time_is_where_training_and_sampling_begin():
    objective = build("objective", {"name": "continuous", "last_time": 0.9})
    assert torch.equal(objective.times(torch.tensor([0.0, 0.5])), torch.tensor([0.0, 0.45]))
    assert objective.schedule.grid(3)[0].item() == pytest.approx(0.9)
    whole = build("objective", {"name": "continuous", "last_time": 1.0, "prediction": "eps"})
    read = whole.predict(Fixed(torch.zeros(1, 1, 2, 2)), torch.ones(1, 1, 2, 2), torch.ones(1), {})
    assert torch.isfinite(read.x0).all()
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="last_time: a number"):
            build("objective", {"name": "continuous", "last_time": wrong})


STATES = {"token_states": TokenStates(16, 4)}
DENOISERS = {  # options of tiny ones, and what they are told
    "ccld_unet": ({"base_channels": 8, "multipliers": [1, 1], "head_width": 8}, {"embed": Embedding(4)}),
    "glide_unet": (
        {"base_channels": 8, "multipliers": [1], "blocks_per_level": 1, "attention": [1], "head_width": 8}
        | {"norm_groups": 4, "text_width": 8, "text_layers": 1, "text_heads": 1},
        {"token_ids": TokenIds(4, 10)},
    ),
    "if_unet": (
        {"base_channels": 8, "multipliers": [1], "blocks_per_level": [1], "attention": [1], "head_width": 8}
        | {"norm_groups": 4, "text_width": 8, "pool_heads": 2},
        {**STATES, **IFLowRes().spec},
    ),
    "imagen_unet": (
        {"base_channels": 8, "multipliers": [1], "blocks_per_level": [1], "heads": 1, "head_width": 4}
        | {"attention_levels": [0], "text_levels": [0], "text_latents": 2},
        {**STATES, **NoisedLowRes().spec},
    ),
}


@pytest.mark.parametrize("objective", sorted(shipped("objective")))
@pytest.mark.parametrize("denoiser", sorted(shipped("denoiser")))
def test_the_ends_of_time_are_finite(objective, denoiser):
    """At t = 0 there is no noise, at t = 1 no data: log SNR, loss, gradients and predictions are numbers."""
    torch.manual_seed(0)
    options, spec = DENOISERS[denoiser]
    net = build("denoiser", {"name": denoiser, **options}, C, spec)
    ends, x0, noise = torch.tensor([0.0, 1.0]), torch.rand(2, C, 4, 4), torch.randn(2, C, 4, 4)
    conditions = blank_conditions(spec, 2, 4, 4)
    if "low_res_level" in conditions:
        conditions["low_res_level"] = torch.tensor([1.0, 0.0])
    extra = {"bound": False} if objective == "eps_hybrid" else {}
    for weighting in ("uniform", "snr"):
        part = build("objective", {"name": objective, "weighting": weighting, **extra})
        try:
            part.check_denoiser(net)
        except UserError:
            assert net.time_input == "timestep" and part.schedule.timesteps is None
            return
        assert torch.isfinite(part.schedule.log_snr(ends)).all()
        loss = part.loss_terms(net, x0, conditions, ends, noise)["loss"]
        gradients = torch.autograd.grad(loss.sum(), [p for p in net.parameters() if p.requires_grad], allow_unused=True)
        assert torch.isfinite(loss).all() and all(g is None or torch.isfinite(g).all() for g in gradients)
    with torch.no_grad():
        said = part.predict(net, noise, ends, conditions)
    assert torch.isfinite(said.x0).all() and torch.isfinite(said.eps).all()
