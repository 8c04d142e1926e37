"""Average the embeddings of images by their score: what `sample.py --aesthetic` leads prompts along.

    python -m ldm_lab score --shards 'data/*.tar' --out scores --head mine.safetensors --embeddings
    python -m ldm_lab rating-embeddings --scores 'scores/*.scores.parquet' --column mine --out ratings.safetensors
    python sample.py --checkpoint F "a lighthouse" --aesthetic 9 --aesthetic-embeddings ratings.safetensors

Rating k is the mean over all images with k <= score < k + 1, for k from 0 to 9, divided by its length. The embeddings
are looked for beside the scores. Give the scores of a head for the embeddings of the model's own conditioner.
"""

import argparse
import glob
from pathlib import Path

from ldm_lab.commands._arguments import safetensors_file
from ldm_lab.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("--scores", nargs="+", required=True, metavar="PARQUET", help="of `score --embeddings`; globs are possible")
    add("--column", default="aesthetic", metavar="NAME", help="the score (%(default)s)")
    add("--out", type=safetensors_file, required=True, metavar="FILE", help="the rating embeddings (.safetensors)")


def run(args: argparse.Namespace) -> None:
    """Average, write, print how many images each rating has."""
    from ldm_lab.checkpoints import embedders
    from ldm_lab.curation.scoring.files import EMBEDDINGS, SCORES, read_column, read_embeddings
    from ldm_lab.curation.scoring.rating_means import BucketMeans
    from ldm_lab.sampling.aesthetic import RatingEmbeddings

    files = [Path(path) for pattern in args.scores for path in sorted(glob.glob(pattern)) or [pattern]]
    means, embedder = None, None
    for file in files:
        keys, scores = read_column(file, args.column)
        path = file.with_name(file.name.removesuffix(SCORES) + EMBEDDINGS)
        embeds, named, theirs = read_embeddings(path)
        if named != keys:
            raise UserError(f"{path}: its images are others than those of {file}; score them again with --embeddings")
        if embedder is None:
            means, embedder = BucketMeans(embeds.shape[1]), theirs
        embedders.check_same(str(path), theirs, embedder)
        means.add(embeds, scores)
    found = means.means()
    if not found:
        raise UserError(
            f"no image has a score from 0 to 10: {means.below} below, {means.above} above, {means.missing} none"
        )
    facts = {"column": args.column, "counts": means.counts.tolist()}
    RatingEmbeddings(found, embedder, facts).save(args.out)
    for rating, count in enumerate(means.counts):
        print(f"{rating}-{rating + 1}: {count:,}" + ("" if count else " (no embedding)"))
    print(f"below 0: {means.below:,}, from 10 on: {means.above:,}, without a score: {means.missing:,}")
    print(f"{args.out}: {len(found)} rating embeddings of {embedders.describe(embedder)}")
