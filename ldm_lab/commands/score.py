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
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_clip_arguments, add_imports_argument, add_pass_arguments, pass_options
from ldm_lab.config.overrides import split_name
from ldm_lab.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.curation.heads.head import LoadedHead
    from ldm_lab.data.jobs import PassReport

DEFAULT = "aesthetic/vit_l_14"
AGAIN = "the same command tries again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
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
    add_pass_arguments(parser)
    add("--no-similarity", action="store_true", help="leave the captions alone")
    add("--embeddings", action="store_true", help="also write NAME.embeddings.safetensors, for training heads")
    add("--rewrite", metavar="DIR", help="also write new shards whose json has the scores")


def run(args: argparse.Namespace) -> int:
    """Score; say what was scored and skipped. Returns 1 if some shards could not be reached."""
    from ldm_lab.curation.scoring.job import ScoreJob, ScoringOptions
    from ldm_lab.data.passes import run_pass
    from ldm_lab.data.work_items import file_batches, shard_items
    from ldm_lab.embed import Encoder, clip_config

    if bool(args.shards) == bool(args.images):
        raise UserError("what is to be scored? --shards or --images, one of them, has to be given")
    announce_weights(args)
    heads = load_heads(args)
    if not heads and args.no_similarity and not args.embeddings:
        raise UserError("nothing to be done: no --head, --no-similarity, and no --embeddings")
    out = Path(args.out).expanduser() if args.out else None
    items = shard_items(args.shards, out) if args.shards else file_batches(args.images, out)
    embedder = next((loaded.head.embedder for loaded in heads.values()), None)
    encoder = Encoder(clip_config(args.clip, embedder))
    rewrite = Path(args.rewrite).expanduser() if args.rewrite else None
    options = ScoringOptions(not args.no_similarity, args.embeddings, rewrite)
    report = run_pass(ScoreJob(encoder, heads, options), items, pass_options(args))
    if report is None:  # another process of several
        return 0
    print(summary(report))
    if report.unreached:
        print(f"{len(report.unreached)} shards could not be read, such as {report.unreached[0]}; {AGAIN}")
    return 1 if report.unreached else 0


def announce_weights(args: argparse.Namespace) -> None:
    """Say what will be downloaded: heads, and the CLIP that they belong to. Raises UserError if that cannot be."""
    from ldm_lab.checkpoints.parts import part_downloads
    from ldm_lab.embed import clip_config
    from ldm_lab.pretrained.catalogue import catalogue
    from ldm_lab.pretrained.resolve import announce, to_download

    sources = [split_name(name)[1] for name in head_names(args)]
    found = [to_download(source, "--head") for source in sources]
    embedders = [catalogue()[source].config.get("embedder") for source in sources if source in catalogue()]
    clips = []
    says_all = bool(args.clip) and not all(word.startswith("weights=") for word in args.clip)
    if says_all or any(isinstance(embedder, dict) for embedder in embedders):  # else a head's own file says which
        embedder = next((its for its in embedders if isinstance(its, dict)), None)
        clips = part_downloads("conditioner", clip_config(args.clip, embedder), "--clip")
    announce([*(download for download in found if download is not None), *clips])


def head_names(args: argparse.Namespace) -> list[str]:
    """Return the heads of the command line, perhaps with the name of their column; the default one if none is given."""
    is_default_clip = not args.clip or all(word.startswith("weights=") for word in args.clip)
    return args.head or ([DEFAULT] if is_default_clip else [])


def load_heads(args: argparse.Namespace) -> "dict[str, LoadedHead]":
    """Return the heads of the command line by their columns."""
    from ldm_lab.curation.heads.head import load_head

    heads: dict[str, LoadedHead] = {}
    for name in head_names(args):
        column, source = split_name(name)
        loaded = load_head(source)
        column = column or loaded.head.column
        if column in heads:
            raise UserError(f"--head {name}: there is a column {column} already; name it otherwise: NAME={source}")
        heads[column] = loaded
    return heads


def summary(report: "PassReport") -> str:
    """Return a line that says what was scored and skipped. Raises UserError if nothing could be scored at all."""
    if not report.counts.used and not report.unreached:
        raise UserError(f"no image could be scored: {report.counts}")
    return f"{report.counts.used:,} images scored in {report.done:,} of {report.items:,} shards: {report.counts}"
