"""The histogram of the images in local shards, with thumbnails of some of them."""

import base64
import io
from collections import Counter
from random import Random

from ldm_lab.curation.buckets import Buckets
from ldm_lab.curation.metadata.histogram import Histogram, Shown
from ldm_lab.data.sample_metadata import metadata_of, read_scores, scores_path
from ldm_lab.data.samples import RawSample, caption_of
from ldm_lab.data.shard_urls import expand
from ldm_lab.data.tar import read_shard
from ldm_lab.errors import UserError
from ldm_lab.io.images import BadImage, decode_image, to_rgb
from ldm_lab.progress import Bar
from ldm_lab.rules.names import Names
from ldm_lab.rules.sample import NO_NAMES, SampleRow

THUMBNAIL = 160  # pixels, both sides at most


def histogram_of_shards(
    shards: list[str],
    quantity: str,
    buckets: Buckets,
    shown: int,
    scores: str | None = None,
    seed: int = 0,
    names: Names = NO_NAMES,
) -> tuple[Histogram, Counter]:
    """Return the histogram of shards, and how many images and shards could not be shown or read, by reason.

    Args:
        shards: patterns, as in `data.shards`.
        scores: the ending of Parquet files beside the shards, as in `data.scores`.
        shown: images to draw per bucket.
        names: which column of the json or the scores holds which quantity, where a doubt may be.
    """
    random = Random(seed)
    counts: Counter[int | None] = Counter()
    drawn: dict[int, list[tuple[float, RawSample]]] = {}
    skipped = Counter[str]()
    addresses = expand(shards)
    bar = Bar("shards", "shard", len(addresses))
    for address in addresses:
        beside = {}
        if scores is not None:
            try:
                beside = read_scores(scores_path(address, scores))
            except OSError as error:
                raise UserError(
                    f"--scores: {scores_path(address, scores)}: not a readable Parquet file ({error})"
                ) from None
        for item in read_shard(address):
            if not isinstance(item, RawSample):
                skipped[item.reason] += 1
                continue
            row = SampleRow(metadata_of(item), before=beside.get(item.key), names=names)
            score = row.number(quantity).value
            place = None if score is None else int(buckets.places([score])[0])
            counts[place] += 1
            if place is None or not 0 < place <= len(buckets.names):
                continue
            chosen = drawn.setdefault(place, [])  # a reservoir: each image of the bucket has the same chance
            if len(chosen) < shown:
                chosen.append((score, item))
            elif (rank := random.randrange(counts[place])) < shown:
                chosen[rank] = (score, item)
        bar.update()
    bar.close()
    histogram = Histogram.of(buckets, dict(counts))
    for place, chosen in drawn.items():
        for score, item in chosen:
            try:
                image = thumbnail(item.image or b"")
            except BadImage as problem:
                skipped[str(problem)] += 1
                continue
            histogram.shown.setdefault(buckets.names[place - 1], []).append(Shown(score, image, caption_of(item).first))
    return histogram, skipped


def thumbnail(data: bytes) -> str:
    """Return a small JPEG of an encoded image, as a data: address. Raises BadImage."""
    image = to_rgb(decode_image(data))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
