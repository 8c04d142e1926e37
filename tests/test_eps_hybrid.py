"""The objective eps_hybrid: what it trains, which timesteps, by which weights."""

import pytest
import torch

from ldm_lab.config import build, check_section
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Denoiser
from ldm_lab.training.timesteps import SobolTimesteps

B, C = 8, 4


def made(**options):
    return build("objective", {"name": "eps_hybrid", **options})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(B, C, 4, 4, generator=generator) * 2 - 1
    return x0, torch.randn(B, C, 4, 4, generator=generator), torch.linspace(0, 1, B)


class Fixed(Denoiser):
    """A network that puts out a parameter, whatever it is asked; it remembers what it was."""

    def __init__(self, output):
        super().__init__()
        self.output = output.clone().requires_grad_()

    def forward(self, x, time, **conditions):
        self.x, self.t = x, time
        return self.output


def test_who_knows_the_noise_has_no_error_and_reads_the_clean_sample(batch):
    x0, noise, t = batch
    for T in (50, 1000):
        objective = made(timesteps=T)
        net = Fixed(torch.cat([noise, torch.zeros_like(noise)], dim=1))
        terms = objective.loss_terms(net, x0, {}, t, noise)
        assert terms["mse"].abs().max() < 1e-12
        assert torch.equal(terms["loss"], terms["mse"] + T / 1000 * terms["bound"])
        assert torch.equal(net.t, ((t * T).ceil().clamp(min=1) / T))  # the timestep above, and at 0 the first
        prediction = objective.predict(net, net.x, net.t, {})
        low = net.t < 0.9
        assert torch.allclose(prediction.x0[low], x0[low], atol=1e-4)
        assert torch.equal(prediction.eps, noise) and (prediction.variance_fraction == 0.5).all()


def test_the_bound_trains_the_variance_and_nothing_else_does(batch):
    x0, noise, t = batch
    output = torch.randn(B, 2 * C, 4, 4, generator=torch.Generator().manual_seed(1))
    grads = {}
    for bound in (True, False):
        net = Fixed(output)
        made(bound=bound).loss_terms(net, x0, {}, t, noise)["loss"].sum().backward()
        grads[bound] = net.output.grad.chunk(2, dim=1)
    assert torch.allclose(grads[True][0], grads[False][0])  # eps: the same with the bound as without it
    assert (grads[False][1] == 0).all()
    assert (grads[True][1].flatten(1).abs().sum(1) > 0).all()


def test_the_bound_is_least_at_the_variance_that_errors_call_for(batch):
    """Where the prediction is off, more variance than the posterior's is called for; where it is right, none."""
    x0, noise, _ = batch
    t = torch.full((B,), 0.02)
    for off, wanted in ((0.0, "low"), (3.0, "high")):
        bounds = []
        for v in (-1.0, 0.0, 1.0):
            net = Fixed(torch.cat([noise + off, torch.full_like(noise, v)], dim=1))
            bounds.append(made().loss_terms(net, x0, {}, t, noise)["bound"].mean().item())
        assert bounds == sorted(bounds, reverse=wanted == "high")
    assert min(bounds) >= 0


def test_training_brings_the_bound_down(batch):
    x0, noise, t = batch
    net = Fixed(torch.zeros(B, 2 * C, 4, 4))
    objective, bounds = made(timesteps=20), []
    for _ in range(60):
        terms = objective.loss_terms(net, x0, {}, t, noise)
        (gradient,) = torch.autograd.grad(terms["loss"].sum(), net.output)
        with torch.no_grad():
            net.output -= 0.05 * gradient.sign()
        bounds.append(terms["bound"].mean().item())
    assert bounds[-1] < 0.5 * bounds[0]


def test_every_timestep_is_drawn_the_last_one_too():
    for T in (10, 100):
        objective, draw = made(timesteps=T), SobolTimesteps(0, 0, 1)
        drawn = torch.cat([objective.schedule.index(draw(64 * i, 64)) for i in range(64)])
        counts = torch.bincount(drawn, minlength=T)
        assert len(counts) == T and counts.min() >= 64 * 64 / T - 2


def test_min_snr_weighs_low_noise_down(batch):
    x0, noise, t = batch
    net = Fixed(torch.zeros(B, C, 4, 4))
    plain, weighted = (
        made(bound=False, weighting=weighting).loss_terms(net, x0, {}, t, noise)["loss"]
        for weighting in ("uniform", "min_snr")
    )
    alpha, sigma = made().schedule.alpha_sigma(net.t)
    snr = (alpha / sigma) ** 2
    assert torch.allclose(weighted, plain * snr.clamp(max=5) / snr, rtol=1e-5)
    assert (snr < 5).any() and (snr > 5).any()


def test_a_network_of_eps_alone(batch):
    x0, noise, t = batch
    net = Fixed(torch.zeros(B, C, 4, 4))
    objective = made(bound=False)
    assert torch.allclose(objective.loss_terms(net, x0, {}, t, noise)["loss"], noise.square().flatten(1).mean(1))
    assert objective.predict(net, x0, t, {}).variance_fraction is None
    with pytest.raises(UserError, match=r"no channels for a learned variance; set objective\.bound=false"):
        made().loss_terms(net, x0, {}, t, noise)
    with pytest.raises(UserError, match="puts out 5 channels; of 4 channels it should make 8, or 4 without"):
        made().predict(Fixed(torch.zeros(B, 5, 4, 4)), x0, t, {})


def test_half_precision_outputs_are_read_in_float32(batch):
    x0, noise, t = batch
    net = Fixed(torch.zeros(B, 2 * C, 4, 4, dtype=torch.bfloat16))
    assert made().loss_terms(net, x0, {}, t, noise)["loss"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in made().predict(net, x0, t, {})[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": 1}, "timesteps: at least 2 is needed, not 1"),
        ({"timesteps": 20, "betas": "linear"}, "timesteps: at least 21 are needed for linear betas"),
        ({"gamma": 0.0}, "gamma: a number above 0 is needed, not 0.0"),
        ({"betas": "cosine"}, "betas: one of 'squaredcos_cap_v2', 'linear', 'linear_latent' is needed, not 'cosine'"),
        ({"steps": 10}, "no such key: 'steps'"),
    ],
)
def test_wrong_sections(options, message):
    (problem,) = check_section("objective", {"name": "eps_hybrid", **options}, "objective")
    assert message in problem
