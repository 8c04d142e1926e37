"""Schedules that do not preserve variance: every sampler and guidance rescale on Gaussian data, whose score is known.

Data N(MEAN, STD^2) in every element. With the linear schedule alpha^2 + sigma^2 falls to 1/2 on the way; the cosine
schedule stands beside it.
"""

import itertools
import math

import pytest
import torch

from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.classifier_free import guided
from ldm_lab.guidance.inpaint import Inpaint
from ldm_lab.guidance.thresholding import StaticThresholding
from ldm_lab.interfaces import Prediction
from ldm_lab.schedules import Cosine, Linear, Posterior, RespacedSchedule

MEAN, STD = 0.4, 0.5
SCHEDULES = {"linear": Linear(), "cosine": Cosine()}


def levels(schedule, t):
    return (level[:, None, None, None] for level in schedule.alpha_sigma(t.double()))  # [B, 1, 1, 1] each


def gaussian(schedule, posterior=None, times=None):
    """Return the exact posterior means of x0 and eps as `predict`; with a grid the exact variance of its steps, too."""

    def predict(x, t):
        alpha, sigma = levels(schedule, t)
        variance = alpha**2 * STD**2 + sigma**2
        gap = x.double() - alpha * MEAN
        fraction = None
        if posterior is not None:
            i = times.index(t[0].item())
            # What the step from known x0 adds, and what is not known of x0.
            exact = posterior.variance[i] + posterior.x0_weight[i] ** 2 * (STD**2 * sigma**2 / variance)
            low, high = posterior.log_variance[i], posterior.log_beta[i]
            fraction = ((exact.log() - low) / (high - low).clamp(min=1e-12)).expand_as(x)
        return Prediction(MEAN + alpha * STD**2 / variance * gap, sigma / variance * gap, fraction)

    return predict


def flow(schedule, x, start, end):
    """Return where the probability-flow ODE carries x from a time to another: the Gaussian is moved and scaled."""
    (alpha1, sigma1), (alpha2, sigma2) = (levels(schedule, torch.tensor([t])) for t in (start, end))
    scale = ((alpha2**2 * STD**2 + sigma2**2) / (alpha1**2 * STD**2 + sigma1**2)).sqrt()
    return alpha2 * MEAN + scale * (x - alpha1 * MEAN)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("pie", 2), ("plms2", 2), ("iplms", 2), ("plms", 2), ("prk", 2)]
)
def test_samplers_on_the_schedule_s_own_grid_converge_with_their_order(schedule, name, order):
    x, errors = normal(1, 4, 8, 8), []
    for steps in (40, 80, 160):
        sampler = build("sampler", {"name": name, "steps": steps})
        solution = flow(schedule, x, sampler.times(schedule, x.shape[2:])[0].item(), 0.0)
        errors.append(
            ((sampler.sample(gaussian(schedule), x, schedule=schedule) - solution).norm() / solution.norm()).item()
        )
    assert errors[-1] < {1: 2e-2, 2: 3e-4}[order]
    assert orders(errors) == pytest.approx([order] * 2, abs=0.25)


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1), ("heun", {}, 2), ("dpmpp_2m", {}, 2),
        ("unipc", {"order": 1}, 1), ("unipc", {"order": 2}, 2), ("unipc", {"order": 3}, 3),
    ],
)  # fmt: skip
def test_samplers_on_grids_of_noise_levels_converge_with_their_order(schedule, name, options, order, spacing):
    """Between fixed ends: the last step, to no noise at all, is the clean estimate in all of them."""
    x, errors = normal(1, 4, 8, 8), []
    for steps in (40, 80, 160):
        sampler = build("sampler", {"name": name, "steps": steps, "spacing": spacing, **options})
        times = sampler.times(schedule, x.shape[2:])
        last = flow(schedule, x, times[0].item(), times[-1].item())
        solution = gaussian(schedule)(last, times[-1:]).x0
        errors.append(
            ((sampler.sample(gaussian(schedule), x, schedule=schedule) - solution).norm() / solution.norm()).item()
        )
    # UniPC's corrector raises the order by one (Zhao et al. 2023, theorem 3.1).
    assert errors[-1] < {1: 3e-2, 2: 2e-3, 3: 1e-4}[order]
    assert sum(orders(errors)) / 2 > order - 0.1, orders(errors)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_samplers_on_the_uniform_grid_come_to_the_same_end(schedule, name):
    x = normal(1, 4, 8, 8)
    sampler = build("sampler", {"name": name, "steps": 320, "spacing": "uniform"})
    solution = flow(schedule, x, sampler.times(schedule, x.shape[2:])[0].item(), 0.0)
    error = (sampler.sample(gaussian(schedule), x, schedule=schedule) - solution).norm() / solution.norm()
    assert error < (5e-3 if name == "euler" else 3e-4)


@pytest.mark.parametrize("name", ["prk", "plms"])
def test_the_interpolated_schedule_of_glide_s_programs_converges_with_order_2(schedule, name):
    x, errors = normal(1, 4, 8, 8), []
    for steps in (80, 160, 320):
        sampler = build("sampler", {"name": name, "steps": steps, "variant": "glide"})
        grid = schedule.grid(steps)  # its first time and the step to 0 are left out
        solution = flow(schedule, x, grid[1].item(), grid[-1].item())
        errors.append(
            ((sampler.sample(gaussian(schedule), x, schedule=schedule) - solution).norm() / solution.norm()).item()
        )
    assert errors[-1] < 1e-4 and orders(errors) == pytest.approx([2, 2], abs=0.25)


SIDE = 100
STOCHASTIC = [
    {"name": "ddpm", "steps": 1000, "variance": "posterior"},
    {"name": "ddpm", "steps": 1000, "variance": "beta"},
    {"name": "ddpm", "steps": 100, "variance": "learned"},
    {"name": "ddim", "steps": 1000, "eta": 1.0},
    {"name": "ddim", "steps": 1000, "eta": 0.5},
    {"name": "dpmpp_2m_sde", "steps": 200},
    {"name": "dpmpp_2m_sde", "steps": 200, "eta": 0.5, "spacing": "karras"},
    {"name": "dpmpp_2m_sde", "steps": 400, "spacing": "uniform"},
    {"name": "euler", "steps": 1000, "churn": 0.01},  # per step: with 0.5 each Euler step undoes a fifth of the noise
    {"name": "heun", "steps": 150, "churn": 0.5},
    {"name": "heun", "steps": 150, "churn": 1.0, "spacing": "log_snr"},
]


@pytest.mark.parametrize("config", STOCHASTIC, ids=lambda config: " ".join(map(str, config.values())))
def test_stochastic_samplers_end_in_the_data_s_distribution(schedule, config):
    """Mean and variance of 10 000 draws, within 3 standard errors, from the marginal at the first time on."""
    sampler = build("sampler", config)
    times = sampler.times(schedule, (SIDE, SIDE))
    posterior = Posterior.from_times(schedule, times) if config.get("variance") == "learned" else None
    alpha, sigma = levels(schedule, times[:1])
    x = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * normal(1, 1, SIDE, SIDE)
    generator = torch.Generator().manual_seed(1)
    drawn = sampler.sample(
        gaussian(schedule, posterior, times.tolist()), x, schedule=schedule,
        noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )  # fmt: skip
    assert drawn.mean().item() == pytest.approx(MEAN, abs=3 * STD / SIDE)
    assert drawn.var().item() == pytest.approx(STD**2, abs=3 * STD**2 * math.sqrt(2) / SIDE)


def test_the_variance_is_not_preserved():
    alpha, sigma = Linear().alpha_sigma(torch.tensor([0.0, 0.5, 1.0]))
    assert (alpha**2 + sigma**2).tolist() == [1.0, 0.5, 1.0] and not Linear.variance_preserving


def test_times_and_noise_levels_of_the_linear_schedule():
    schedule, t = Linear(), torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(schedule.t_of_sigma_over_alpha(sigma / alpha), t)
    assert torch.allclose(schedule.t_of_log_snr(schedule.log_snr(t)), t)
    assert torch.equal(schedule.time(t, "t"), t) and torch.equal(schedule.time(t, "log_snr"), schedule.log_snr(t))
    with pytest.raises(UserError, match="this denoiser reads timesteps, and the objective's schedule is continuous"):
        schedule.time(t, "timestep")


@pytest.mark.parametrize("spacing", [None, "uniform", "log_snr", "karras"])
def test_grids_of_the_linear_schedule(spacing):
    for steps in (1, 2, 7, 50):
        grid = Linear().grid(steps, spacing)
        assert grid.shape == (steps,) and grid.dtype == torch.float32
        assert grid[0].item() == pytest.approx(0.999, abs=1e-6) and (grid.diff() < 0).all() and grid[-1] > 0
    ratio = Linear().grid(30, "log_snr").double()
    ratio = (ratio / (1 - ratio)).log().diff()
    assert (ratio - ratio.mean()).abs().max() < 1e-2
    for steps, wrong in ((10, "spliced"), (10, "respaced"), ("fast27", None)):
        with pytest.raises(UserError, match="this model's noise schedule is linear"):
            Linear().grid(steps, wrong)


def test_a_respaced_schedule_is_the_schedule_at_the_times_of_its_grid(schedule):
    times = schedule.grid(30)
    respaced = RespacedSchedule(schedule, times)
    for got, wanted in zip(respaced.alpha_sigma(times.double()), schedule.alpha_sigma(times.double()), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=0)
    between = torch.linspace(times[-1].item(), times[0].item(), 200, dtype=torch.float64)
    alpha, sigma = respaced.alpha_sigma(between)
    assert torch.allclose(respaced.t_of_sigma_over_alpha(sigma / alpha), between, atol=1e-9)
    assert (sigma / alpha).diff().min() > 0
    for got, wanted in zip((alpha, sigma), schedule.alpha_sigma(between), strict=True):
        assert (got - wanted).abs().max() < 0.02
    assert torch.equal(respaced.grid(29), times[:-1])
    with pytest.raises(UserError, match="known at the 30 times of a grid alone"):
        respaced.grid(10)


def test_ancestral_steps_are_those_of_bayes():
    """q(x_next | x, x0) is proportional to q(x | x_next) q(x_next | x0), all of them normal."""
    grid = Linear().grid(6)
    steps = Posterior.from_times(Linear(), grid)
    alpha, sigma = Linear().alpha_sigma(grid.double())
    x0, x = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    for i in range(5):
        kept = alpha[i] / alpha[i + 1]  # q(x | x_next) = N(kept x_next, beta)
        beta = sigma[i] ** 2 - kept**2 * sigma[i + 1] ** 2
        precision = kept**2 / beta + 1 / sigma[i + 1] ** 2
        mean = (kept * x / beta + alpha[i + 1] * x0 / sigma[i + 1] ** 2) / precision
        assert steps.beta[i].item() == pytest.approx(beta.item(), rel=1e-9)
        assert steps.variance[i].item() == pytest.approx(1 / precision.item(), rel=1e-9)
        assert steps.at(i).mean(x0, x).item() == pytest.approx(mean.item(), rel=1e-5)
    assert steps.at(5).mean(x0, x).item() == pytest.approx(0.7)


def test_rescaled_guidance_has_the_spread_that_is_asked_for(schedule):
    """Lin et al. 2023, equations 15 and 16, of v = alpha * eps - sigma * x0; x = alpha * x0 + sigma * eps goes on."""
    x, t = normal(3, 4, 8, 8), torch.full((3,), 0.4, dtype=torch.float64)
    conditions, null = {"embed": normal(3, 1, 5, seed=1)}, {"embed": torch.zeros(3, 5, dtype=torch.float64)}
    alpha, sigma = levels(schedule, t)

    def model(x, t, conditions):
        alpha, sigma = levels(schedule, t)
        x0 = x * conditions["embed"].sum(1)[:, None, None, None] + 0.3 * x.flip(-1)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def sample(weight, **options):
        return guided(model, conditions, null, torch.full((3, 1), weight), schedule=schedule, **options)(x, t)

    def v(prediction):
        return alpha * prediction.eps - sigma * prediction.x0

    def spread(value):
        return value.flatten(1).std(1)[:, None, None, None]

    plain, full = sample(1.0), sample(5.0)
    for share in (0.3, 1.0):
        out = sample(5.0, rescale=share)
        wanted = v(full) * (share * spread(v(plain)) / spread(v(full)) + 1 - share)
        assert torch.allclose(v(out), wanted, rtol=1e-9, atol=1e-9)
        assert torch.allclose(alpha * out.x0 + sigma * out.eps, x, rtol=1e-9, atol=1e-9)
    assert torch.allclose(sample(1.0, rescale=1.0).x0, plain.x0, rtol=1e-9, atol=1e-9)


def test_thresholding_and_inpainting_leave_x_what_it_was(schedule):
    """x = alpha * x0 + sigma * eps, whatever is put in place of x0."""
    x, t, known = normal(2, 3, 8, 8), torch.full((2,), 0.6), 0.1 * normal(1, 3, 8, 8, seed=2)
    alpha, sigma = levels(schedule, t)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    predict = StaticThresholding(0.5).wrap(gaussian(schedule), schedule)
    for wrapped in (predict, Inpaint(known, mask).wrap(predict, schedule)):
        out = wrapped(x, t)
        assert out.x0.abs().max() <= 0.5
        assert torch.allclose(alpha * out.x0 + sigma * out.eps, x, atol=1e-6)
    assert torch.equal(out.x0[..., 4:], known.expand(2, -1, -1, -1)[..., 4:])
