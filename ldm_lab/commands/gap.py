"""Measure the gap between a conditioner's text and image embeddings, and write the means that close it.

    python -m ldm_lab gap --config configs/yfcc_clip.yaml --out gap.safetensors data.shards='/data/{00000..00099}.tar'
    python -m ldm_lab gap --config configs/yfcc_clip.yaml --out gap.safetensors --map best data.shards='/data/*.tar'

A CLIP's texts and images lie in two clouds with a gap between them, so that a model that is trained on image embeddings
follows words badly. `conditioner.gap.means=gap.safetensors` takes each cloud's mean off (docs/no_captions.md). Needed
are images, those of the config or its cache, and texts that need not belong to them: some thousand that come with the
program, or --texts FILE. Where images have captions, how well pairs meet is told, before and after, and with it how
long the noise in training should be; --map fits a map on them. A training run whose config has conditioner.gap without
means measures them by itself.
"""

import argparse
from pathlib import Path

from ldm_lab.commands._arguments import (
    add_config_arguments,
    add_pass_arguments,
    pass_options,
    safetensors_file,
    whole_number,
)
from ldm_lab.config import load
from ldm_lab.errors import UserError

MAPS = ("none", "ridge", "residual", "best")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser, "a config with sections data and conditioner")
    add = parser.add_argument
    add("--out", type=safetensors_file, required=True, metavar="FILE", help="write the means there (.safetensors)")
    add(
        "--texts",
        metavar="FILE",
        help="texts, one a line, or `captions`, those of the data (default: texts of our own)",
    )
    add("--map", choices=MAPS, default="none", help="of texts, fitted on images with captions (%(default)s)")
    add("--images", type=whole_number(1), default=10_000, metavar="N", help="how many, evenly spread (%(default)s)")
    add("--plot", metavar="FILE", help="a picture of both clouds (.png; default: beside --out)")
    add_pass_arguments(parser, whose="the conditioner's", of_config=True)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write the means and the plot."""
    from ldm_lab.data.varied_texts import CAPTIONS, texts_of  # not before: torch takes seconds, and --help needs none
    from ldm_lab.evaluation.gap_plot import plot_clouds
    from ldm_lab.training.gap_measuring import GapWanted, say
    from ldm_lab.training.gap_runs import measure_gap, of_data, opened
    from ldm_lab.training.start import check_encoding

    config = load(args.config, args.overrides)
    for role in ("data", "conditioner"):
        if role not in config:
            raise UserError(f"{args.config}: has no section {role}")
    check_encoding(config, ["conditioner"])
    data, out = config["data"], Path(args.out)
    if args.texts not in (None, CAPTIONS):
        texts_of(args.texts)  # a file that is not there is told before the images are embedded
    source = opened(config)
    wanted = GapWanted(out, args.texts, args.map, f"{of_data(config, source)}, {args.images} images")
    report = measure_gap(config, source, wanted, args.images, pass_options(args, data))
    if report is None:  # another process of several
        return
    say(report)
    picture = Path(args.plot) if args.plot else out.with_suffix(".png")
    plot_clouds(picture, report.images, report.texts, report.captions, report.file.gap)
    noise = report.file.gap.noise_length
    print(f"{out}: conditioner.gap={{means: {out}, noise: {noise:.2f}}} uses it; both clouds: {picture}")
