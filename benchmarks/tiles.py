"""How far pictures that are decoded in tiles are from those decoded at once, and with how much memory.

    python benchmarks/tiles.py --autoencoder assets/quickstart/autoencoder.safetensors

For each side of a tile, of 255 levels: the mean difference of a pixel, and the largest difference in color of a
16-pixel block, where tiles are decoded by themselves and blended over a quarter of their side; and the largest
difference of a pixel as they are decoded by the autoencoder (`Autoencoder.tiled_decode`). Pictures are single drawings,
and sheets of drawings side by side. `--memory` instead measures the peak of a process on random weights of kl-f8 at
half its width, decoding at once and in tiles, each in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.checkpoints.parts import load_part
from ldm_lab.config import build
from ldm_lab.data.shapes import draw
from ldm_lab.errors import run_program
from ldm_lab.interfaces import Autoencoder
from ldm_lab.io.images import to_tensor
from ldm_lab.sampling.decode import decode_in_tiles

PICTURES = 2
DRAWING = 64  # pixels, on a sheet
VARIETY = 0.5
RANDOM = {"name": "kl_f8", "ch": 64}


class Apart(Autoencoder):
    """An autoencoder whose tiles are decoded by themselves."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.decode, self.downscale = autoencoder.decode, autoencoder.downscale


def pictures(size: int) -> dict[str, Tensor]:
    """Return [N, 3, size, size] in [-1, 1] of each kind."""
    many = size // DRAWING
    single = [to_tensor(draw(f"tiles/{i}", size, VARIETY)[0]) for i in range(PICTURES)]
    drawn = [to_tensor(draw(f"sheet/{i}", DRAWING, VARIETY)[0]) for i in range(PICTURES * many**2)]
    sheets = torch.stack(drawn).view(PICTURES, many, many, 3, DRAWING, DRAWING).permute(0, 3, 1, 4, 2, 5)
    return {"one drawing": torch.stack(single), "a sheet": sheets.reshape(PICTURES, 3, size, size)}


def levels(image: Tensor) -> Tensor:
    """Return an image [B, 3, H, W] in 255 levels."""
    return image.clamp(-1, 1) * 127.5  # [B, 3, H, W]


def peak(size: int, tile: int) -> float:
    """Return the memory in MiB that a process gains while it decodes [1, 4, size / 8, size / 8]; tile 0: at once."""
    autoencoder = build("autoencoder", RANDOM).eval()
    z = torch.randn(1, 4, size // 8, size // 8)  # [1, 4, h, w]
    with torch.no_grad():
        autoencoder.decode(z[:, :, :2, :2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        autoencoder.tiled_decode(z, tile // 8) if tile else autoencoder.decode(z)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--autoencoder",
        default="assets/quickstart/autoencoder.safetensors",
        metavar="FILE",
        help="default: %(default)s",
    )
    add("--size", type=int, default=256, metavar="N", help="of the pictures, pixels; default: %(default)s")
    add("--tiles", type=int, nargs="+", default=[32, 64, 128], metavar="N", help="pixels; default: 32 64 128")
    add("--memory", action="store_true", help="measure memory instead, with the first of --tiles")
    add("--once", type=int, metavar="TILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once is not None:
        print(f"{peak(args.size, args.once):.0f}")
        return
    if args.memory:
        for tile in (0, args.tiles[0]):
            command = [sys.executable, __file__, "--size", str(args.size), "--once", str(tile)]
            used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            print(f"{args.size} px, {f'tiles of {tile}' if tile else 'at once'}: {used} MiB", flush=True)
        return
    autoencoder = load_part("autoencoder", {"name": "kl_f8", "weights": args.autoencoder})
    print(f"{'of 255 levels':16}{'tile':>6}{'apart: pixel':>14}{'block':>8}{'as decoded: most':>18}")
    with torch.no_grad():
        for kind, images in pictures(args.size).items():
            z = autoencoder.encode(images)  # [N, C, h, w]
            whole = levels(autoencoder.decode(z))  # [N, 3, H, W]
            for pixels in args.tiles:
                tile = pixels // autoencoder.downscale
                apart, ours = (
                    levels(decode_in_tiles(way, z, tile, tile // 4)) - whole
                    for way in (Apart(autoencoder), autoencoder)
                )  # [N, 3, H, W] each
                block = F.avg_pool2d(apart, 16).abs().max()  # []
                print(f"{kind:16}{pixels:6}{apart.abs().mean():14.2f}{block:8.1f}{ours.abs().max():18.4f}", flush=True)


if __name__ == "__main__":
    run_program(main)
