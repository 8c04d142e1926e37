"""Encode a data set once: latents and conditions to files, so that training skips the frozen networks.

    python -m ldm_lab cache --config configs/yfcc_cfg.yaml --out data/cache data.shards='/data/yfcc/{00000..00099}.tar'
    python -m ldm_lab cache --config configs/yfcc_cfg.yaml --out data/cache --devices 8 --precision bf16-mixed \\
        data.shards='/data/yfcc/{00000..00099}.tar' data.crop=random cache.crops=4 cache.flip=true

Then train with `cache.folder=data/cache` (which makes the cache itself if it is not there), or, without the images,
with `data: {name: cache, path: data/cache, batch_size: 64}`; the folder may lie on a web server or on the Hugging Face
Hub by then. Crops and flips of each image are fixed at the moment of encoding, and each epoch takes the next of them;
the posterior sample of its latent and the dropping of its conditions stay random. Interrupted, the same command goes on
with the shards that are not done. Under torchrun or SLURM each process takes its share of the shards.
"""

import argparse
import json

from ldm_lab.commands._arguments import add_config_arguments, add_pass_arguments, pass_options, whole_number
from ldm_lab.config import load
from ldm_lab.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser, "a diffusion config: its data and frozen parts")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the cache")
    add("--limit", type=whole_number(1), metavar="N", help="encode so many images, evenly spread (default: all)")
    add("--without-unreached", action="store_true", help="end the cache without shards that cannot be reached")
    add_pass_arguments(parser, whose="the encoders'", of_config=True)


def run(args: argparse.Namespace) -> int:
    """Encode, with a progress bar; say what was skipped. Returns 1 if some shards could not be reached."""
    from ldm_lab.data.cache import ENCODERS  # not before: it imports torch, which takes seconds
    from ldm_lab.training.caching import AGAIN, cache_options, make_cache, summary, unreached
    from ldm_lab.training.start import check_encoding

    own = [f"cache.folder={json.dumps(args.out)}"]
    own += [f"cache.precision={args.precision}"] if args.precision else []
    own += [f"cache.limit={args.limit}"] if args.limit else []
    config = load(args.config, [*args.overrides, *own])
    if config.task != "diffusion":
        raise UserError(f"{args.config}: a cache is made from a diffusion config, with its autoencoder and conditioner")
    check_encoding(config, ENCODERS)
    report = make_cache(config, pass_options(args, config["data"]), args.without_unreached)
    if report is None:  # another process of several
        return 0
    print(summary(cache_options(config).folder, report))
    if report.unreached:
        ended = "the cache is complete without them" if args.without_unreached else f"{AGAIN}, --without-unreached ends"
        print(f"{unreached(report)}; {ended}")
    return 1 if report.unreached and not args.without_unreached else 0
