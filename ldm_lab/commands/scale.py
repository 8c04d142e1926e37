"""Measure the standard deviation of an autoencoder's latents on your images, and store it with the weights.

    python -m ldm_lab scale --config configs/yfcc_cfg.yaml --out checkpoints/kl-f8-scaled.safetensors \\
        autoencoder.weights=kl-f8 data.shards='/data/yfcc/{00000..00009}.tar'

Diffusion expects latents of unit variance; those of kl-f8 have a standard deviation of 2 to 10, depending on the
images. Latents are divided by it. Where there are fewer images than asked for, those that are there are measured. An
autoencoder that was trained here brings its own.
"""

import argparse

from ldm_lab.commands._arguments import add_config_arguments, safetensors_file, whole_number
from ldm_lab.config import load
from ldm_lab.errors import UserError
from ldm_lab.progress import Bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser, "a config with sections data and autoencoder")
    add = parser.add_argument
    add("--out", type=safetensors_file, metavar="FILE", help="write the weights with it stored (.safetensors)")
    add("--batches", type=whole_number(1), default=32, metavar="N", help="batches to measure (%(default)s)")
    add("--batch-size", type=whole_number(1), default=64, metavar="N", help="images in a batch (%(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda:0, ... (default: the accelerator, if there is one)")


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write if asked to."""
    from ldm_lab.checkpoints.native import save_part  # not before: torch takes seconds, and --help needs none
    from ldm_lab.checkpoints.parts import load_part, read_part
    from ldm_lab.devices import pick_device
    from ldm_lab.training.scale import counted, image_batches, measure_scale
    from ldm_lab.training.start import check_encoding

    config = load(args.config, args.overrides)
    section = config.get("autoencoder")
    if section is None:
        raise UserError(f"{args.config}: has no section autoencoder")
    check_encoding(config, ["autoencoder"])
    autoencoder = load_part("autoencoder", section)
    if not section.get("weights") and any(True for _ in autoencoder.parameters()):
        raise UserError("autoencoder.weights: has to be given; an untrained autoencoder's latents say nothing")
    autoencoder.to(pick_device(args.device))
    before = ", ".join(f"{value:.4f}" for value in autoencoder.latent_std.flatten().tolist())
    wanted = args.batches * args.batch_size
    with Bar("measure", "image", wanted) as bar:
        batches = image_batches(config["data"], config.seed, args.batches, args.batch_size)
        std = measure_scale(autoencoder, counted(batches, bar))
    count = int(bar.n)
    if count < wanted:
        print(f"data: {wanted:,} images were asked for, all {count:,} that are there were measured")
    print(f"latent std {std:.4f} on {count:,} images (before: {before}); autoencoder.latent_std={std:.4f} uses it")
    if args.out is not None:
        autoencoder.set_latent_statistics(std=std)
        of_file = read_part(section["weights"], "autoencoder", section.name).config if section.get("weights") else {}
        save_part(args.out, autoencoder, {**of_file, **section}, {"scale_images": str(count)})
        print(f"{args.out}: the weights with this std")
