"""At which noise level sampling should begin (`sigma_max`), by sampler, steps and size: the default was chosen by this.

    python benchmarks/first_level.py --checkpoint runs/quickstart/ema.safetensors

Beginning later leaves more steps for what can be seen, and loses what the noise did not hide any more: the mean color
of a picture first. So there are three tables. On a model: the share of prompts whose picture is right, how far latents
are from those of many steps from the schedule's start on (relative, the median over pictures), and the contrast of the
pictures' mean latents, 1 being that of these. On mixtures with known scores (`benchmarks/samplers.py`): the distance.
On pictures of one gray each, normally distributed, with the exact denoiser: the contrast that is left, by side.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from quickstart_accuracy import kinds, say, shares
from samplers import MIXTURES, distance, on_mixture

from ldm_lab.config import build
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.interfaces import Prediction
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.sampling.decode import decode
from ldm_lab.sampling.pipeline import Draw
from ldm_lab.schedules import Cosine

SAMPLERS = ("unipc", "dpmpp_2m", "dpmpp_2m_sde", "heun", "euler")
STEPS = {"heun": (6, 10, 20)}  # two model calls each
OTHERS = (4, 6, 8, 12, 20, 50)
LEVELS = (148.4, 100.0, 80.0, 50.0, 30.0, 20.0, 14.6)
SIDES = (8, 16, 32, 64, 128)
SPREAD = 0.5  # standard deviation of the grays, that of all elements being 1
REFERENCE = {"name": "heun", "steps": 100, "sigma_max": None, "spacing": "spliced"}
COUNT = 96  # pictures


class OnModel:
    """Pictures of a trained model, a prompt and a seed each."""

    def __init__(self, checkpoint: str, guidance: float, seed: int, wordings: int) -> None:
        """Load the model and sample the reference."""
        self.pipeline, self.guidance, self.seed = Pipeline.from_checkpoint(checkpoint), guidance, seed
        self.wanted = kinds()[:COUNT]
        words = itertools.cycle(WORDINGS[:wordings])
        self.prompts = [Prompt(say(names, wording)) for names, wording in zip(self.wanted, words)]
        spacing = "spliced" if self.pipeline.model.objective.schedule.timesteps is None else "log_snr"
        self.reference = self.latents({**REFERENCE, "spacing": spacing, "sigma_max": None})

    @property
    def sigma_max(self) -> float:
        """Where the model's noise schedule begins."""
        return self.pipeline.model.objective.schedule.sigma_max

    def latents(self, config: dict[str, str | int | float | None]) -> Tensor:
        """Return what a sampler makes, [N, C, h, w]."""
        options = SamplingOptions(guidance=self.guidance, sampler=config, batch_size=COUNT)
        request = self.pipeline.check(self.prompts, options)
        draws = [Draw(i, self.seed + i) for i in range(len(self.prompts))]
        return self.pipeline.latents(request, self.pipeline.encode(request), draws)

    def row(self, latents: Tensor) -> tuple[float, float, float]:
        """Return the share of right pictures, the distance, and the contrast of mean latents."""
        pictures = decode(self.pipeline.model, latents, range(COUNT), None)
        right = shares([tuple(check(picture.image)) for picture in pictures], self.wanted)[3]
        means, others = (z.mean((2, 3)) - z.mean((0, 2, 3)) for z in (latents, self.reference))  # [N, C]
        return right, distance(latents, self.reference), ((means * others).sum() / (others**2).sum()).item()


def gray(side: int, sigma_max: float, config: dict[str, str | int]) -> float:
    """Return the contrast that is left of pictures of one gray each, N(0, SPREAD^2), by an exact denoiser."""
    schedule = Cosine()

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t.double()[:, None, None, None])  # [B, 1, 1, 1] each
        variance = alpha**2 * SPREAD**2 + sigma**2 / side**2  # [B, 1, 1, 1], of the mean of x
        x0 = (alpha * SPREAD**2 / variance * x.mean((2, 3), keepdim=True)).expand_as(x)  # [B, 1, h, w]
        return Prediction(x0, (x - alpha * x0) / sigma)

    x = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / side
    made = build("sampler", {**config, "sigma_max": sigma_max}).sample(predict, x, schedule=schedule)  # [4000, 1, 1, 1]
    return (made.std() / (x * side).std()).item() / SPREAD


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="a trained model; without one only known scores are measured")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the first picture; default: %(default)s")
    add("--wordings", type=int, default=len(WORDINGS), metavar="N", help="of the captions in training (default: all)")
    add("--samplers", nargs="+", default=SAMPLERS, metavar="NAME", help="default: all with a choice")
    add("--steps", type=int, nargs="+", metavar="N", help="default: 4 to 50")
    add("--levels", type=float, nargs="+", default=LEVELS, metavar="X", help="sigma / alpha; default: 148.4 to 14.6")
    args = parser.parse_args()
    heads = "".join(f"{level:>22g}" for level in args.levels)

    print("gray pictures: contrast left after 20 and 50 steps of unipc, by sigma_max\n" + f"{'side':14}{heads}")
    for side in SIDES:
        cells = [
            " ".join(f"{gray(side, x, {'name': 'unipc', 'steps': steps}):.3f}" for steps in (20, 50))
            for x in args.levels
        ]
        print(f"{f'{side}x{side}':14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    for title, deviations in MIXTURES.items():
        sample = on_mixture(deviations)
        solution, _ = sample({"name": "prk", "steps": 300})
        print(f"\n{title}: distance to the converged solution, by sigma_max\n{'sampler':14}{heads}")
        for name in [name for name in args.samplers if name != "dpmpp_2m_sde"]:
            for steps in args.steps or STEPS.get(name, OTHERS):
                made = [sample({"name": name, "steps": steps, "sigma_max": x})[0] for x in args.levels]
                cells = [f"{distance(latents, solution):.1e}" for latents in made]
                print(f"{f'{name} {steps}':14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    if args.checkpoint:
        model = OnModel(args.checkpoint, args.guidance, args.seed, args.wordings)
        right, _, _ = model.row(model.reference)
        print(f"\nmodel: share right (reference {right:.1%}), distance, contrast, by sigma_max\n{'sampler':14}{heads}")
        for name in args.samplers:
            for steps in args.steps or STEPS.get(name, OTHERS):
                configs = [{"name": name, "steps": steps, "sigma_max": min(x, model.sigma_max)} for x in args.levels]
                cells = ["{:.1%} {:.3f} {:.3f}".format(*model.row(model.latents(config))) for config in configs]
                print(f"{f'{name} {steps}':14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    run_program(main)
