"""How well a model follows words that was trained on a CLIP's image embeddings, by what is done about the gap.

    python benchmarks/gap.py --out runs/gap
    python benchmarks/gap.py --out runs/gap_vit_b_32 --clip model=ViT-B-32 pretrained=laion2b_s34b_b79k \\
        --shards 'data/cc3m/{00000..00031}.tar' --texts texts.txt

Trains one model for each row, alike in all but the conditioner's section, and draws the same 96 prompts with each. On
the built-in shapes a checker judges color, shape and background, and the CLIP is a small one with a gap
(`gap_clip.py`), beside the quickstart's CLOOB. With --shards it is any CLIP of open_clip's and any captioned shards; a
picture is right if the CLIP finds its own prompt most alike among all 96, which are captions of the last shard. What is
done is not done again.

Models of the first rows never see a caption. Maps are fitted on the pairs of 1 and 10 percent of the images, and change
the prompts alone: their rows draw with the model of "shift and noise".
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from gap_clip import trained_clip
from quickstart_accuracy import kinds, prompts

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.gap_files import GapFile
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.gap import Gap
from ldm_lab.config import PartConfig
from ldm_lab.data.cache import Cache
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw, random_caption
from ldm_lab.errors import run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.atomic import atomic_write
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Pipeline, SamplingOptions
from ldm_lab.training.gap_maps import fit_ridge

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yaml"
DRAWN = 96
TEXTS = 2000  # captions of no image in particular, whose mean is the texts'
SMALLER = (  # U-Net and course of all rows: smaller than the quickstart's, so that 18 of them are trained in an hour
    "objective={name: flow_matching}",
    "data.batch_size=32",
    "denoiser.base_channels=48",
    "denoiser.blocks_per_level=1",
    "optim.warmup_steps=60",
)


class Row(NamedTuple):
    """What a row of the table is.

    Attributes:
        cloob: whether the conditioner is CLOOB.
        gap: the section `gap`; None for none.
        train_on: what stands for the condition.
        of: the row whose model draws; its own if empty.
        pairs: share of the pairs that a map of the prompts is fitted on.
    """

    cloob: bool = False
    gap: str | None = None
    train_on: str = "image"
    of: str = ""
    pairs: float = 0.0


ROWS = {
    "nothing": Row(),
    "noise alone": Row(gap="{{shift: false, noise: {noise}}}"),
    "shift": Row(gap="{{means: {means}, noise: 0}}"),
    "shift and noise": Row(gap="{{means: {means}, noise: {noise}}}"),
    "map on 1 % of the pairs": Row(of="shift and noise", pairs=0.01),
    "map on 10 % of the pairs": Row(of="shift and noise", pairs=0.1),
    "CLOOB": Row(cloob=True),
    "trained on text": Row(train_on="text"),
}


class Bench:
    """Everything that the rows share, made once below a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        if args.shards:
            self.clip = ["conditioner={name: clip}", *(f"conditioner.{word}" for word in args.clip)]
            self.data = [
                f"data={{name: webdataset, shards: '{args.shards}', image_size: 64, batch_size: 64, workers: 1}}"
            ]
        else:
            self.clip = [f"conditioner.weights={trained_clip(self.out / 'clip.safetensors', args.clip_steps)}"]
            self.data = [f"data.folder={self.out / 'shapes'}"]
        self.means = self.out / "means.safetensors"

    def settings(self, row: Row) -> list[str]:
        """Return the settings of a row's data and conditioner."""
        return [*self.data, *([] if row.cloob else self.clip)]

    def cache(self, row: Row) -> Path:
        """Return the folder of the cache that a row reads."""
        return self.out / ("cache_cloob" if row.cloob else "cache_clip")

    def section(self) -> PartConfig:
        """Return the CLIP's section."""
        from ldm_lab.config import load

        return load(ROOT / CONFIG, self.settings(ROWS["nothing"]))["conditioner"]

    def pairs(self) -> tuple[Tensor, list[str]]:
        """Return the cached image embeddings [N, D], unit rows, and their captions."""
        cache = Cache(path=str(self.cache(Row())), batch_size=64, workers=0)
        cache.open()
        shards = [cache.opened.get(i, cache.place) for i in range(len(cache.ends))]
        embeds = torch.cat([shard.rows("embed", list(range(shard.samples))).float() for shard in shards])  # [N, D]
        return embeds, [shard.text[i] for shard in shards for i in range(shard.samples)]

    def texts(self) -> list[str]:
        """Return texts of no image in particular."""
        if self.args.texts:
            return Path(self.args.texts).read_text(encoding="utf-8").split("\n")
        rng = random.Random("texts of no image")
        return [random_caption(draw(rng, 16)[1], rng) for _ in range(TEXTS)]

    def measure(self) -> Gap:
        """Return the means, written for the rows that are trained with them."""
        conditioner: EmbeddingConditioner = load_part("conditioner", self.section())
        images, _ = self.pairs()
        with torch.no_grad():
            texts = torch.cat([conditioner.encode_text(self.texts()[i : i + 100]) for i in range(0, TEXTS, 100)])
        gap = Gap(images.mean(0), texts.mean(0), self.args.noise)
        GapFile(gap, embedder_of(self.section()), Section()).save(self.means)
        return gap

    def mapped(self, gap: Gap, share: float, seed: int) -> Gap:
        """Return the same means with a map that is fitted on a share of the pairs, drawn by a seed."""
        conditioner: EmbeddingConditioner = load_part("conditioner", self.section())
        images, captions = self.pairs()
        chosen = np.random.default_rng(seed).permutation(len(images))[: round(share * len(images))].tolist()
        with torch.no_grad():
            texts = conditioner.encode_text([captions[i] for i in chosen])
        fit = fit_ridge(gap.texts(texts), gap.images(images[chosen]))
        return Gap(gap.image_mean, gap.text_mean, gap.noise_length, fit.map)

    # ------------------------------------------------------------------------------------------------- training

    def overrides(self, name: str, seed: int) -> list[str]:
        """Return all settings of a row's run."""
        row = ROWS[name]
        own = [*self.settings(row), f"cache.folder={self.cache(row)}"]
        if row.gap is not None:
            own.append("conditioner.gap=" + row.gap.format(means=self.means, noise=self.args.noise))
        if row.train_on != "image":
            own.append(f"conditioner.train_on={row.train_on}")
        steps = self.args.steps
        course = [f"trainer.max_steps={steps}", f"checkpoint={{every: {steps}, keep: 0}}", f"demo.every={10 * steps}"]
        course += ["logging.every=100", "trainer.threads=1"] if self.args.one_thread else ["logging.every=100"]
        return [f"run={self.run(name, seed)}", f"seed={seed}", *own, *SMALLER, *course]

    def run(self, name: str, seed: int) -> Path:
        """Return the folder of a row's run."""
        return self.out / "runs" / f"{name.replace(' ', '_')}-{seed}"

    def train(self, name: str, seed: int) -> Path:
        """Train a row's model if that has not been done; return its file."""
        run = self.run(name, seed)
        if not (run / "ema.safetensors").exists():
            command = [sys.executable, "train.py", "--config", CONFIG, *self.overrides(name, seed)]
            with open(self.out / f"{run.name}.log", "w") as log:
                subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=log)
        return run / "ema.safetensors"

    def share_right(self, name: str, seed: int) -> float:
        """Return the share of 96 prompts whose picture is right."""
        row = ROWS[name]
        model = self.train(row.of or name, seed)
        pipeline = Pipeline.from_checkpoint(model)
        if row.pairs:
            pipeline.model.gap = self.mapped(pipeline.model.gap, row.pairs, seed)
        options = SamplingOptions(
            guidance=self.args.guidance, sampler={"name": "unipc", "steps": 20}, batch_size=48, seed=1000 * seed
        )
        texts = self.prompts()
        pictures = pipeline([Prompt(text) for text in texts], options)
        return self.judged(pipeline, pictures, texts)

    def prompts(self) -> list[str]:
        """Return the 96 prompts."""
        return list(dict.fromkeys(self.pairs()[1]))[-DRAWN:] if self.args.shards else prompts(WORDINGS)

    def judged(self, pipeline: Pipeline, pictures: Sequence[Image.Image], texts: list[str]) -> float:
        """Return the share of pictures that show their prompts."""
        if not self.args.shards:
            return sum(check(picture) == names for picture, names in zip(pictures, kinds())) / DRAWN
        conditioner = pipeline.model.conditioner
        gap = self.measure()  # pictures and words are compared where they can be
        with torch.no_grad():
            image = gap.images(conditioner.from_prompts([], list(pictures))["embed"])  # [96, D]
            text = gap.texts(conditioner.encode_text(texts))  # [96, D]
        return float(((image @ text.T).argmax(1) == torch.arange(len(texts))).float().mean())


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the table: mean and spread of each row over its seeds."""
    lines = [f"{'row':28}{'share right':>12}{'spread':>9}   seeds"]
    for name, by_seed in results.items():
        values = np.array(list(by_seed.values()))
        spread = f"{values.std(ddof=1):.1%}" if len(values) > 1 else "-"
        lines.append(f"{name:28}{values.mean():12.1%}{spread:>9}   " + ", ".join(f"{v:.1%}" for v in values))
    return "\n".join(lines)


def main() -> None:
    """Parse the command line; train, draw and judge what is not done; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", default="runs/gap", metavar="DIR", help="default: %(default)s")
    add("--rows", nargs="*", default=[*ROWS], choices=[*ROWS], metavar="NAME", help="default: all")
    add("--seeds", nargs="*", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--steps", type=int, default=1500, metavar="N", help="optimizer steps of each model; default: %(default)s")
    add("--noise", type=float, default=0.5, metavar="X", help="of conditioner.gap; default: %(default)s")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--clip", nargs="*", default=[], metavar="key=value", help="a CLIP of open_clip's, for --shards")
    add(
        "--clip-steps",
        type=int,
        default=1500,
        metavar="N",
        help="optimizer steps of the small CLIP; default: %(default)s",
    )
    add("--shards", metavar="TARS", help="captioned shards in place of the shapes")
    add("--texts", metavar="FILE", help="texts of no image in particular, one a line, for --shards")
    add("--one-thread", action="store_true", help="train on one thread, for several runs side by side")
    args = parser.parse_args()
    if args.one_thread:
        torch.set_num_threads(1)
    bench = Bench(args)
    results_path = bench.out / "results.json"
    rows = [name for name in args.rows if not (args.shards and ROWS[name].cloob)]
    for kind in sorted({ROWS[name].cloob for name in rows}):
        folder = bench.cache(Row(cloob=kind))
        prepare = [sys.executable, "-m", "ldm_lab", "cache", "--config", CONFIG, "--out", str(folder)]
        if not (folder / "meta.json").exists():
            subprocess.run([*prepare, *bench.settings(Row(cloob=kind))], check=True, cwd=ROOT)
    bench.measure()
    for seed in args.seeds:
        for name in rows:
            results = json.loads(results_path.read_text()) if results_path.exists() else {}
            if str(seed) in results.get(name, {}):
                continue
            found = bench.share_right(name, seed)
            results = json.loads(results_path.read_text()) if results_path.exists() else {}
            results.setdefault(name, {})[str(seed)] = found
            with atomic_write(results_path) as file:
                file.write(json.dumps(results, indent=2).encode())
            print(f"{name}, seed {seed}: {found:.1%}", flush=True)
    results = json.loads(results_path.read_text())
    print(table({name: results[name] for name in ROWS if name in results}))


if __name__ == "__main__":
    run_program(main)
