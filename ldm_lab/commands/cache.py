"""Encode a data set once: latents and embeddings to files, so that training skips the frozen networks.

    python -m ldm_lab cache --config configs/quickstart.yaml --out data/quickstart_cache

Then train with `data: {name: cache, path: data/quickstart_cache, batch_size: 64}`. The crop (and flip) of each image is
fixed at the moment of encoding; the posterior sample of its latent and the dropping of its embedding stay random.
Interrupted, the same command goes on behind the last whole shard.
"""

import argparse
from typing import Any

import torch
from tqdm import tqdm

from ldm_lab.checkpoints.parts import load_part, weights_sha256
from ldm_lab.config import build, load
from ldm_lab.data.cache import CacheWriter, complete
from ldm_lab.data.datamodule import DataModule
from ldm_lab.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", required=True, metavar="YAML", help="a diffusion config: its data and frozen parts")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the cache")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda:0, ... (default: cuda if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Encode, with a progress bar; say what was skipped."""
    config = load(args.config, args.overrides)
    for role in ("autoencoder", "conditioner"):
        if not (config.get(role) or {}).get("weights"):
            raise UserError(f"{args.config}: {role}.weights has to be given; a cache is made with trained parts")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    parts = {role: load_part(role, config[role]).to(device) for role in ("autoencoder", "conditioner")}
    data = DataModule(build("data", config["data"]), seed=config.get("seed", 0), epochs=1)
    data.prepare_data()
    data.setup()
    writer = CacheWriter(args.out, description(config))
    if writer.state:
        data.load_rank_states([writer.state], 0)
    with tqdm(initial=writer.written, unit="image") as bar:
        for batch in data.train_dataloader():
            data.consumed(batch)
            if "image" not in batch:
                raise UserError("data: images are needed to make a cache, and this is one already")
            batch["image"] = batch["image"].to(device)  # [B, 3, H, W]
            mean, logvar = parts["autoencoder"].moments(batch["image"])  # [B, C, h, w] each
            tensors = {"mean": mean, "logvar": logvar, **parts["conditioner"].from_batch(batch)}
            half = {
                name: value.half() for name, value in tensors.items()
            }  # 11 bits are far below the posterior's noise
            writer.add(half, batch["text"], batch["key"], data.rank_state())
            bar.update(len(batch["key"]))
    writer.close()
    print(f"{args.out}: {complete(args.out):,} samples. {data.summary()}")


def description(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a cache is made with: the data, and the checksums of the parts that encode it."""
    checksums = {role: weights_sha256(config[role]) for role in ("autoencoder", "conditioner")}
    data = config["data"]
    return {"image_size": data["image_size"], "data": data, "seed": config.get("seed", 0), **checksums}
