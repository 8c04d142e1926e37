"""Train a head on rated images: a linear one by least squares, or an MLP, judged on images that it has not seen.

    # ratings in the samples' json; the embeddings are made first, and kept
    python -m ldm_lab train-head --shards 'rated/*.tar' --rating rating --out mine.safetensors
    # ratings in a table by the samples' key
    python -m ldm_lab train-head --shards 'rated/*.tar' --ratings ratings.csv --rating stars --out mine.safetensors
    # embeddings that are there already: of `score --embeddings`, or arrays of one's own
    python -m ldm_lab train-head --embeddings scores/*.embeddings.safetensors --ratings ratings.csv \\
        --out mine.safetensors
    python -m ldm_lab train-head --embeddings x.npy --ratings y.npy --clip model=ViT-L-14-quickgelu pretrained=openai \\
        --kind mlp --out mine.safetensors

The result is what `score --head` takes. A share of the images is held out; their correlation with the prediction and
the error are printed and stored in the file.
"""

import argparse
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import (
    add_clip_arguments,
    add_imports_argument,
    add_pass_arguments,
    not_negative,
    pass_options,
    positive,
    safetensors_file,
    share,
    whole_number,
)
from ldm_lab.commands.score import AGAIN, summary
from ldm_lab.config import PartConfig
from ldm_lab.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.curation.ratings import Rated

CLIP = {"name": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"}  # LAION's aesthetic predictors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add = parser.add_argument
    add("--shards", nargs="+", default=[], metavar="TAR", help="rated images")
    add("--embeddings", nargs="+", default=[], metavar="FILE", help="instead: .embeddings.safetensors files, or .npy")
    add("--ratings", metavar="FILE", help=".parquet, .csv or .tsv by key, or .npy row by row (default: the json)")
    add("--rating", default="rating", metavar="NAME", help="field of the json, or column of the table (%(default)s)")
    add("--key", default="key", metavar="NAME", help="the table's column with the samples' keys (%(default)s)")
    add("--out", type=safetensors_file, required=True, metavar="FILE", help="the head, a .safetensors file")
    add("--column", metavar="NAME", help="what its predictions are called in tables (default: the rating's name)")
    add("--kind", choices=("linear", "mlp"), default="linear", help="(%(default)s)")
    add("--output", choices=("number", "probability"), default="number", help="probability: ratings 0 to 1, a sigmoid")
    add("--held-out", type=share, default=0.1, metavar="SHARE", help="of the images, to judge it by (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the division and of an MLP (%(default)s)")
    add("--ridge", type=not_negative, metavar="X", help="of a linear head (default: by generalised cross-validation)")
    add("--widths", type=int, nargs="*", default=[1024, 128, 64, 16], metavar="N", help="hidden layers of an MLP")
    add("--dropout", type=float, nargs="*", default=[0.2, 0.2, 0.1], metavar="X", help="behind its first layers")
    add("--epochs", type=whole_number(1), default=50, metavar="N", help="of an MLP (%(default)s)")
    add("--lr", type=positive, default=1e-3, metavar="X", help="of an MLP (%(default)s)")
    add(
        "--step-size",
        type=whole_number(1),
        default=256,
        metavar="N",
        help="images per optimizer step of an MLP (%(default)s)",
    )
    add(
        "--work",
        metavar="DIR",
        help="where the embeddings of --shards are kept (default: NAME.embeddings for NAME.safetensors)",
    )
    add_clip_arguments(parser)
    add_pass_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, evaluate, write; say how good it is."""
    from ldm_lab.curation.heads import training
    from ldm_lab.curation.heads.head import save_head

    check_options(args)
    rated = embedded_ratings(args) if args.embeddings else image_ratings(args)
    if rated is None:  # another process of several: the first one trains
        return 0
    embeds, ratings = rated.all()
    parts = training.split(embeds, ratings, args.held_out, args.seed)
    options = {"embedder": rated.embedder, "column": args.column or args.rating, "output": args.output}
    if args.kind == "linear":
        section = PartConfig("head", "linear", {**options, "embed_dim": embeds.shape[1]})
        head, facts = training.fit_linear(section, *parts.train, args.ridge)
    else:
        widths, dropout = [embeds.shape[1], *args.widths, 1], args.dropout[: len(args.widths)]
        section = PartConfig("head", "mlp", {**options, "widths": widths, "activation": "relu", "dropout": dropout})
        how = training.MLPOptions(args.epochs, args.step_size, args.lr, args.seed)
        head, facts = training.fit_mlp(section, *parts.train, how)
    evaluated = training.evaluate(head.eval(), *parts.held_out, float(parts.train[1].mean()))
    images, held_out = len(parts.train[1]), len(parts.held_out[1])
    counts = {"images": images, "held_out": held_out, "seed": args.seed}
    save_head(args.out, head, section, {**counts, **facts, **evaluated.finite()})
    filtered = f" ({rated.summary()} left out)" if rated.summary() else ""
    print(f"{args.out}: {args.kind} head from {images:,} images{filtered}; on {held_out:,} held out: {evaluated}")
    return 0


def read_ratings(args: argparse.Namespace) -> dict[str, float] | None:
    """Return the ratings of a table by key; None where they are elsewhere."""
    from ldm_lab.curation.heads.ratings import read_table

    if not args.ratings or args.ratings.endswith(".npy"):
        return None
    return read_table(Path(args.ratings).expanduser(), args.key, args.rating)


def embedded_ratings(args: argparse.Namespace) -> "Rated":
    """Return the embeddings of files, rated by a table or row by row."""
    from ldm_lab.checkpoints.embedders import embedder_of
    from ldm_lab.curation.heads.ratings import Rated, read_rating_rows
    from ldm_lab.embed import clip_config

    table = read_ratings(args)
    rated = Rated(embedder_of(clip_config(args.clip, None)) if args.clip else None)
    files = [Path(path) for pattern in args.embeddings for path in sorted(glob.glob(pattern)) or [pattern]]
    if table is None and len(files) != 1:
        raise UserError(f"--ratings {args.ratings}: rates the rows of one file, {len(files)} are given")
    if table is None:
        rated.add_rows(files[0], read_rating_rows(Path(args.ratings).expanduser()))
    else:
        for file in files:
            rated.add_file(file, table)
    if rated.embedder is None:
        raise UserError(f"{files[0]}: does not say whose embeddings these are; --clip model=NAME pretrained=NAME does")
    return rated


def image_ratings(args: argparse.Namespace) -> "Rated | None":
    """Embed the images of shards; return them with their ratings, None in all processes but the first."""
    from ldm_lab.curation.heads.ratings import Rated, read_json_ratings
    from ldm_lab.curation.scoring.files import EMBEDDINGS
    from ldm_lab.curation.scoring.job import ScoreJob, ScoringOptions
    from ldm_lab.data.passes import run_pass
    from ldm_lab.data.work_items import shard_items
    from ldm_lab.embed import Encoder, clip_config

    table = read_ratings(args)
    items = shard_items(args.shards, Path(args.work or Path(args.out).with_suffix(".embeddings")).expanduser())
    encoder = Encoder(clip_config(args.clip, CLIP))
    job = ScoreJob(encoder, {}, ScoringOptions(similarity=False, embeddings=True))
    report = run_pass(job, items, pass_options(args))
    if report is None:
        return None
    print(summary(report))
    if report.unreached:
        raise UserError(f"{len(report.unreached)} shards could not be read, such as {report.unreached[0]}; {AGAIN}")
    rated = Rated(encoder.embedder)
    for item in items:
        by_key = read_json_ratings(item.address, args.rating) if table is None else table
        rated.add_file(item.file(EMBEDDINGS), by_key)
    return rated


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that make no sense."""
    if bool(args.shards) == bool(args.embeddings):
        raise UserError("what is rated? --shards or --embeddings, one of them, has to be given")
    if args.embeddings and not args.ratings:
        raise UserError("--ratings: has to be given with --embeddings, which have no json")
    if args.shards and args.ratings and args.ratings.endswith(".npy"):
        raise UserError("--ratings: a table by key is needed for shards; a .npy rates the rows of --embeddings")
