"""How near each sampler comes to the converged solution, by model evaluations: on Gaussian mixtures and on a model.

    python benchmarks/samplers.py --checkpoint runs/quickstart/ema.safetensors

The mixtures have known scores (`tests/test_samplers.py` measures orders of convergence on such). On the model the
solution is that of its guided probability-flow ODE, by Runge-Kutta with many steps; all samplers start from the same
noise and at the schedule's first noise level (`benchmarks/first_level.py` measures others), and the distance is of
latents, relative, the median over pictures. Stochastic samplers have no solution to be near to.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.config import build
from ldm_lab.errors import run_program
from ldm_lab.interfaces import Prediction
from ldm_lab.prompts import read_prompts
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.sampling.pipeline import Draw
from ldm_lab.schedules import Cosine

FROM_THE_START = ("log_snr", "karras", "uniform")  # spacings that would begin by the latents' size
REFERENCE = {"name": "prk", "steps": 300}  # model calls: four times as many
ROWS = [
    *({"name": name} for name in ("ddim", "plms", "plms2", "iplms", "pie", "prk")),
    *(
        {"name": name, "spacing": spacing}
        for name in ("euler", "heun", "dpmpp_2m")
        for spacing in ("spliced", "karras")
    ),
    *({"name": "dpmpp_2m", "spacing": spacing} for spacing in ("log_snr", "uniform")),
    *({"name": "unipc", "spacing": s, "order": o} for o in (2, 3) for s in ("spliced", "log_snr", "karras", "uniform")),
]
WEIGHTS, MEANS = (torch.tensor(v, dtype=torch.float64) for v in ([0.35, 0.65], [-1.0, 0.8]))
# Standard deviations of the two Gaussians: a very smooth problem, and one of two narrow peaks.
MIXTURES = {"wide mixture": [0.45, 0.6], "narrow mixture": [0.02, 0.02]}


def mixture(x: Tensor, t: Tensor, stds: Tensor) -> Prediction:
    """Return the exact posterior means of x0 and eps [B, C, h, w], every scalar of x drawn from two Gaussians."""
    alpha, sigma = (level[:, None, None, None, None] for level in Cosine().alpha_sigma(t.double()))  # [B, 1, 1, 1, 1]
    var = alpha**2 * stds**2 + sigma**2  # [B, 1, 1, 1, 2]
    gap = x.double()[..., None] - alpha * MEANS  # [B, C, h, w, 2]
    share = (WEIGHTS.log() - var.log() / 2 - gap**2 / (2 * var)).softmax(-1)  # [B, C, h, w, 2]
    x0 = (share * (MEANS + alpha * stds**2 * gap / var)).sum(-1)  # [B, C, h, w]
    return Prediction(x0, (share * sigma * gap / var).sum(-1))


def on_mixture(stds: list[float]) -> Callable[[dict[str, Any]], tuple[Tensor, int]]:
    """Return a function of a sampler: what it makes of fixed noise, [1, 4, 16, 16], and the number of model calls."""
    deviations = torch.tensor(stds, dtype=torch.float64)  # [2]

    def sample(config: dict[str, Any]) -> tuple[Tensor, int]:
        calls = []

        def counted(x: Tensor, t: Tensor) -> Prediction:
            calls.append(t)
            return mixture(x, t, deviations)

        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return build("sampler", config).sample(counted, x, schedule=Cosine()), len(calls)

    return sample


def on_model(pipeline: Pipeline, prompts: list[str], guidance: float) -> Callable[[dict[str, Any]], tuple[Tensor, int]]:
    """Return the same for a trained model's latents [N, C, h, w], one per prompt, seeds 0, 1, 2, ..."""

    def sample(config: dict[str, Any]) -> tuple[Tensor, int]:
        calls = []
        hook = pipeline.model.denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
        request = pipeline.check(prompts, SamplingOptions(guidance=guidance, sampler=config))
        draws = [Draw(i, i) for i in range(len(prompts))]
        latents = pipeline.latents(request, pipeline.encode(request), draws)  # [N, C, h, w]
        hook.remove()
        return latents, len(calls)

    return sample


def distance(latents: Tensor, solution: Tensor) -> float:
    """Return the median over pictures of the relative distance of latents [N, C, h, w]."""
    return ((latents - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).median().item()


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="a trained model; without one only the mixtures are measured")
    add("--prompts", default="configs/quickstart_prompts.txt", metavar="FILE", help="default: %(default)s")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--steps", type=int, nargs="+", default=[10, 15, 20, 30, 50], metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    problems = {name: on_mixture(stds) for name, stds in MIXTURES.items()}
    if args.checkpoint:
        pipeline = Pipeline.from_checkpoint(args.checkpoint)
        problems["model"] = on_model(pipeline, read_prompts(args.prompts), args.guidance)
    for title, sample in problems.items():
        solution, _ = sample(REFERENCE)
        print(f"\n{title}: relative distance to the converged solution (model calls)")
        print(f"{'sampler':28}" + "".join(f"{f'{n} steps':>18}" for n in args.steps))
        for row in ROWS:
            name = " ".join(str(value) for value in row.values())
            cells = []
            start = {"sigma_max": Cosine.sigma_max} if row.get("spacing") in FROM_THE_START else {}
            for steps in args.steps:
                latents, calls = sample({**row, **start, "steps": steps})
                cells.append(f"{distance(latents, solution):.1e} ({calls})")
            print(f"{name:28}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    run_program(main)
