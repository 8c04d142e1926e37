"""Encode a data set once: latents and embeddings to files, so that training skips the frozen networks.

    python -m ldm_lab cache --config configs/yfcc_cfg.yaml --out data/cache data.shards='/data/yfcc/{00000..00099}.tar'

Then train with `cache.folder=data/cache` (which makes the cache itself if it is not there), or, without the images,
with `data: {name: cache, path: data/cache, batch_size: 64}`. The crop (and flip) of each image is fixed at the moment
of encoding; the posterior sample of its latent and the dropping of its embedding stay random. Interrupted, the same
command goes on behind the last whole shard.
"""

import argparse
from pathlib import Path

from ldm_lab.commands._arguments import add_imports_argument
from ldm_lab.config import load
from ldm_lab.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    parser.add_argument("--config", required=True, metavar="YAML", help="a diffusion config: its data and frozen parts")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the cache")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda:0, ... (default: cuda if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")


def run(args: argparse.Namespace) -> None:
    """Encode, with a progress bar; say what was skipped."""
    from ldm_lab.data.cache import ENCODERS  # not before: it imports torch, which takes seconds
    from ldm_lab.training.caching import make_cache
    from ldm_lab.training.start import check_encoding

    config = load(args.config, args.overrides)
    if config.task != "diffusion":
        raise UserError(f"{args.config}: a cache is made from a diffusion config, with its autoencoder and conditioner")
    check_encoding(config, ENCODERS)
    print(make_cache(config, Path(args.out), args.device))
