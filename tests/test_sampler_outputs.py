"""What every sampler makes of fixed noise, with each of its options, is what it was when it was recorded.

`python tests/test_sampler_outputs.py` records anew, for a sampler or an option that is added.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import shipped

from ldm_lab.config import build
from ldm_lab.interfaces import Prediction
from ldm_lab.schedules import Cosine, Discrete

WITH_SPACING = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
RECORDED = Path(__file__).parent / "data" / "sampler_outputs.npz"
SPACINGS = ("log_snr", "karras", "uniform")
CONFIGS = [
    *({"name": "ddpm", **variance} for variance in ({}, {"variance": "posterior"}, {"variance": "beta"})),
    *({"name": "ddim", **eta} for eta in ({}, {"eta": 0.5}, {"eta": 1.0})),
    *({"name": name} for name in ("ddim_extrapolated", "pie", "plms2", "iplms", "plms", "prk")),
    *({"name": name, "variant": "glide"} for name in ("plms", "prk")),
    *({"name": name, "churn": churn} for name in ("euler", "heun") for churn in (0.0, 0.6)),
    *({"name": name, "spacing": spacing} for name in WITH_SPACING for spacing in SPACINGS),
    {"name": "dpmpp_2m_sde", "eta": 0.3},
    *({"name": "unipc", "order": order} for order in (1, 2, 3, 4)),
    *({"name": name, "sigma_max": None} for name in WITH_SPACING),
]
SCHEDULES = {"cosine": Cosine(), "linear": Discrete("linear"), "squaredcos_cap_v2": Discrete("squaredcos_cap_v2", 100)}


def model(schedule):
    """Return a `predict` near to that of Gaussian data, with a learned variance, in float64."""

    def predict(x, t):
        alpha, sigma = (level[:, None, None, None] for level in schedule.alpha_sigma(t.double()))  # [B, 1, 1, 1]
        variance, gap = alpha**2 * 0.5**2 + sigma**2, x - alpha * 0.3
        x0 = 0.3 + alpha * 0.5**2 / variance * gap + 0.1 * torch.sin(3 * x)
        return Prediction(x0, sigma / variance * gap, torch.sigmoid(x + t.double()[:, None, None, None]))

    return predict


def sampled(schedule: str, steps: int | str, config: dict) -> np.ndarray:
    """Return what a sampler makes of the noise of a seed, [2, 1, 2, 2], from the schedule's own first level on.

    `sigma_max: null` stands for the default.
    """
    if config["name"] in WITH_SPACING and not isinstance(steps, str):
        config = {"sigma_max": SCHEDULES[schedule].sigma_max, **config}
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    made = build("sampler", {**config, "steps": steps}).sample(
        model(SCHEDULES[schedule]), x, schedule=SCHEDULES[schedule],
        noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )  # fmt: skip
    return made.numpy()


def cases() -> list[tuple[str, int | str, dict]]:
    """Return (schedule, steps, config) of all that is recorded."""
    respaced = {"cosine": 27}
    return [
        (schedule, steps, config)
        for schedule in SCHEDULES
        for config in CONFIGS
        for steps in (5, respaced.get(schedule, "fast27"))
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: " ".join(map(str, config.values())))
def test_outputs_are_what_they_were(config):
    with np.load(RECORDED) as recorded:
        outputs = dict(zip(recorded["names"], recorded["outputs"], strict=True))
    for schedule, steps, other in cases():
        if other == config:
            wanted = outputs[f"{schedule} {steps} {json.dumps(config)}"]
            np.testing.assert_allclose(sampled(schedule, steps, config), wanted, rtol=1e-7, atol=1e-9)


def test_every_sampler_is_recorded():
    assert {config["name"] for config in CONFIGS} == shipped("sampler")


if __name__ == "__main__":
    names = [f"{schedule} {steps} {json.dumps(config)}" for schedule, steps, config in cases()]
    np.savez_compressed(RECORDED, names=np.array(names), outputs=np.stack([sampled(*case) for case in cases()]))
