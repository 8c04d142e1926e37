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
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands.score import add_clip_arguments, check, lightning_options
from ldm_lab.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.curation.ratings import Rated

CLIP = {"name": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"}  # LAION's aesthetic predictors'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--shards", nargs="+", default=[], metavar="TAR", help="rated images")
    add("--embeddings", nargs="+", default=[], metavar="FILE", help="instead: .embeddings.safetensors files, or .npy")
    add("--ratings", metavar="FILE", help=".parquet, .csv or .tsv by key, or .npy row by row (default: the json)")
    add("--rating", default="rating", metavar="NAME", help="field of the json, or column of the table (%(default)s)")
    add("--key", default="key", metavar="NAME", help="the table's column with the samples' keys (%(default)s)")
    add("--out", required=True, metavar="FILE", help="the head, a .safetensors file")
    add("--column", metavar="NAME", help="what its predictions are called in tables (default: the rating's name)")
    add("--kind", choices=("linear", "mlp"), default="linear", help="(%(default)s)")
    add("--output", choices=("number", "probability"), default="number", help="probability: ratings 0 to 1, a sigmoid")
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of the images, to judge it by (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the division and of an MLP (%(default)s)")
    add("--ridge", type=float, metavar="X", help="of a linear head (default: by generalised cross-validation)")
    add("--widths", type=int, nargs="*", default=[1024, 128, 64, 16], metavar="N", help="hidden layers of an MLP")
    add("--dropout", type=float, nargs="*", default=[0.2, 0.2, 0.1], metavar="X", help="behind its first layers")
    add("--epochs", type=int, default=50, metavar="N", help="of an MLP (%(default)s)")
    add("--lr", type=float, default=1e-3, metavar="X", help="of an MLP (%(default)s)")
    add("--step-size", type=int, default=256, metavar="N", help="images per optimizer step of an MLP (%(default)s)")
    add(
        "--work",
        metavar="DIR",
        help="where the embeddings of --shards are kept (default: NAME.embeddings for NAME.safetensors)",
    )
    add_clip_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, judge, write; say how good it is."""
    from ldm_lab.curation import head_training
    from ldm_lab.curation.heads.head import save_head

    check_options(args)
    rated = gather(args)
    if rated is None:  # another process of several: the first one trains
        return 0
    embeds, ratings = rated.all()
    parts = head_training.split(embeds, ratings, args.held_out, args.seed)
    section = {
        "name": args.kind,
        "embedder": rated.embedder,
        "column": args.column or args.rating,
        "output": args.output,
    }
    if args.kind == "linear":
        section |= {"embed_dim": embeds.shape[1]}
        head, facts = head_training.fit_linear(section, *parts.train, args.ridge)
    else:
        widths = [embeds.shape[1], *args.widths, 1]
        section |= {"widths": widths, "activation": "relu", "dropout": args.dropout[: len(args.widths)]}
        options = {"epochs": args.epochs, "batch_size": args.step_size, "lr": args.lr, "seed": args.seed}
        head, facts = head_training.fit_mlp(section, *parts.train, **options)
    judged = head_training.judge(head.eval(), *parts.held_out, float(parts.train[1].mean()))
    counts = {"images": len(parts.train[1]), "held_out": len(parts.held_out[1]), "seed": args.seed}
    finite = {key: value for key, value in judged.items() if math.isfinite(value)}  # JSON knows no NaN
    save_head(args.out, head, section, {**counts, **facts, **finite})
    left_out = f" ({rated.summary()} left out)" if rated.summary() else ""
    print(
        f"{args.out}: {args.kind} head from {counts['images']:,} images{left_out}; on {counts['held_out']:,} held out: "
        f"Pearson {judged['pearson']:.4f}, Spearman {judged['spearman']:.4f}, RMSE {judged['rmse']:.4g}, "
        f"MAE {judged['mae']:.4g} (RMSE of the mean rating: {judged['rmse_of_mean']:.4g})"
    )
    return 0


def gather(args: argparse.Namespace) -> "Rated | None":
    """Return the rated embeddings; None in all processes but the first."""
    from ldm_lab.checkpoints.embedders import embedder_of
    from ldm_lab.curation import ratings, scoring, units
    from ldm_lab.curation.score_files import EMBEDDINGS
    from ldm_lab.embed import Encoder, clip_section

    table = None
    if args.ratings and not args.ratings.endswith(".npy"):
        table = ratings.read_table(Path(args.ratings).expanduser(), args.key, args.rating)
    if args.embeddings:
        rated = ratings.Rated(embedder_of(clip_section(args.clip, None)) if args.clip else None)
        files = [Path(path) for pattern in args.embeddings for path in sorted(glob.glob(pattern)) or [pattern]]
        if table is None:
            if len(files) != 1:
                raise UserError(f"--ratings {args.ratings}: rates the rows of one file, {len(files)} are given")
            rated.add_rows(files[0], ratings.read_rating_rows(Path(args.ratings).expanduser()))
        else:
            for file in files:
                rated.add_file(file, table)
        if rated.embedder is None:
            raise UserError(
                f"{files[0]}: does not say whose embeddings these are; --clip model=NAME pretrained=NAME does"
            )
        return rated
    found = units.shards(args.shards, Path(args.work or Path(args.out).with_suffix(".embeddings")).expanduser())
    encoder = Encoder(clip_section(args.clip, CLIP))
    wanted = scoring.Wanted(similarity=False, embeddings=True, batch_size=args.batch_size, workers=args.workers)
    line, left = scoring.run(scoring.Scoring(found, encoder, {}, wanted), **lightning_options(args))
    if not line:
        return None
    print(line)
    if left:
        raise UserError(f"{len(left)} shards could not be read, such as {left[0]}; the same command tries again")
    rated = ratings.Rated(encoder.embedder)
    for unit in found:
        by_key = ratings.read_json_ratings(unit.address, args.rating) if table is None else table
        rated.add_file(unit.target.with_name(unit.target.name + EMBEDDINGS), by_key)
    return rated


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that make no sense."""
    check(args)
    if bool(args.shards) == bool(args.embeddings):
        raise UserError("what is rated? --shards or --embeddings, one of them, has to be given")
    if args.embeddings and not args.ratings:
        raise UserError("--ratings: has to be given with --embeddings, which have no json")
    if args.shards and args.ratings and args.ratings.endswith(".npy"):
        raise UserError("--ratings: a table by key is needed for shards; a .npy rates the rows of --embeddings")
    if not args.out.endswith(".safetensors"):
        raise UserError(f"--out {args.out}: the file is written as .safetensors, so its name has to end like that")
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out: a share between 0 and 1 is needed, not {args.held_out}")
    for key in ("epochs", "step_size", "lr"):
        if not getattr(args, key) > 0:
            raise UserError(f"--{key.replace('_', '-')}: a number above 0 is needed, not {getattr(args, key)}")
    if args.ridge is not None and not (math.isfinite(args.ridge) and args.ridge >= 0):
        raise UserError(f"--ridge: a number from 0 on is needed, not {args.ridge}")
