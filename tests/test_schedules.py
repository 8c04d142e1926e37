"""Noise schedules: tables of betas between their timesteps, respacing, grids, the steps of ancestral sampling."""

import math

import pytest
import torch

from ldm_lab.errors import UserError
from ldm_lab.schedules import Cosine, Discrete, Posterior, RespacedSchedule, num_steps
from ldm_lab.schedules.discrete import beta_table
from ldm_lab.schedules.respacing import kept_timesteps

BETAS = ("squaredcos_cap_v2", "linear", "linear_latent")


@pytest.fixture(params=[(betas, timesteps) for betas in BETAS for timesteps in (100, 1000)], ids=str)
def schedule(request):
    return Discrete(*request.param)


def times(n=2000):
    return torch.linspace(0, 1, n, dtype=torch.float64)


def test_timesteps_have_the_table_s_own_values(schedule):
    for betas in BETAS:
        schedule = Discrete(betas, schedule.timesteps)
        index = torch.arange(schedule.timesteps)
        alpha2 = torch.cumprod(1 - beta_table(betas, schedule.timesteps), 0)
        for t in (schedule.at(index), schedule.at(index).double(), (index + 1).double() / schedule.timesteps):
            alpha, sigma = schedule.alpha_sigma(t)
            assert alpha.dtype == t.dtype and torch.equal(alpha, alpha2.sqrt().to(t.dtype))
            assert torch.equal(sigma, (1 - alpha2).sqrt().to(t.dtype))
    assert [v.item() for v in schedule.alpha_sigma(torch.zeros(1))] == [1.0, 0.0]


def test_between_timesteps_noise_rises_and_variance_is_kept(schedule):
    alpha, sigma = schedule.alpha_sigma(times())
    assert (sigma.diff() > 0).all() and (alpha.diff() < 0).all()
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    t = times()[1:].view(-1, 1)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.shape == t.shape
    assert torch.allclose(schedule.t_of_sigma_over_alpha(sigma / alpha), t, atol=2e-3 / schedule.timesteps)
    assert schedule.t_of_sigma_over_alpha(torch.tensor([0.0, 1e9])).tolist() == [0.0, 1.0]


def test_any_drawn_time_is_a_timestep_and_all_are_drawn_alike(schedule):
    index = torch.arange(schedule.timesteps)
    assert torch.equal(schedule.index(schedule.at(index)), index)
    drawn = torch.bincount(schedule.index((torch.arange(100_000) + 0.5) / 100_000), minlength=schedule.timesteps)
    share = 100_000 / schedule.timesteps
    assert ((drawn - share).abs() <= 1 + share / 50).all()
    assert schedule.index(torch.tensor([0.0, 1e-9, 0.999_999_9, 1.0])).tolist() == [0, 0] + [schedule.timesteps - 1] * 2


@pytest.mark.parametrize("spacing", [None, "respaced", "log_snr", "karras", "uniform"])
def test_grids_fall_and_stay_where_networks_were_trained(schedule, spacing):
    for steps in (1, 2, 7, 50):
        grid = schedule.grid(steps, spacing)
        assert grid.shape == (steps,) and grid.dtype == torch.float32
        assert (grid.diff() < 0).all()
        assert grid[0] <= 1 and grid[-1] >= 1 / schedule.timesteps - 1e-7
        alpha, sigma = schedule.alpha_sigma(grid[0].double())
        assert sigma / alpha < 148.5 or spacing in (None, "respaced")
        if spacing in (None, "respaced"):  # whole timesteps
            assert torch.equal(grid, schedule.at(schedule.index(grid)))
    assert schedule.grid(9, "uniform").diff().std() < 1e-6
    alpha, sigma = schedule.alpha_sigma(schedule.grid(9, "log_snr").double())
    steps = (alpha / sigma).log().diff()
    assert steps.std() / steps.mean() < 0.02


def test_respacing():
    assert kept_timesteps(1000, 27)[:3] + kept_timesteps(1000, "27")[-1:] == [0, 38, 77, 999]
    assert kept_timesteps(1000, "10,10,3,2,2")[-3:] == [799, 800, 999]
    assert kept_timesteps(1000, "fast27")[-3:] == [799, 800, 997]
    assert kept_timesteps(100, "fast27")[-3:] == [79, 80, 97]
    assert kept_timesteps(1000, "ddim27") == list(range(0, 1000, 38))
    assert kept_timesteps(10, "3,0,2") == [0, 2, 3, 7, 9]  # sections of 4, 3 and 3
    assert kept_timesteps(1000, 1000) == list(range(1000))
    assert kept_timesteps(1000, 1) == [999]  # from where there is something to sample
    assert [num_steps(steps) for steps in (5, "27", "fast27", "ddim50", "8,0,2")] == [5, 27, 27, 50, 10]
    for timesteps in (10, 97, 1000):
        for steps in (2, 5, 10):
            kept = kept_timesteps(timesteps, steps)
            assert len(set(kept)) == steps and kept == sorted(kept) and kept[0] == 0 and kept[-1] == timesteps - 1


@pytest.mark.parametrize(
    ("timesteps", "steps", "message"),
    [
        (20, 27, "steps 27: the model has 20 timesteps, of which 27 cannot be taken"),
        (100, "10,40,10", "steps 10,40,10: section 2 of 3 has 33 timesteps"),
        (40, "fast27", "section 1 of 5 has 8 timesteps, of which 10 cannot be taken"),
        (1000, "ddim300", "no whole stride through 1000 timesteps makes 300; the nearest are ddim250 and ddim334"),
        (1000, "fast", "a number, or a respacing such as fast27, ddim50 or 10,10,3,2,2 is needed, not 'fast'"),
        (1000, "", "is needed, not ''"),
        (1000, "10,,3", "is needed, not '10,,3'"),
        (1000, "0,0", "steps: at least 1 is needed, not 0,0"),
        (1000, -3, "steps: at least 1 is needed, not -3"),
    ],
)
def test_respacings_that_cannot_be(timesteps, steps, message):
    with pytest.raises(UserError) as error:
        kept_timesteps(timesteps, steps)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_grids_of_the_other_kind_of_schedule_are_refused():
    with pytest.raises(UserError, match="steps 'fast27': this model's noise schedule is continuous"):
        Cosine().grid("fast27")
    with pytest.raises(UserError, match="spacing respaced: this model's noise schedule is continuous"):
        Cosine().grid(10, "respaced")
    with pytest.raises(UserError, match="spacing spliced: that grid belongs to the cosine schedule"):
        Discrete().grid(10, "spliced")


@pytest.mark.parametrize(
    "schedule",
    [Cosine(), Discrete("linear"), Discrete("squaredcos_cap_v2", 100)],
    ids=["cosine", "linear", "cosine betas"],
)
def test_ancestral_steps_are_those_of_bayes(schedule):
    """q(x_next | x, x0) is proportional to q(x | x_next) q(x_next | x0), all of them normal."""
    grid = schedule.grid(6)
    steps = Posterior.from_times(schedule, grid)
    alpha, sigma = schedule.alpha_sigma(grid.double())
    x0, x = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    for i in range(5):
        kept = alpha[i] / alpha[i + 1]  # q(x | x_next) = N(kept x_next, beta)
        beta = sigma[i] ** 2 - kept**2 * sigma[i + 1] ** 2
        precision = kept**2 / beta + 1 / sigma[i + 1] ** 2
        mean = (kept * x / beta + alpha[i + 1] * x0 / sigma[i + 1] ** 2) / precision
        assert steps.beta[i].item() == pytest.approx(beta.item(), rel=1e-9)
        assert steps.variance[i].item() == pytest.approx(1 / precision.item(), rel=1e-9)
        step = steps.at(i)
        assert step.mean(x0, x).item() == pytest.approx(mean.item(), rel=1e-5)
        for fraction, variance in ((0.0, 1 / precision), (1.0, beta), (0.5, (beta / precision).sqrt())):
            assert step.learned(torch.tensor(fraction)).exp().item() == pytest.approx(variance.item(), rel=1e-5)
    last = steps.at(5)
    assert last.mean(x0, x).item() == pytest.approx(0.7)
    assert last.variance.item() == 0 and last.log_variance.item() == pytest.approx(steps.log_variance[4].item())
    rows = steps.at(torch.tensor([3, 0]))
    assert rows.beta.shape == (2, 1, 1, 1) and rows.beta.flatten().tolist() == steps.beta[[3, 0]].float().tolist()


def test_a_schedule_known_at_a_grid_alone():
    whole = Discrete("squaredcos_cap_v2")
    grid = whole.grid(5)
    known = RespacedSchedule(whole, grid)
    for ours, theirs in zip(known.alpha_sigma(grid), whole.alpha_sigma(grid)):
        assert torch.allclose(ours, theirs, atol=1e-7)
    alpha, _ = whole.alpha_sigma(grid)
    middle, _ = known.alpha_sigma((grid[1] + grid[2]) / 2)
    assert middle.item() == pytest.approx(math.sqrt((alpha[1] ** 2 + alpha[2] ** 2).item() / 2), rel=1e-5)
