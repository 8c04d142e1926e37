"""What sampling through the pipeline costs beside a bare loop that makes the same pictures.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --checkpoint runs/yfcc/ema.safetensors --device cuda --steps 50 --precision bf16-mixed

Both take their turns on one model: the pipeline as `sample.py` calls it, and DDIM written out with classifier-free
guidance, the decoder behind it, from the same noise to the same pictures (how many of 255 levels they are apart is
printed). Without `--checkpoint` the model is the quickstart's, untrained, which costs as much. The median of the pairs'
ratios counts; `benchmarks/samplers.py` says how good pictures are after how many steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.config import load
from ldm_lab.errors import run_program
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions
from ldm_lab.sampling.loading import DTYPES
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.pipeline import SeededNoise
from ldm_lab.training.demo import trained_model
from ldm_lab.training.diffusion import DiffusionTask

ROOT = Path(__file__).resolve().parents[1]
GUIDANCE = 3.0


def untrained(size: int, device: torch.device, dtype: torch.dtype) -> Pipeline:
    """Return a pipeline over the quickstart's parts, the denoiser as initialized, for pictures of a side in pixels."""
    quickstart = ROOT / "assets" / "quickstart"
    weights = [f"{part}.weights={quickstart / file}.safetensors"
               for part, file in (("autoencoder", "autoencoder"), ("conditioner", "cloob"))]  # fmt: skip
    torch.manual_seed(0)
    own = [f"data.image_size={size}", "objective={name: v_cosine}", *weights]  # the loop below is written for v
    task = DiffusionTask(load(ROOT / "configs" / "quickstart.yaml", own))
    for parameter in task.model.parameters():  # the last layer begins with zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    for module in (task, *task.frozen.values()):
        module.to(device)
    return Pipeline(replace(trained_model(task, (size, size)), dtype=dtype))


class BareLoop:
    """DDIM with guidance and the decoder, without anything around them."""

    def __init__(self, pipeline: Pipeline, prompts: list[Prompt], options: SamplingOptions) -> None:
        """Encode the prompts; that is not timed on this side, and hardly counts on the other."""
        self.model: Model = pipeline.model
        request = pipeline.check(prompts, options)
        conditions, _, self.null = pipeline.encode(request).select(list(range(len(prompts))), self.model.device)
        self.given = {name: values[:, 0] for name, values in conditions.items()}  # [B, ...] each
        self.times = request.sampler.times(self.model.objective.schedule, request.latent_size).tolist()
        self.shape = (len(prompts), self.model.autoencoder.channels, *request.latent_size)
        self.seeds = list(request.seeds)

    @torch.no_grad()
    def __call__(self) -> list[Image.Image]:
        """Return the pictures."""
        model, device = self.model, self.model.device
        x = SeededNoise(self.seeds)(torch.empty(self.shape, device=device))  # [B, C, h, w]
        both = {name: torch.cat([self.null[name], self.given[name]]) for name in self.given}  # [2B, ...] each
        for i, time_now in enumerate(self.times):
            t = torch.full((2 * len(x),), time_now, device=device)  # [2B]
            found = model.predict(model.denoiser)(torch.cat([x, x]), t, both)  # [2B, C, h, w]
            x0, eps = (n + GUIDANCE * (c - n) for n, c in (its.chunk(2) for its in (found.x0, found.eps)))
            if i + 1 == len(self.times):
                break
            then = torch.tensor([self.times[i + 1]], device=device)  # [1]
            alpha, sigma = model.objective.schedule.alpha_sigma(then)  # [1], [1]
            x = alpha * x0 + sigma * eps  # [B, C, h, w]
        pixels = model.autoencoder.decode(x0).clamp(-1, 1)  # [B, 3, H, W]
        levels = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, 3]
        return [Image.fromarray(picture) for picture in levels]


def levels_apart(ours: list[Image.Image], theirs: list[Image.Image]) -> int:
    """Return by how many of 255 levels pictures differ at most."""
    pairs = zip(ours, theirs, strict=True)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="a trained model; default: the quickstart's, untrained")
    add("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    add("--precision", default="32-true", choices=DTYPES, help="default: %(default)s")
    add("--size", type=int, default=64, help="of the untrained model's pictures, pixels; default: %(default)s")
    add("--pictures", type=int, default=8, metavar="N", help="at once; default: %(default)s")
    add("--steps", type=int, default=20, metavar="N", help="default: %(default)s")
    add("--pairs", type=int, default=6, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="of the CPU; default: %(default)s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.checkpoint:
        options = ModelOptions(device=args.device, precision=args.precision)
        pipeline = Pipeline.from_checkpoint(args.checkpoint, options)
    else:
        pipeline = untrained(args.size, torch.device(args.device), DTYPES[args.precision])
    wanted = SamplingOptions(guidance=GUIDANCE, sampler={"name": "ddim", "steps": args.steps}, clip_denoised=False,
                             batch_size=args.pictures)  # fmt: skip
    prompts = [Prompt("a red circle")] * args.pictures
    bare = BareLoop(pipeline, prompts, wanted)

    def seconds(work: Callable[[], list[Image.Image]]) -> tuple[float, list[Image.Image]]:
        began = time.perf_counter()
        pictures = work()  # on the CPU: the device is done
        return time.perf_counter() - began, pictures

    print(f"{'pair':8}{'pipeline ms':>14}{'bare ms':>12}{'ratio':>9}   levels apart")
    ratios = []
    for number in range(args.pairs + 1):
        ours, ours_made = seconds(lambda: pipeline(prompts, wanted))
        theirs, theirs_made = seconds(bare)
        if not number:  # warms up
            continue
        ratios.append(ours / theirs)
        apart = levels_apart(ours_made, theirs_made)
        print(f"{number:<8}{ours * 1e3:14.1f}{theirs * 1e3:12.1f}{ratios[-1]:9.3f}   {apart}", flush=True)
    print(f"{'median':8}{'':26}{statistics.median(ratios):9.3f}")


if __name__ == "__main__":
    run_program(main)
