"""What training GLIDE takes of memory: weights, gradients, optimizer, average, and what is kept for the backward pass.

    python benchmarks/glide_memory.py
    python benchmarks/glide_memory.py configs/glide_finetune_upsampler.yaml --batch-size 2

Computed on the meta device, where tensors have sizes but no content: no GPU and none of that memory is needed. The
backward pass also needs, for a short time, what a single block keeps; its own column gives the largest block's.
"""

import argparse
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.config import build, load
from ldm_lab.denoisers.glide_layers import AttentionBlock, ResBlock, TextBlock
from ldm_lab.denoisers.glide_unet import GlideUNet
from ldm_lab.errors import run_program

GIB = 2**30


def kept(net: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, beside the parameters."""
    own, seen = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage, storage.nbytes())  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(*inputs)
    return sum(size for _, size in seen.values())


def with_blocks_alone(net: GlideUNet, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Return what is kept if each block keeps its inputs alone, and the most that one block keeps of its own."""
    inputs, largest = {}, 0
    blocks = [m for m in net.modules() if isinstance(m, ResBlock | AttentionBlock | TextBlock)]

    def before(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal largest
        for value in args:
            inputs[value.untyped_storage()._cdata] = value
        if block not in measured:
            measured.add(block)
            largest = max(largest, kept(block, tuple(value.detach().requires_grad_() for value in args)))

    measured: set[nn.Module] = set()
    hooks = [block.register_forward_pre_hook(before) for block in blocks]
    net(**batch)
    for hook in hooks:
        hook.remove()
    return sum(value.untyped_storage().nbytes() for value in inputs.values()), largest


def main() -> None:
    """Parse the command line, compute, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default="configs/glide_finetune_base.yaml", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images; default: %(default)s")
    args = parser.parse_args()
    missing = OmegaConf.missing_keys(OmegaConf.load(args.config))
    config = load(args.config, [f"{key}=somewhere" for key in missing])
    text = build("conditioner", {key: value for key, value in config["conditioner"].items() if key != "dropout"})
    size, sources = config["data"]["image_size"], build_sources(config.condition_sources)
    with torch.device("meta"):
        net = build(
            "denoiser", {**config["denoiser"], "gradient_checkpointing": False}, 3, given_conditions(text, sources)
        )
        batch = {
            "x": torch.zeros(args.batch_size, 3, size, size),
            "time": torch.zeros(args.batch_size),
            "token_ids": torch.zeros(args.batch_size, text.text_size, dtype=torch.int64),
            "token_ids_mask": torch.zeros(args.batch_size, text.text_size, dtype=torch.bool),
        }
        if "low_res" in net.spec:
            side = size // net.spec["low_res"].scale_factor
            batch["low_res"] = torch.zeros(args.batch_size, 3, side, side)
        whole = kept(net, tuple(batch.values()))
        inputs, largest = with_blocks_alone(net, batch)
    weights = sum(p.numel() for p in net.parameters()) * 4
    print(f"{args.config}, {weights // 4:,} parameters, {args.batch_size} x {size} px, GiB in float32")
    fixed = {"weights": weights, "gradients": weights, "AdamW 32bit": 2 * weights, "average": weights}
    for name, amount in fixed.items():
        print(f"  {name:34}{amount / GIB:8.2f}")
    print(f"  {'AdamW 8bit, in its place':34}{weights / 2 / GIB:8.2f}")
    print(f"  {'kept for the backward pass':34}{whole / GIB:8.2f}")
    print(f"  {'  with gradient_checkpointing':34}{inputs / GIB:8.2f}  and {largest / GIB:.2f} in the largest block")
    total = sum(fixed.values())
    print(f"  {'in all':34}{(total + whole) / GIB:8.2f}")
    print(f"  {'  with gradient_checkpointing':34}{(total + inputs + largest) / GIB:8.2f}")


if __name__ == "__main__":
    run_program(main)
