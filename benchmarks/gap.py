"""How well a model follows words that was trained on a CLIP's image embeddings, by what is done about the gap.

    python benchmarks/gap.py --out runs/gap
    python benchmarks/gap.py --out runs/gap --jobs 9 --device cuda
    python benchmarks/gap.py --out runs/gap_vit_b_32 --clip model=ViT-B-32 pretrained=laion2b_s34b_b79k \\
        --shards 'data/cc3m/{00000..00031}.tar' --texts texts.txt --data image_size=128 --set denoiser.base_channels=64

Trains one model for each row and seed, alike in all but the conditioner's section, and draws the same 96 prompts with
each. On the built-in shapes they are the quickstart's U-Nets, a checker judges color, shape and background, and the
CLIP is a small one with a gap (`gap_clip.py`), beside the quickstart's CLOOB. With --shards it is any CLIP of
open_clip's and any captioned shards, encoded by the autoencoder of --config; a picture is right if the CLIP finds its
own prompt most alike among all 96, which are the last captions. The models of all rows are trained on their images,
too; maps are fitted on pairs with other captions.

First the CLIP is trained, the images are encoded, and the gap is measured, once for all (--prepare does no more than
that). Then --jobs processes train and draw. Each result is a file of its own as soon as it is there, under a key of
everything that decides it; what is there is not done again, and --table shows it.

Models of the first rows never see a caption. Maps are fitted on the pairs of 1 and 10 percent of the images, and change
the prompts alone: their rows draw with the model of "shift and noise".
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from gap_clip import STEPS, trained_clip
from quickstart_accuracy import kinds, prompts, shares

from ldm_lab.checkpoints.gap_files import GapFile, read_gap
from ldm_lab.checkpoints.parts import load_part, weights_sha256
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.gap import Gap
from ldm_lab.config import PartConfig, RunConfig, load
from ldm_lab.data.cache import Cache
from ldm_lab.data.cache_files import META
from ldm_lab.data.shape_wordings import WORDINGS
from ldm_lab.data.shapes import draw, random_caption
from ldm_lab.errors import UserError, run_program
from ldm_lab.evaluation.shapes_checker import check
from ldm_lab.io.atomic import atomic_write
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions
from ldm_lab.training.gap_maps import fit_ridge

ROOT = Path(__file__).resolve().parents[1]
CONFIG, CONFIG_OF_SHARDS = "configs/quickstart.yaml", "configs/yfcc_clip.yaml"
DRAWN = 96
TEXTS = 2000  # captions of no image in particular, whose mean is the texts'
PAIRS = 10_000  # images that the gap is measured on, at most
OBJECTIVE = "{name: flow_matching}"  # of all rows, also of configs that train another one
SAMPLER = {"name": "unipc", "steps": 20}
ATTRIBUTES = ("color", "shape", "background")
ELSEWHERE = ("run", "cache", "logging", "checkpoint", "demo", "resume", "guard", "autoencoder")  # decide no result, or
# are in what the cache says of itself


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
CLIP_ROW, CLOOB_ROW = ROWS["nothing"], ROWS["CLOOB"]


class Bench:
    """Everything that the rows share, below a folder; what is not there yet is made by `prepare`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out).resolve()
        self.results = Path(args.results).resolve() if args.results else self.out / "results"
        self.config = args.config or (CONFIG_OF_SHARDS if args.shards else CONFIG)
        self.means, self.texts_file = self.out / "means.safetensors", self.out / "texts.txt"
        self.clip_file = self.out / "clip.safetensors"

    # ------------------------------------------------------------------------------------------------- parts

    def settings(self, row: Row, gap: str = "null") -> list[str]:
        """Return the settings of a row's conditioner, with a section `gap`, and of what all rows share."""
        if row.cloob:
            own = []
        elif self.args.shards:
            own = [f"conditioner.{word}" for word in self.args.clip]
        else:
            own = [f"conditioner.weights={self.clip_file}"]
        if gap != "null" or self.args.shards:  # whose config has one
            own.append(f"conditioner.gap={gap}")
        return [f"objective={OBJECTIVE}", "demo=null", *own, *self.args.set]

    def images(self) -> list[str]:
        """Return the settings of the images that are encoded."""
        where = f"data.shards='{self.args.shards}'" if self.args.shards else f"data.folder={self.out / 'shapes'}"
        return [where, *(f"data.{word}" for word in self.args.data)]

    def cached(self, row: Row) -> list[str]:
        """Return the settings of the cache in place of the images."""
        batch = load(self.root(self.config), self.images()).part("data").option("batch_size")
        data = f"{{name: cache, path: {self.cache(row)}, batch_size: {batch}, workers: {self.args.workers}}}"
        return [f"data={data}", "cache=null"]

    @staticmethod
    def root(path: str) -> Path:
        """Return a path relative to the checkout."""
        return ROOT / path

    def cache(self, row: Row) -> Path:
        """Return the folder of the cache that a row reads."""
        return self.out / ("cache_cloob" if row.cloob else "cache_clip")

    def opened(self, row: Row) -> Cache:
        """Return the cache that a row reads."""
        cache = Cache(path=str(self.cache(row)), batch_size=64, workers=0)
        cache.open()
        return cache

    @cached_property
    def section(self) -> PartConfig:
        """The CLIP's section."""
        return load(self.root(self.config), [*self.images(), *self.settings(CLIP_ROW)])["conditioner"]

    @cached_property
    def pairs(self) -> tuple[Tensor, list[str]]:
        """The cached image embeddings [N, D], unit rows, and their captions."""
        cache = self.opened(CLIP_ROW)
        shards = [cache.opened.get(i, cache.place) for i in range(len(cache.ends))]
        embeds = torch.cat([shard.rows("embed", list(range(shard.samples))).float() for shard in shards])  # [N, D]
        return embeds, [shard.text[i] for shard in shards for i in range(shard.samples)]

    @cached_property
    def measured(self) -> GapFile:
        """What `ldm_lab gap` measured."""
        return read_gap(self.means)

    @property
    def noise(self) -> float:
        """The noise of the rows with noise: as asked, or as measured."""
        return self.measured.gap.noise_length if self.args.noise is None else self.args.noise

    # ----------------------------------------------------------------------------------------------- prepare

    def prepare(self) -> None:
        """Train the CLIP, encode the images, measure the gap, as far as that has not been done."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.args.shards:
            trained_clip(self.clip_file, self.args.clip_steps)
        for row in (CLIP_ROW,) if self.args.shards else (CLIP_ROW, CLOOB_ROW):
            if not (self.cache(row) / META).exists():
                words = ["cache", "--out", str(self.cache(row)), *self.images(), *self.settings(row)]
                self.command(words, self.cache(row).name)
        if not self.means.exists():
            self.texts_file.write_text("\n".join(self.texts()), encoding="utf-8")
            words = ["gap", "--out", str(self.means), "--texts", str(self.texts_file), "--images", str(PAIRS)]
            self.command([*words, *self.cached(CLIP_ROW), *self.settings(CLIP_ROW)], "gap")

    def command(self, words: Sequence[str], name: str) -> None:
        """Run a command of the program on the benchmark's config. Raises UserError."""
        line = [sys.executable, "-m", "ldm_lab", words[0], "--config", self.config, *words[1:]]
        print(f"{name}: {' '.join(line)}", flush=True)
        if subprocess.run(line, cwd=ROOT, check=False).returncode:
            raise UserError(f"{name}: `python -m ldm_lab {words[0]}` failed")

    def texts(self) -> list[str]:
        """Return texts of no image in particular."""
        if self.args.texts:
            return Path(self.args.texts).read_text(encoding="utf-8").splitlines()
        rng = random.Random("texts of no image")
        return [random_caption(draw(rng, 16)[1], rng) for _ in range(TEXTS)]

    def prompts(self) -> list[str]:
        """Return the 96 prompts."""
        return list(dict.fromkeys(self.pairs[1]))[-DRAWN:] if self.args.shards else prompts(WORDINGS)

    # ------------------------------------------------------------------------------------------------- train

    def overrides(self, name: str, seed: int) -> list[str]:
        """Return the settings that decide what a row's run becomes."""
        row = ROWS[name]
        gap = "null" if row.gap is None else row.gap.format(means=self.means, noise=self.noise)
        own = [*self.cached(row), *self.settings(row, gap)]
        if row.train_on != "image":
            own.append(f"conditioner.train_on={row.train_on}")
        return [f"seed={seed}", f"trainer.max_steps={self.args.steps}", *own]

    def decides(self, name: str, seed: int) -> dict[str, str]:
        """Return everything that decides a run, in words: its config, with checksums in place of files."""
        config = load(self.root(self.config), [*self.overrides(name, seed), "run=any"])
        cache = self.opened(ROWS[name])
        sections = {key: json.dumps(its, sort_keys=True) for key, its in _without_files(config).items()}
        files = {"weights": str(weights_sha256("conditioner", config["conditioner"]))}
        files["cache"] = _digest(" ".join(shard.sha256 for shard in cache.meta.shards))
        if "means" in (ROWS[name].gap or ""):
            files["means"] = _checksum(self.measured.gap)
        return {**sections, **files, "encoded by": json.dumps(cache.encoded_by, sort_keys=True)}

    def drawn(self, name: str, seed: int) -> dict[str, str]:
        """Return everything that decides a result, in words."""
        row = ROWS[name]
        own = {"guidance": str(self.args.guidance), "sampler": json.dumps(SAMPLER)}
        if row.pairs:
            own["map"] = f"ridge on {row.pairs} of the pairs{', without those of the prompts' * bool(self.args.shards)}"
        if self.args.shards:  # pictures and words are compared without their means
            own["judged by"] = _checksum(self.measured.gap)
        return {**self.decides(row.of or name, seed), **own, "prompts": "\n".join(self.prompts())}

    def run(self, name: str, seed: int) -> Path:
        """Return the folder of a row's run."""
        return self.out / "runs" / f"{_stem(name, seed)}-{_key(self.decides(name, seed))}"

    def result(self, name: str, seed: int) -> Path:
        """Return the file of a result."""
        return self.results / f"{_stem(name, seed)}-{_key(self.drawn(name, seed))}.json"

    def train(self, name: str, seed: int) -> Path:
        """Train a row's model if that has not been done; return its file."""
        run, file = self.run(name, seed), self.run(name, seed) / "ema.safetensors"
        if not file.exists():
            from ldm_lab.commands.train import main

            kind = "cpu" if self.args.device == "cpu" else "gpu"
            words = [f"run={run}", f"trainer.accelerator={kind}", f"trainer.threads={self.args.threads}"]
            words += [f"checkpoint={{every: {self.args.steps}, keep_every: null, keep: 0}}"]
            words += ["trainer.devices=1", "logging={every: 100, wandb: none}"]
            if main(["--config", str(self.root(self.config)), *self.overrides(name, seed), *words]):
                raise KeyboardInterrupt  # told to stop
        return file

    # -------------------------------------------------------------------------------------------------- draw

    def right(self, name: str, seed: int) -> dict[str, float]:
        """Return the shares of 96 prompts whose picture is right."""
        row = ROWS[name]
        options = ModelOptions(device=self.args.device)
        pipeline = Pipeline.from_checkpoint(self.train(row.of or name, seed), options)
        if row.pairs:
            pipeline.model.gap = self.mapped(pipeline.model.gap, row.pairs, seed)
        texts = self.prompts()
        sampling = SamplingOptions(guidance=self.args.guidance, sampler=SAMPLER, batch_size=48, seed=1000 * seed)
        return self.judged(pipeline, pipeline([Prompt(text) for text in texts], sampling), texts)

    def chosen(self, share: float, seed: int) -> list[int]:
        """Return the numbers of the pairs that a map is fitted on, drawn by a seed: of shards none of the prompts'."""
        captions = self.pairs[1]
        judged = {*self.prompts()} if self.args.shards else set()
        drawn = np.random.default_rng(seed).permutation(len(captions)).tolist()
        return [number for number in drawn if captions[number] not in judged][: round(share * len(captions))]

    @torch.no_grad()
    def mapped(self, gap: Gap, share: float, seed: int) -> Gap:
        """Return the same means with a map that is fitted on a share of the pairs, drawn by a seed."""
        conditioner: EmbeddingConditioner = load_part("conditioner", self.section)
        images, captions = self.pairs
        chosen = self.chosen(share, seed)
        own = Gap(gap.image_mean.cpu(), gap.text_mean.cpu(), gap.noise_length)
        texts = conditioner.encode_text([captions[i] for i in chosen])  # [n, D]
        fit = fit_ridge(own.texts(texts), own.images(images[chosen]))
        return Gap(own.image_mean, own.text_mean, own.noise_length, fit.map)

    @torch.no_grad()
    def judged(self, pipeline: Pipeline, pictures: Sequence[Image.Image], texts: list[str]) -> dict[str, float]:
        """Return the shares of pictures that show their prompts."""
        if not self.args.shards:
            *each, whole = shares(map(check, pictures), kinds())
            return {"all": whole, **dict(zip(ATTRIBUTES, each))}
        conditioner, gap = pipeline.model.conditioner, self.measured.gap.to(pipeline.model.device)
        image = gap.images(conditioner.from_prompts([], list(pictures))["embed"])  # [96, D]
        text = gap.texts(conditioner.encode_text(texts))  # [96, D]
        own = torch.arange(len(texts), device=text.device)  # [96]
        return {"all": float(((image @ text.T).argmax(1) == own).float().mean())}

    def write(self, name: str, seed: int) -> float:
        """Find a row's result and write its file; return the share that is right in all."""
        right = self.right(name, seed)
        device = torch.cuda.get_device_name() if self.args.device.startswith("cuda") else self.args.device
        found = {"row": name, "seed": seed, "right": right, "device": device, "decided by": self.drawn(name, seed)}
        self.results.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.result(name, seed)) as file:
            file.write(json.dumps(found, indent=2).encode())
        return right["all"]


def _without_files(config: RunConfig) -> dict[str, str]:
    """Return the sections of a run that decide its result, without where its files lie and what it runs on."""
    sections = {key: dict(its) if isinstance(its, dict) else its for key, its in config.to_dict().items()}
    for key in ELSEWHERE:
        sections.pop(key, None)
    for section, keys in {"data": ("path", "workers"), "trainer": ("accelerator", "threads")}.items():
        for key in keys:
            sections[section].pop(key, None)
    conditioner = sections["conditioner"]
    conditioner.pop("weights", None)
    if conditioner.get("gap"):
        conditioner["gap"] = {key: its for key, its in conditioner["gap"].items() if key != "means"}
    return sections


def _checksum(gap: Gap) -> str:
    """Return the checksum of means."""
    return _digest(str([gap.image_mean.tolist(), gap.text_mean.tolist()]))


def _key(facts: dict[str, str]) -> str:
    return _digest(json.dumps(facts, sort_keys=True))[:12]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stem(name: str, seed: int) -> str:
    return f"{name.replace(' %', '_percent').replace(' ', '_')}-{seed}"


# --------------------------------------------------------------------------------------------------- processes


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what this process prints into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with open(path, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in zip((1, 2), kept):
                os.dup2(before, number)
                os.close(before)


def work(args: argparse.Namespace, trained: str, seed: int, rows: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Train one model, in a process of several, and find the rows that draw with it.

    Returns:
        Row -> the share that is right in all; what went wrong with the others, a line each.
    """
    os.chdir(ROOT)  # paths of configs are relative to it
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    shares_of, problems = {}, []
    with output_to(bench.out / "logs" / f"{_stem(trained, seed)}.log"):
        for name in rows:
            try:
                shares_of[name] = bench.write(name, seed)
            except UserError as error:  # the other rows do without it, such as a map on more pairs
                problems.append(f"{name}, seed {seed}: failed: {error}")
    return shares_of, problems


def missing(bench: Bench, rows: Sequence[str], seeds: Sequence[int]) -> dict[tuple[str, int], list[str]]:
    """Return the rows that have no result yet, by the trained model that draws them and its seed; seed by seed."""
    found: dict[tuple[str, int], list[str]] = {}
    for seed in seeds:
        for name in rows:
            if not bench.result(name, seed).exists():
                found.setdefault((ROWS[name].of or name, seed), []).append(name)
    return found


def measure_all(args: argparse.Namespace, tasks: dict[tuple[str, int], list[str]]) -> bool:
    """Do what is missing, in processes side by side; return whether all went well."""
    well = True
    with ProcessPoolExecutor(min(args.jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
        began = {pool.submit(work, args, *task, rows): (task, rows) for task, rows in tasks.items()}
        for done in as_completed(began):
            (_, seed), rows = began[done]
            if (error := done.exception()) is not None:
                well = False
                print(f"{', '.join(rows)}, seed {seed}: failed: {type(error).__name__}: {error}", flush=True)
                continue
            found, problems = done.result()
            well = well and not problems
            print(
                *(f"{name}, seed {seed}: {share:.1%}" for name, share in found.items()), *problems, sep="\n", flush=True
            )
    return well


# ------------------------------------------------------------------------------------------------------- table


def results_of(bench: Bench, rows: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, dict[str, float]]]:
    """Return what is there: row -> seed -> shares."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in rows:
        for seed in seeds:
            if (path := bench.result(name, seed)).exists():
                found.setdefault(name, {})[seed] = json.loads(path.read_text())["right"]
    return found


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Return the table, in Markdown: mean and spread (standard deviation) over seeds, means of the attributes."""
    kinds_of = list(dict.fromkeys(kind for by_seed in results.values() for right in by_seed.values() for kind in right))
    others = [kind for kind in kinds_of if kind != "all"]
    lines = [f"| {' | '.join(['', 'all right', 'spread', 'seeds', *others])} |"]
    lines.append(f"| {' | '.join(['---'] * (4 + len(others)))} |")
    for name, by_seed in results.items():
        whole = np.array([right["all"] for right in by_seed.values()])
        spread = f"{100 * whole.std(ddof=1):.1f}" if len(whole) > 1 else "-"
        means = [f"{100 * np.mean([right[kind] for right in by_seed.values()]):.1f} %" for kind in others]
        seeds = ", ".join(f"{100 * value:.1f}" for value in whole)
        lines.append(f"| {' | '.join([name, f'{100 * whole.mean():.1f} %', spread, seeds, *means])} |")
    return "\n".join(lines)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="runs/gap", metavar="DIR", help="of all that is made; default: %(default)s")
    add("--results", metavar="DIR", help="of the results; default: results below --out")
    add("--rows", nargs="*", default=[*ROWS], choices=[*ROWS], metavar="NAME", help="default: all")
    add("--seeds", nargs="*", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--steps", type=int, default=2400, metavar="N", help="optimizer steps of each model; default: %(default)s")
    add("--noise", type=float, metavar="X", help="of conditioner.gap; default: as measured")
    add("--guidance", type=float, default=3.0, metavar="W", help="default: %(default)s")
    add("--config", metavar="YAML", help=f"default: {CONFIG}, with --shards {CONFIG_OF_SHARDS}")
    add("--set", nargs="*", default=[], metavar="key=value", help="values that replace the config's, in every row")
    add("--data", nargs="*", default=[], metavar="key=value", help="values that replace the images' section's")
    add("--clip", nargs="*", default=[], metavar="key=value", help="a CLIP of open_clip's, for --shards")
    add("--clip-steps", type=int, default=STEPS, metavar="N", help="steps of the small CLIP; default: %(default)s")
    add("--shards", metavar="TARS", help="captioned shards in place of the shapes")
    add("--texts", metavar="FILE", help="texts of no image in particular, one a line, for --shards")
    add("--jobs", type=int, default=1, metavar="N", help="models that are trained side by side; default: %(default)s")
    add("--threads", type=int, metavar="N", help="of each; default: as many as the cores allow")
    add("--workers", type=int, default=0, metavar="N", help="loader processes of each; default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, metavar="NAME", help="cpu or cuda; default: %(default)s")
    add("--prepare", action="store_true", help="train the CLIP, encode the images, measure the gap, and leave")
    add("--table", action="store_true", help="show what is there, and leave")
    args = parser.parse_args(words)
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    args.rows = [name for name in args.rows if not (args.shards and ROWS[name].cloob)]
    return args


def main() -> int:
    """Prepare; train, draw and judge what is not done; print the table. Returns 1 if something failed."""
    args = arguments()
    bench = Bench(args)
    if not args.table:
        bench.prepare()
    if args.prepare:
        return 0
    tasks = {} if args.table else missing(bench, args.rows, args.seeds)
    well = measure_all(args, tasks) if tasks else True
    print(table(results_of(bench, args.rows, args.seeds)))
    return 0 if well else 1


if __name__ == "__main__":
    run_program(main)
