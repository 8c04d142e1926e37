"""Samplers on a Gaussian mixture, whose x0 and eps are known in closed form."""

import itertools
import math

import pytest
import torch
from tiny import shipped

from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance.base import Wrapper
from ldm_lab.guidance.stack import stack
from ldm_lab.interfaces import Prediction
from ldm_lab.schedules import Cosine, Discrete, Linear, Posterior

SCHEDULE = Cosine()
WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.0, 0.8], [0.45, 0.6]))
CALLS = {  # model calls for n steps
    "ddpm": lambda n: n, "ddim": lambda n: n, "iplms": lambda n: n, "pie": lambda n: 2 * n, "plms2": lambda n: n + 1,
    "plms": lambda n: n + 9, "prk": lambda n: 4 * n, "euler": lambda n: n, "heun": lambda n: 2 * n - 1,
    "dpmpp_2m": lambda n: n, "ddim_extrapolated": lambda n: n, "dpmpp_2m_sde": lambda n: n, "unipc": lambda n: n,
}  # fmt: skip
WITH_SPACING = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
ORDERS = {"ddim": 1, "pie": 2, "plms2": 2, "iplms": 2, "plms": 2, "prk": 2}


def mixture(x, t):
    """The posterior mean of x0 and of eps, each scalar of x on its own; in float64, so that orders can be measured."""
    alpha, sigma = (level[:, None, None, None, None] for level in SCHEDULE.alpha_sigma(t.double()))  # [B, 1, 1, 1, 1]
    var = alpha**2 * STDS**2 + sigma**2  # [B, 1, 1, 1, 2]
    gap = x.double()[..., None] - alpha * MEANS  # [B, C, h, w, 2]
    share = (WEIGHTS.log() - var.log() / 2 - gap**2 / (2 * var)).softmax(-1)  # [B, C, h, w, 2]
    x0 = (share * (MEANS + alpha * STDS**2 * gap / var)).sum(-1)  # [B, C, h, w]
    eps = (share * sigma * gap / var).sum(-1)  # [B, C, h, w]
    return Prediction(x0, eps)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(name, steps, x, predict=mixture, noise=None, callback=None, **options):
    sampler = build("sampler", {"name": name, "steps": steps, **options})
    return sampler.sample(predict, x, schedule=SCHEDULE, noise=noise, callback=callback)


@pytest.fixture(scope="module")
def converged():
    x = normal(1, 4, 8, 8)
    return x, sample("prk", 320, x)


@pytest.mark.parametrize("name", ORDERS)
def test_deterministic_samplers_converge_to_the_same_solution_with_their_order(name, converged):
    x, solution = converged
    coarse, fine = (((sample(name, n, x) - solution).norm() / solution.norm()).item() for n in (20, 80))
    assert fine < {1: 2e-2, 2: 8e-4}[ORDERS[name]]
    assert math.log2(coarse / fine) / 2 == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_euler_and_heun_converge_with_their_order(name, order, converged):
    x, solution = converged
    errors = [(sample(name, n, x, spacing="spliced") - solution).norm().item() for n in (20, 40, 80)]
    assert errors[-1] / solution.norm().item() < {1: 2e-2, 2: 8e-4}[order]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("steps", [5, 20])
def test_euler_at_the_times_of_ddim_is_ddim(steps):
    x = normal(1, 4, 8, 8)
    ddim, euler = sample("ddim", steps, x), sample("euler", steps, x, spacing="spliced")
    assert ((euler - ddim).norm() / ddim.norm()).item() < 1e-6


@pytest.mark.parametrize(("name", "options", "order"), [("dpmpp_2m", {}, 2), ("unipc", {"order": 2}, 2)])
def test_exponential_integrators_converge_with_their_order(name, options, order):
    """In log SNR, between fixed ends: the last step, to infinite SNR, is first-order in all of them."""
    x = normal(1, 4, 8, 8)
    solution = sample(name, 1280, x, spacing="log_snr", **options)
    errors = [(sample(name, n, x, spacing="log_snr", **options) - solution).norm().item() for n in (40, 80, 160)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(slope > order - 0.2 for slope in slopes)
    assert errors[-1] / solution.norm().item() < 5e-4


def test_dpm_solver_without_fresh_noise_is_the_deterministic_one():
    x = normal(1, 2, 4, 4)
    assert torch.equal(sample("dpmpp_2m_sde", 10, x, eta=0.0), sample("dpmpp_2m", 10, x))


def test_the_stochastic_solver_samples_the_mixture():
    """Mean and spread of what the SDE ends in are the mixture's; a wrong noise term would show in them."""
    generator = torch.Generator().manual_seed(3)
    x = normal(1, 1, 200, 200)
    for name, options in (("dpmpp_2m_sde", {"steps": 100}), ("heun", {"steps": 60, "churn": 0.5})):
        drawn = sample(
            name, options.pop("steps"), x, **options,
            noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        )  # fmt: skip
        mean = (WEIGHTS * MEANS).sum()
        variance = (WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2
        assert drawn.mean().item() == pytest.approx(mean.item(), abs=0.03)
        assert drawn.var().item() == pytest.approx(variance.item(), rel=0.02), name


@pytest.mark.parametrize("name", WITH_SPACING)
@pytest.mark.parametrize("spacing", ["spliced", "log_snr", "karras", "uniform"])
def test_every_spacing_falls_from_the_same_start(name, spacing):
    times = SCHEDULE.grid(12, spacing)
    assert times[0].item() == pytest.approx(0.995711, abs=1e-6)
    assert (times.diff() < 0).all() and times[-1] > 0
    assert sample(name, 12, normal(1, 2, 4, 4), noise=torch.randn_like, spacing=spacing).isfinite().all()


def first_level(schedule, size, **config):
    alpha, sigma = schedule.alpha_sigma(build("sampler", config).times(schedule, size)[0].double())
    return (sigma / alpha).item()


@pytest.mark.parametrize("name", WITH_SPACING)
def test_the_first_level_grows_with_the_side_up_to_the_schedule_s_own(name):
    """A mean color hidden in the noise of 8x8 latents stands out of that of 64x64, eight times as clearly."""
    for size, level in (((8, 8), 50), ((4, 2), 50), ((16, 16), 100), ((8, 32), 100), ((64, 64), 148.417)):
        assert first_level(SCHEDULE, size, name=name) == pytest.approx(level, rel=1e-4)
    assert first_level(SCHEDULE, None, name=name) == pytest.approx(148.417, rel=1e-4)
    assert first_level(SCHEDULE, (8, 8), name=name, sigma_max=20) == pytest.approx(20, rel=1e-4)
    assert first_level(SCHEDULE, (64, 64), name=name, sigma_max=20, spacing="uniform") == pytest.approx(20, rel=1e-4)
    assert first_level(SCHEDULE, (8, 8), name=name, spacing="spliced") == pytest.approx(148.417, rel=1e-4)
    assert first_level(Discrete("linear"), (8, 8), name=name) == pytest.approx(50, rel=1e-4)
    assert first_level(Discrete("linear_latent"), (8, 8), name=name) == pytest.approx(14.6146, rel=1e-4)
    assert first_level(Linear(), (16, 16), name=name) == pytest.approx(100, rel=1e-4)
    assert first_level(Discrete("linear"), (8, 8), name=name, steps="fast27") > 100  # a respacing says it by itself


@pytest.mark.parametrize("name", sorted(shipped("sampler") - set(WITH_SPACING)))
def test_recorded_samplers_begin_where_the_originals_do(name):
    assert first_level(SCHEDULE, (8, 8), name=name) == pytest.approx(148.417, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_max": 0.5}, "sigma_max: a number from 1 to 1_000 is needed, not 0.5"),
        ({"sigma_max": 30, "spacing": "spliced"}, "sigma_max: spacing spliced says by itself where it begins"),
        ({"sigma_max": 30, "steps": "fast27"}, "sigma_max: steps fast27 says by itself where it begins"),
        ({"sigma_max": 200}, "sigma_max: 200 is more noise than this model begins with; up to 148.4"),
    ],
)
def test_first_levels_that_cannot_be(options, message):
    with pytest.raises(UserError) as error:
        build("sampler", {"name": "unipc", **options}).times(SCHEDULE, (8, 8))
    assert message in str(error.value)


@pytest.mark.parametrize(("side", "steps"), [(8, 8), (16, 20), (32, 20)])
def test_light_and_dark_pictures_keep_their_contrast(side, steps):
    """Pictures of one gray each, N(0, 1/4), exact denoiser: their spread is what it is from the schedule's start on."""

    def predict(x, t):
        alpha, sigma = (level[:, None, None, None] for level in SCHEDULE.alpha_sigma(t.double()))  # [B, 1, 1, 1]
        mean = x.mean((2, 3), keepdim=True)  # [B, 1, 1, 1]
        x0 = (alpha * 0.25 / (alpha**2 * 0.25 + sigma**2 / side**2) * mean).expand_as(x)
        return Prediction(x0, (x - alpha * x0) / sigma)

    x = normal(500, 1, side, side)
    shares = [
        sample("unipc", steps, x, predict, sigma_max=level).mean((1, 2, 3)).std() / 0.5 for level in (None, 148.4)
    ]
    assert shares[0] == pytest.approx(shares[1].item(), rel=0.02), shares


@pytest.mark.parametrize("name", CALLS)
def test_model_calls_and_times(name):
    times = []

    def predict(x, t):
        assert t.shape == (len(x),) and t.dtype == torch.float32
        assert (t == t[0]).all()
        times.append(t[0].item())
        return mixture(x, t)

    reported = []
    sample(name, 10, normal(2, 1, 2, 2), predict, noise=torch.randn_like, callback=lambda i, x, x0: reported.append(i))
    assert len(times) == CALLS[name](10)
    first = math.atan(50) * 2 / math.pi if name in WITH_SPACING else 0.995711
    assert times[0] == pytest.approx(first, abs=1e-6)
    assert times == sorted(times, reverse=True)
    assert reported == list(range(10))


def test_every_sampler_is_covered_here():
    assert shipped("sampler") == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_finite(name, steps):
    assert sample(name, steps, normal(1, 2, 4, 4), noise=torch.randn_like).isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_a_row_does_not_depend_on_the_others(name):
    x, fresh = normal(3, 2, 4, 4), normal(10, 3, 2, 4, 4, seed=1)

    def run(rows):
        draws = iter(fresh[:, rows])
        return sample(name, 10, x[rows], noise=lambda _: next(draws))

    assert torch.equal(run([0, 1, 2])[[2, 0]], run([2, 0]))


@pytest.mark.parametrize("name", CALLS)
def test_the_arithmetic_is_single_precision(name):
    def predict(x, t):
        assert x.dtype == torch.float32
        return Prediction(*(value.float() for value in mixture(x, t)[:2]))

    assert sample(name, 5, normal(1, 1, 2, 2).float(), predict, noise=torch.randn_like).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("ddpm", {}, 7), ("ddim", {"eta": 0.5}, 7), ("ddim", {}, 0), ("plms", {}, 0), ("prk", {}, 0)],
)
def test_noise_is_drawn_between_the_steps_of_stochastic_samplers_only(name, options, expected):
    draws = []

    def noise(x):
        draws.append(x.shape)
        return torch.ones_like(x)

    sample(name, 8, normal(1, 2, 4, 4), noise=noise, **options)
    assert draws == [(1, 2, 4, 4)] * expected


def test_ddpm_is_ddim_with_eta_1():
    x, fresh = normal(1, 2, 4, 4), normal(6, 1, 2, 4, 4, seed=1)
    runs = []
    for name, options, sign in (("ddpm", {}, 1), ("ddim", {"eta": 1.0}, 1), ("ddpm", {}, -1)):
        draws = iter(sign * fresh)
        runs.append(sample(name, 6, x, noise=lambda _, draws=draws: next(draws), **options))
    ddpm, ddim, other = runs
    assert torch.allclose(ddpm, ddim, atol=1e-5)
    assert not torch.allclose(ddpm, other, atol=0.1)


def test_samples_have_the_mixture_s_mean_and_spread():
    mean = (WEIGHTS * MEANS).sum()
    std = ((WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2).sqrt()
    for name, steps in (("ddpm", 100), ("plms", 30)):
        generator = torch.Generator().manual_seed(2)
        out = sample(
            name, steps, normal(1, 4, 48, 48),
            noise=lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype),
        )  # fmt: skip
        assert out.mean().item() == pytest.approx(mean.item(), abs=0.03)
        assert out.std().item() == pytest.approx(std.item(), abs=0.03)


def test_the_callback_sees_x_before_each_step_and_the_clean_estimate():
    for name in ("ddim", "plms"):
        seen = []
        x = normal(1, 1, 2, 2)
        out = sample(name, 6, x, callback=lambda i, x, x0, seen=seen: seen.append((x, x0)))
        assert torch.equal(seen[0][0], x)
        assert seen[-1][1].shape == x.shape
        assert (seen[-1][1] - out).abs().max() < 0.1  # the last estimate is nearly the result


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "plsm"}, "no such sampler: 'plsm'. Did you mean 'plms'?"),
        ({"name": "plms", "steps": 0}, "steps: at least 1 is needed, not 0"),
        ({"name": "ddim", "steps": 0}, "steps: at least 1 is needed, not 0"),
        ({"name": "ddim", "eta": 1.5}, "eta: a number from 0 to 1 is needed, not 1.5"),
        ({"name": "ddim", "eta": math.nan}, "eta: number (from 0 to 1) is needed, not nan"),
        ({"name": "plms", "eta": 0.5}, "no such key: 'eta'"),
        ({"name": "ddpm", "eta": 0.5}, "no such key: 'eta'"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    with pytest.raises(UserError) as error:
        build("sampler", section)
    assert message in str(error.value)


# ------------------------------------------------------------------------------- schedules made of timesteps


def gaussian(schedule, std=0.5, learned=False, steps=None):
    """The exact denoiser of x0 ~ N(0, std^2), clamped nowhere; with the exact variance of its ancestral steps."""
    chain = None if steps is None else Posterior.from_times(schedule, schedule.grid(steps))
    times = None if steps is None else schedule.grid(steps).tolist()

    def predict(x, t):
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t.double()))  # [B, 1, 1, 1]
        variance = alpha**2 * std**2 + sigma**2
        x0, eps = alpha * std**2 / variance * x, sigma / variance * x
        fraction = None
        if learned:
            i = times.index(t[0].item())
            # The step's own variance, and what is not known of x0.
            exact = chain.variance[i] + chain.x0_weight[i] ** 2 * (std**2 * sigma**2 / variance)
            low, high = chain.log_variance[i], chain.log_beta[i]
            fraction = ((exact.log() - low) / (high - low).clamp(min=1e-12)).expand_as(x)
        return Prediction(x0, eps, fraction)

    return predict


@pytest.mark.parametrize("betas", ["squaredcos_cap_v2", "linear", "linear_latent"])
@pytest.mark.parametrize("name", CALLS)
def test_every_sampler_visits_timesteps(name, betas):
    schedule = Discrete(betas)
    x = normal(1, 2, 24, 24)
    steps = 50 if name in ("ddim", "ddim_extrapolated", "euler", "ddpm", "dpmpp_2m_sde") else 25
    generator = torch.Generator().manual_seed(3)
    sampler = build("sampler", {"name": name, "steps": steps})
    seen = []

    def predict(x, t):
        seen.append(t[0].item())
        return gaussian(schedule)(x, t)

    out = sampler.sample(
        predict, x, schedule=schedule,
        noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
        callback=lambda *_: None,
    )  # fmt: skip
    # One does not converge to the solution: it is what it is for those who know its pictures.
    assert out.std().item() == pytest.approx(0.35 if name == "ddim_extrapolated" else 0.5, rel=0.12)
    assert max(seen) <= 1
    if name not in ("prk", "pie"):  # whose last stage is at t = 0
        assert min(seen) >= 1 / 1000 - 1e-7


@pytest.mark.parametrize("steps", ["fast27", "ddim25", "10,10,3,2,2", "27"])
@pytest.mark.parametrize("name", CALLS)
def test_every_sampler_takes_a_respacing(name, steps):
    schedule = Discrete("linear")
    sampler, reported = build("sampler", {"name": name, "steps": steps}), []
    out = sampler.sample(
        gaussian(schedule), normal(1, 1, 4, 4), schedule=schedule, noise=torch.randn_like,
        callback=lambda i, x, x0: reported.append(i),
    )  # fmt: skip
    assert reported == list(range(sampler.steps)) and sampler.steps == (25 if steps == "ddim25" else 27)
    assert torch.equal(sampler.times(schedule), schedule.grid(steps))
    assert out.isfinite().all()


def test_the_right_variance_of_few_ancestral_steps_gives_the_right_spread():
    """A posterior's variance is too small for few steps, beta too large; what a network can learn is right."""
    schedule, steps = Discrete("squaredcos_cap_v2"), 8
    spreads = {}
    for variance in ("posterior", "learned", "beta"):
        generator = torch.Generator().manual_seed(4)
        sampler = build("sampler", {"name": "ddpm", "steps": steps, "variance": variance})
        out = sampler.sample(
            gaussian(schedule, learned=True, steps=steps), normal(1, 1, 300, 300), schedule=schedule,
            noise=lambda x, g=generator: torch.randn(x.shape, generator=g, dtype=x.dtype),
        )  # fmt: skip
        spreads[variance] = out.std().item()
    assert spreads["learned"] == pytest.approx(0.5, rel=0.01)
    assert spreads["posterior"] < 0.97 * 0.5 and spreads["beta"] > 1.03 * 0.5


class Toward2(Wrapper):
    """Adds the gradient of a likelihood."""

    order = 20
    adds_gradient = True

    def wrap(self, predict, schedule):
        return lambda x, t: predict(x, t)._replace(gradient=0.2 * (2 - x))


def test_gradients_are_followed_by_every_sampler():
    """Data N(0, 1) and the likelihood of y = 2 under N(x_t, 1): samples move toward y, by shifted mean or score."""
    schedule = Discrete("linear")
    moved = {}
    for name in ("ddpm", "ddim", "unipc", "heun", "plms"):
        sampler = build("sampler", {"name": name, "steps": 50})

        predict = gaussian(schedule, std=1.0)
        wrapped = stack(predict, [Toward2()], schedule=schedule, uses_gradient=sampler.uses_gradient)
        out = sampler.sample(wrapped, normal(1, 1, 40, 40), schedule=schedule, noise=lambda x: normal(*x.shape, seed=5))
        moved[name] = out.mean().item()
    assert all(0.1 < mean < 2 for mean in moved.values()), moved


def test_the_variant_of_glide_s_programs_leaves_out_both_ends():
    schedule = Discrete("squaredcos_cap_v2")
    for name, calls in (("plms", 27 - 2 + 9), ("prk", 4 * 25)):
        sampler, seen = build("sampler", {"name": name, "steps": "27", "variant": "glide"}), []

        def predict(x, t, seen=seen):
            seen.append(t[0].item())
            return gaussian(schedule)(x, t)

        out = sampler.sample(predict, normal(1, 2, 24, 24), schedule=schedule)
        assert (sampler.steps, len(seen)) == (25, calls)
        assert seen[0] == pytest.approx(0.962) and min(seen) >= 1 / 1000 - 1e-7
        assert out.std().item() == pytest.approx(0.5, rel=0.05)
    with pytest.raises(UserError, match="at least 3 are needed, not 2"):
        build("sampler", {"name": "plms", "steps": 2, "variant": "glide"})
