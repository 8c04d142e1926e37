"""Imagen's schedules, losses, sampling and noised low-resolution images against recordings of imagen-pytorch."""

import torch
from recorded import Case
from stand_ins import FunctionDenoiser
from torch import Tensor

from ldm_lab.config import build
from ldm_lab.objectives.targets import as_prediction, target
from ldm_lab.schedules import LogSNR, Posterior


def wide(level: Tensor) -> Tensor:
    """Return a number for each row, [B], as images are calculated with, [B, 1, 1, 1]."""
    return level[:, None, None, None]


def test_schedule(case):
    recorded = case("imagen_schedule")
    given = recorded.inputs
    for curve in recorded.config["schedules"]:
        schedule = LogSNR(curve)

        def check(what: str, ours: Tensor, curve: str = curve) -> None:
            recorded.check(f"{curve}_{what}", ours)

        t, s, x0, eps, x = (given[name] for name in ("t", "s", "x0", "eps", "xt"))
        (alpha, sigma), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)  # [B] each
        levels = wide(alpha), wide(sigma)
        check("log_snr", schedule.log_snr(t))
        check("log_snr_edge", schedule.log_snr(given["t_edge"]))
        check("alpha", alpha)
        check("sigma", sigma)
        check("q_sample", levels[0] * x0 + levels[1] * eps)
        check("x0_from_eps", as_prediction("eps", eps, x, *levels).x0)
        check("x0_from_v", as_prediction("v", given["v"], x, *levels).x0)
        check("v_target", target("v", x0, eps, *levels))
        # The original's forward kernel, which subtracts standard deviations; ours is that of the posterior's beta.
        check("renoise_s_to_t", x * wide(alpha / alpha_s) + eps * wide((sigma * alpha_s - sigma_s * alpha) / alpha_s))
        count = recorded.config["num_timesteps"]
        grid = torch.cat([schedule.grid(count), torch.zeros(1)])  # [S + 1]
        check("sampling_times", torch.stack([grid[:-1], grid[1:]], dim=1))
        for name, later in (("posterior", s), ("posterior_default_step", (t - 1 / count).clamp(min=0))):
            steps = [Posterior.from_times(schedule, torch.stack(pair)) for pair in zip(t, later)]
            mean = [step.at(0).mean(x0[i], x[i]) for i, step in enumerate(steps)]
            check(f"{name}_mean", torch.stack(mean))
            check(f"{name}_log_variance", torch.stack([step.variance[0].log() for step in steps]))
    recorded.finish()


def objective_of(curve: str, prediction: str, **options: str | float) -> dict:
    """Return the section of an objective; the original begins at t = 1."""
    return {"name": "continuous", "curve": curve, "prediction": prediction, "last_time": 1.0, **options}


def losses(recorded: Case, section: dict) -> Tensor:
    """Return our loss of the recorded batch, [B]."""
    given = recorded.inputs
    net = FunctionDenoiser(lambda x, time: given["pred"], "log_snr")
    images = given["images"] * 2 - 1  # [B, 3, h, w]
    return build("objective", section).loss_terms(net, images, {}, given["t"], given["noise"])["loss"]


def test_loss(case):
    recorded = case("imagen_loss")
    gamma = float(recorded.config["min_snr_gamma"])
    for name in recorded.names:
        curve, *what = name.split("_")
        if what == ["snr"]:
            recorded.check(name, LogSNR(curve).log_snr(recorded.inputs["t"]).exp())
            continue
        prediction, weighting, error = what
        options = {"weighting": "min_snr", "gamma": gamma} if weighting == "minsnr" else {"weighting": "snr"}
        recorded.check(name, losses(recorded, objective_of(curve, prediction, error=error, **options)))
    recorded.finish()


def test_loss_with_p2_weights(case):
    recorded = case("imagen_loss_p2")
    for name in recorded.names:
        curve, prediction, _, gamma = name.split("_")
        recorded.check(name, losses(recorded, objective_of(curve, prediction, weighting="p2", gamma=float(gamma))))
    recorded.finish()
