"""Encode a data set once: latents and embeddings to files, so that training skips the frozen networks.

    python -m ldm_lab cache --config configs/quickstart.yaml --out data/shapes_cache

Then train with `data.name=cache data.path=data/shapes_cache`. The crop (and flip) of each image is fixed at the
moment of encoding; the posterior sample of its latent and the dropping of its embedding stay random.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="YAML", help="a diffusion config: its data and frozen parts")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the cache")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")
