"""Score images: aesthetics, image-text similarity, and whatever heads there are, by one CLIP, as Parquet per shard.

    python -m ldm_lab score --shards '/data/cc12m/{00000..00099}.tar' --out scores
    python -m ldm_lab score --shards '/data/cc12m/*.tar' --head aesthetic/improved_vit_l_14 --devices 8
    python -m ldm_lab score --shards '*.tar' --out scores --head punsafe=nsfw.safetensors --head mine.safetensors \\
        --clip weights=checkpoints/ViT-L-14.pt --rewrite scored --embeddings
    python -m ldm_lab score --images photos --out scores

Without --out the scores of NAME.tar lie beside it, in NAME.scores.parquet. The CLIP is the one that the heads belong
to; open_clip downloads it, or --clip weights=FILE has it. Interrupted, the same command goes on with the shards that
have no Parquet yet. Under torchrun or SLURM each process takes its share of the shards.
"""

import argparse
from pathlib import Path

from ldm_lab.errors import UserError

DEFAULT = "aesthetic/vit_l_14"
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--shards", nargs="+", default=[], metavar="TAR", help="paths, {00000..00099} braces, globs, http(s) addresses")
    add("--images", metavar="DIR", help="instead of shards, all images below a folder")
    add("--out", metavar="DIR", help="where the scores go (default: beside each shard)")
    add(
        "--head",
        action="append",
        default=[],
        metavar="[COLUMN=]HEAD",
        help=f"a released name or a file; several are possible (default: {DEFAULT}, unless --clip is another)",
    )
    add_clip_arguments(parser)
    add("--no-similarity", action="store_true", help="leave the captions alone")
    add("--embeddings", action="store_true", help="also write NAME.embeddings.safetensors, for training heads")
    add("--rewrite", metavar="DIR", help="also write new shards whose json has the scores")


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say which CLIP embeds, and on what; `train-head` has them, too."""
    add = parser.add_argument
    add(
        "--clip",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of a conditioner: model, pretrained, weights; name=cloob for a CLOOB (default: as the heads say)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images at once (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes per device (%(default)s)")
    add("--devices", default="1", metavar="N", help="devices per node, or auto (%(default)s)")
    add("--num-nodes", type=int, default=1, metavar="N", help="nodes (%(default)s)")
    add("--accelerator", default="auto", metavar="NAME", help="auto, gpu, cpu, mps (%(default)s)")
    add("--precision", choices=PRECISIONS, default=PRECISIONS[0], help="of the CLIP's arithmetic (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Score; say what was scored and skipped. Returns 1 if some shards could not be reached."""
    from ldm_lab.curation import scoring, units
    from ldm_lab.curation.heads.head import load_head
    from ldm_lab.embed import Encoder, clip_section

    check(args)
    if bool(args.shards) == bool(args.images):
        raise UserError("what is to be scored? --shards or --images, one of them, has to be given")
    names = args.head or ([] if args.clip and not all(word.startswith("weights=") for word in args.clip) else [DEFAULT])
    heads = {}
    for name in names:
        column, equals, source = name.rpartition("=")
        loaded = load_head(source)
        column = column if equals else loaded.head.column
        if column in heads:
            raise UserError(f"--head {name}: there is a column {column} already; name it otherwise: NAME={source}")
        heads[column] = loaded
    if not heads and args.no_similarity and not args.embeddings:
        raise UserError("nothing to be done: no --head, --no-similarity, and no --embeddings")
    out = Path(args.out).expanduser() if args.out else None
    found = units.shards(args.shards, out) if args.shards else units.blocks(args.images, out)
    embedder = next((loaded.head.embedder for loaded in heads.values()), None)
    encoder = Encoder(clip_section(args.clip, embedder))
    wanted = scoring.Wanted(
        similarity=not args.no_similarity,
        embeddings=args.embeddings,
        rewrite=Path(args.rewrite).expanduser() if args.rewrite else None,
        batch_size=args.batch_size,
        workers=args.workers,
    )
    line, left = scoring.run(scoring.Scoring(found, encoder, heads, wanted), **lightning_options(args))
    if line:
        print(line)
    if left:
        print(f"{len(left)} shards could not be read, such as {left[0]}; the same command tries again")
    return 1 if left else 0


def check(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that make no sense."""
    for key, least in (("batch_size", 1), ("workers", 0), ("num_nodes", 1)):
        if getattr(args, key) < least:
            raise UserError(f"--{key.replace('_', '-')}: at least {least} is needed, not {getattr(args, key)}")


def lightning_options(args: argparse.Namespace) -> dict[str, str | int]:
    """Return what Lightning's Trainer is told."""
    return {key: getattr(args, key) for key in ("devices", "num_nodes", "accelerator", "precision")}
