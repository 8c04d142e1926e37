"""Measure models: which checkpoint, guidance, sampler and number of steps makes the better pictures, in one table.

    python -m ldm_lab evaluate --checkpoint runs/a --checkpoint runs/b --data /data/held_out --out evaluation
    python -m ldm_lab evaluate --checkpoint runs/a --data /data/held_out --guidance 1 --guidance 3 --steps 25 --steps 50
    python -m ldm_lab evaluate --checkpoint runs/a --data shards='/data/{00000..00009}.tar' --metric fid --metric kid
    python -m ldm_lab evaluate --checkpoint runs/a --data /data/held_out --metric loss --metric psnr --metric retrieval
    python -m ldm_lab evaluate --images samples --data path=/data/held_out image_size=256 \\
        --clip model=ViT-B-32 pretrained=laion2b_s34b_b79k

Real images are read as training reads them. Pictures are made of their captions, or of the lines of --prompts; number i
of seed 0 has the noise of `sample.py --seed i`. Distances are of the embeddings of the first model's own conditioner,
unless --clip names another CLIP; FID and KID are of Inception, which is downloaded once. Features of the real images
stay in OUT/real.safetensors, with what they are of; interrupted, the same command goes on. docs/evaluation.md says what
each metric means and how many images it needs.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import (
    add_clip_arguments,
    add_imports_argument,
    add_pass_arguments,
    pass_options,
    whole_number,
)
from ldm_lab.commands._flags import add_flags, given, read_value
from ldm_lab.commands._metric_flags import check_effects
from ldm_lab.commands._sampling_flags import base_options, of_other_samplers, tell_owners
from ldm_lab.config import PartConfig, check_section
from ldm_lab.config.overrides import values
from ldm_lab.config.registry import infos, part_info
from ldm_lab.errors import NotFiniteError, UserError, told_in_one_line
from ldm_lab.sampling import flat
from ldm_lab.sampling.options import ModelOptions, SamplingOptions

if TYPE_CHECKING:  # these import torch, which takes seconds
    from ldm_lab.evaluation.asked import Asked
    from ldm_lab.prompts import Prompt

NAMING = ("checkpoint", "images", "data", "features", "prompts", "out", "clip", "inception")
SWEPT = ("guidance", "sampler", "steps")
# Choices that are the command's own, or that show something else than what a model makes of a prompt.
LEFT_OUT = (
    *("seed", "batch_size", "init_image", "strength", "mask", "invert_mask", "mask_blur", "resize", "rerank"),
    *SWEPT,
)
KINDS = {".tar": "webdataset", ".txt": "image_list", ".tsv": "image_list"}  # of data, by the ending of a path
PATHS = {"webdataset": "shards", "image_list": "path", "folder": "path"}
PICTURES, LIMIT, BATCH, BOOTSTRAP = 1000, 10_000, 32, 20
LAST_SEED = 2**32 - 1  # each has a million seeds of pictures, of 64 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add, whole = parser.add_argument, {"type": whole_number(1), "metavar": "N"}
    again, number = {"action": "append", "default": []}, {"type": whole_number(0, LAST_SEED), "metavar": "N"}
    add(
        "--checkpoint",
        **again,
        metavar="FILE",
        help="a run's folder, ema.safetensors, .ckpt, a released name; repeatable",
    )
    add("--images", **again, metavar="DIR", help="a folder of pictures, with captions in .txt files; repeatable")
    add("--data", nargs="+", default=[], metavar="SPEC", help="real images: a path, or key=value of a section data")
    add("--features", metavar="FILE", help="features of real images, as OUT/real.safetensors of another evaluation")
    add("--limit", **whole, help=f"real images, evenly spread ({LIMIT})")
    add("--metric", **again, metavar="NAME", help="repeatable (default: fd, cmmd, precision, recall, clip_score)")
    add("--prompts", metavar="FILE", help="text (UTF-8), one prompt a line (default: captions of the real images)")
    add("--pictures", **whole, help=f"that are made of each seed ({PICTURES})")
    add("--seeds", nargs="+", **number, help="of pictures; several give margins (0)")
    add("--bootstrap", **number, help=f"draws for margins of one seed; 0 leaves them out ({BOOTSTRAP})")
    add("--out", default="evaluation", metavar="DIR", help="where evaluation.json, .csv, .md, .png go (%(default)s)")
    add_clip_arguments(parser)
    add("--inception", metavar="FILE", help="weights of Inception by hand, as pytorch-fid and torch-fidelity have them")
    add_pass_arguments(parser, whose=None, batch=BATCH, what="images and pictures")
    sampling = part_info("sampling", None).options
    group = parser.add_argument_group("how pictures are made")
    every = {"guidance": sampling["guidance"], "sampler": sampling["sampler"], "steps": flat.sampler_names()["steps"]}
    for name, option in every.items():
        kind = str if name == "sampler" else partial(read_value, option.annotation)
        meaning = option.meaning.rstrip(".").replace("%", "%%")
        group.add_argument(f"--{name}", action="append", default=[], type=kind, help=f"{meaning}; repeatable")
    add_flags(group, {name: option for name, option in sampling.items() if name not in LEFT_OUT})
    options = {name: option for name, option in flat.sampler_names().items() if name not in SWEPT}
    add_flags(parser.add_argument_group("options of samplers", ", ".join(infos("sampler"))), options)
    of_model = part_info("model_options", None).options
    add_flags(parser.add_argument_group("the models"), {n: its for n, its in of_model.items() if n != "device"})


def run(args: argparse.Namespace) -> int:
    """Measure, write the table, print it."""
    from ldm_lab.evaluation.comparison import Comparison  # not before: it imports torch, which takes seconds
    from ldm_lab.progress import print_line

    check_together(args)
    loading = ModelOptions(**given(args, part_info("model_options", None).options))
    choices = sampling_choices(args)
    announce_weights(args, loading, choices[0])
    asked = asked_of(args, choices)
    less = "a smaller --batch-size, --offload or --precision bf16-mixed need less"
    with told_in_one_line(lambda: "evaluating", less):
        table = Comparison(asked, loading, pass_options(args)).run()
    if table is None:  # another process of several
        return 0
    paths = table.write(asked.out)
    print_line(table.to_markdown())
    print_line(f"{', '.join(path.name for path in paths)} in {asked.out}")
    if not table.is_finite:
        raise NotFiniteError(f"some values are not finite; {paths[0]} has them all, and says which")
    return 0


# ------------------------------------------------------------------------------------------------- the command line


def check_together(args: argparse.Namespace) -> None:
    """Fill in what is not given. Raises UserError for flags that do not go together, or have no effect."""
    from ldm_lab.metrics import DEFAULT, check_names, of_kind

    if not args.checkpoint and not args.images:
        raise UserError("what is to be measured? --checkpoint, --images, or both have to be given")
    words = dict(args._get_kwargs())
    for name in NAMING:  # an empty text, such as that of a variable that is not set, is no path
        given_here = words[name] if isinstance(words[name], list) else [words[name]]
        if "" in given_here:
            raise UserError(f"--{name}: an empty text names nothing; leave the flag out, or say what is meant")
    args.metric = check_names(args.metric or DEFAULT, "--metric")
    of_models = of_kind(args.metric, "data")
    if of_models and not args.checkpoint:
        raise UserError(f"--metric {of_models[0]}: is of a model, and needs --checkpoint")
    check_effects(args)
    if args.bootstrap == 1:
        raise UserError("--bootstrap: a margin needs 2 draws or more; 0 leaves margins out")
    defaults = {"limit": LIMIT, "pictures": PICTURES, "seeds": [0], "bootstrap": BOOTSTRAP}
    for name, default in defaults.items():
        setattr(args, name, default if words[name] is None else words[name])
    if len({*args.seeds}) < len(args.seeds):
        raise UserError(f"--seeds: each has to be another one, not {' '.join(map(str, args.seeds))}")


def sampling_choices(args: argparse.Namespace) -> list[SamplingOptions]:
    """Return how each model is asked: every guidance with every sampler and number of steps.

    As in `compare`, options that not all of the samplers have count for those that have them, which is said.
    """
    found = []
    every = [args.guidance or [None], args.sampler or [None], args.steps or [None]]  # as SWEPT
    for name, chosen in zip(SWEPT, every, strict=True):
        if len({*chosen}) < len(chosen):
            raise UserError(f"--{name}: each has to be another one, not {' '.join(map(str, chosen))}")
    for guidance, sampler, steps in itertools.product(*every):
        one = argparse.Namespace(**dict(args._get_kwargs()))
        one.guidance, one.sampler, one.steps = guidance, sampler, steps
        one.seed = None
        for name in of_other_samplers(sampler, args.sampler):
            setattr(one, name, None)
        found.append(base_options(one))
    words = dict(args._get_kwargs())
    tell_owners((name for name in flat.sampler_names() if words.get(name) not in (None, [])), args.sampler)
    return found


def announce_weights(args: argparse.Namespace, loading: ModelOptions, options: SamplingOptions) -> None:
    """Say what will be downloaded. Raises UserError if it cannot be."""
    from ldm_lab.checkpoints.parts import part_downloads
    from ldm_lab.embed import clip_config
    from ldm_lab.evaluation.inception import RELEASED
    from ldm_lab.evaluation.perceptual import features_download
    from ldm_lab.pretrained.resolve import announce, to_download
    from ldm_lab.sampling.needs import announce_models

    for checkpoint in args.checkpoint:
        announce_models(checkpoint, [], loading, options)
    found = part_downloads("conditioner", clip_config(args.clip, None), "--clip") if args.clip else []
    if {"fid", "kid", "rfid"} & {*args.metric}:
        inception = to_download(args.inception or RELEASED, "--inception")
        found += [] if inception is None else [inception]
    announce([*found, *(features_download() if "lpips" in args.metric else [])])


def asked_of(args: argparse.Namespace, choices: list[SamplingOptions]) -> "Asked":
    """Return what is asked. Raises UserError for data that cannot be."""
    from ldm_lab.embed import clip_config
    from ldm_lab.evaluation.asked import Asked

    return Asked(
        metrics=args.metric,
        out=Path(args.out).expanduser(),
        checkpoints=args.checkpoint,
        choices=choices,
        images=[str(Path(folder).expanduser()) for folder in args.images],
        data=data_section(args) if args.data else None,
        features=Path(args.features).expanduser() if args.features else None,
        limit=args.limit,
        prompts=prompts_of(args),
        pictures=args.pictures,
        seeds=tuple(args.seeds),
        clip=clip_config(args.clip, None) if args.clip else None,
        inception=args.inception,
        bootstrap=args.bootstrap,
    )


def prompts_of(args: argparse.Namespace) -> "list[Prompt] | None":
    """Return the prompts of a file; None without one."""
    from ldm_lab.prompts import parse_prompt, read_prompts

    return [parse_prompt(line) for line in read_prompts(args.prompts)] if args.prompts else None


def data_section(args: argparse.Namespace) -> PartConfig:
    """Return the section `data` that --data says; its image size is by default the first model's.

    Raises:
        UserError: what is wrong with it.
    """
    first, *others = args.data
    if "=" not in first:  # a path alone
        kind = "folder" if Path(first).expanduser().is_dir() else KINDS.get(Path(first).suffix, "webdataset")
        first = f"{PATHS[kind]}={first}"
        others = [f"name={kind}", *others]
    try:
        section = values([first, *others], "path=/data/held_out")
    except UserError as error:
        raise UserError(f"--data: {error}") from None
    if "name" not in section:
        section["name"] = "webdataset" if "shards" in section else "folder"
    known = part_info("data", str(section["name"])).options if section["name"] in infos("data") else {}
    defaults = {"image_size": image_size(args) if "image_size" not in section else None, "batch_size": args.batch_size}
    section = {**{key: value for key, value in defaults.items() if key in known and value is not None}, **section}
    problems = check_section("data", section, "data")
    if problems:
        raise UserError(f"--data: {'; '.join(problem.removeprefix('data.') for problem in problems)}")
    return PartConfig.from_dict("data", section)


def image_size(args: argparse.Namespace) -> int | None:
    """Return the side of the first model's training images, pixels; None if nobody says it."""
    from ldm_lab.checkpoints.models import read_model
    from ldm_lab.sampling.loading import locate_model

    if not args.checkpoint:
        return None
    side = read_model(locate_model(args.checkpoint[0]))[2].get("image_size", "")
    return int(side) if side.isdecimal() else None
