"""What a training step costs beside the plain way in which cloob-latent-diffusion's original does it.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --base-channels 192 --batch-size 64 --precision bf16 --compile blocks

Forward pass (with the loss), backward pass, optimizer and average, each timed by itself on the same batch of latents
and embeddings. The plain way: the same network with its attention written out, AdamW's loop over the tensors, an
average that multiplies and adds tensor by tensor. Both take turns in one process; times are the shortest, ratios the
medians over the rounds. The first gradients of both are compared.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab import ema
from ldm_lab.conditions import Embedding
from ldm_lab.config import build
from ldm_lab.denoisers.ccld_unet import SelfAttention
from ldm_lab.errors import run_program
from ldm_lab.interfaces import Denoiser
from ldm_lab.training.compiling import compile_network

PARTS = ("forward", "backward", "optimizer", "average")
EMBED = 512  # width of an embedding
DECAY = 0.999


class PlainAttention(nn.Module):
    """Attention as the original has it: the whole table of weights, and a softmax over it."""

    def __init__(self, ours: SelfAttention) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv_proj, self.out_proj = ours.heads, ours.norm, ours.qkv_proj, ours.out_proj

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return [B, c, h, w] for x [B, c, h, w]; `cond` is not used."""
        n, c, h, w = x.shape
        qkv = self.qkv_proj(self.norm(x))  # [B, 3c, h, w]
        qkv = qkv.view(n, self.heads * 3, c // self.heads, h * w).transpose(2, 3)  # [B, 3 heads, hw, d]
        q, k, v = qkv.chunk(3, dim=1)  # [B, heads, hw, d] each
        scale = k.shape[3] ** -0.25
        weights = ((q * scale) @ (k.transpose(2, 3) * scale)).softmax(3)  # [B, heads, hw, hw]
        y = (weights @ v).transpose(2, 3).contiguous().view(n, c, h, w)  # [B, c, h, w]
        return x + self.out_proj(y)  # [B, c, h, w]


def made_plain(network: Denoiser) -> Denoiser:
    """Return a copy of a network that computes the same in the original's way."""
    plain = copy.deepcopy(network)
    for block in plain.block_modules():
        if isinstance(block, SelfAttention):
            block.forward = PlainAttention(block).forward
    return plain


class Way:
    """One way of making a step."""

    def __init__(self, network: Denoiser, plain: bool, args: argparse.Namespace) -> None:
        self.network, self.plain = network, plain
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.objective = build("objective", {"name": "v_cosine"})
        self.average = ema.averaged_copy(network)
        self.pairs = ema.Pairs(self.average, network)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        options = build("optim", {"lr": 3e-5})
        self.optimizer = (
            torch.optim.AdamW(self.trained, 3e-5, weight_decay=0.01) if plain else options.optimizer(network)
        )
        self.loss = torch.zeros(())

    def forward(self, batch: tuple[Tensor, ...]) -> None:
        """Compute the loss of x0 [B, C, h, w], embeddings [B, D], t [B] and noise [B, C, h, w]."""
        x0, embed, t, noise = batch
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            self.loss = self.objective.loss_terms(self.network, x0, {"embed": embed}, t, noise)["loss"].mean()

    def backward(self) -> None:
        """Compute the gradients."""
        self.optimizer.zero_grad()
        self.loss.backward()

    def update_average(self) -> None:
        """Move the average toward the network."""
        if not self.plain:
            self.pairs.update(DECAY)
            return
        with torch.no_grad():
            averages = dict(self.average.named_parameters())
            for name, parameter in self.network.named_parameters():
                averages[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    def timed(self, part: Callable[[], None]) -> float:
        """Return the seconds that a part of a step takes."""
        self.wait()
        begin = time.perf_counter()
        part()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, batch: tuple[Tensor, ...]) -> list[float]:
        """Make a step; return the seconds of its PARTS."""
        parts = (lambda: self.forward(batch), self.backward, self.optimizer.step, self.update_average)
        return [self.timed(part) for part in parts]


def measure(args: argparse.Namespace) -> tuple[list[list[float]], list[list[float]], float]:
    """Return the seconds of all parts in all rounds, of the plain way and ours, and how far gradients differ."""
    torch.manual_seed(0)
    section = {"name": "ccld_unet", "base_channels": args.base_channels, "head_width": min(64, args.base_channels)}
    network = build("denoiser", section, 4, {"embed": Embedding(EMBED)}).to(args.device)
    batch = (
        torch.randn(args.batch_size, 4, args.size, args.size, device=args.device),
        F.normalize(torch.randn(args.batch_size, EMBED, device=args.device), dim=1),
        torch.rand(args.batch_size, device=args.device),
        torch.randn(args.batch_size, 4, args.size, args.size, device=args.device),
    )
    plain, ours = Way(made_plain(network), True, args), Way(network, False, args)
    if args.compile != "none":
        compile_network(ours.network, args.compile)
    for way in (plain, ours):
        way.forward(batch)  # kernels are chosen, and perhaps compiled
        way.backward()
    norms = [torch.stack([p.grad.norm() for p in way.trained]) for way in (plain, ours)]  # [n] each
    apart = float((norms[0] - norms[1]).norm() / norms[0].norm())
    for way in (plain, ours):
        way.step(batch)  # the optimizer's states are made
    rounds = [(plain.step(batch), ours.step(batch)) for _ in range(args.rounds)]
    return [one for one, _ in rounds], [other for _, other in rounds], apart


def main() -> None:
    """Parse the command line, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--device", default="cpu", metavar="NAME", help="default: %(default)s")
    add("--base-channels", type=int, default=32, metavar="N", help="192 is the released size; default: %(default)s")
    add("--size", type=int, default=32, metavar="N", help="height and width of the latents; default: %(default)s")
    add("--batch-size", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--rounds", type=int, default=6, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=None, metavar="N", help="of the CPU; default: torch's choice")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    add("--compile", choices=("none", "blocks", "model"), default="none", help="ours; default: %(default)s")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plain, ours, apart = measure(args)
    print(f"norms of gradients differ by {apart:.1e} of themselves")
    print(f"{'part':12}{'plain ms':>12}{'ours ms':>12}{'ratio':>9}")
    rows = [(name, [r[i] for r in plain], [r[i] for r in ours]) for i, name in enumerate(PARTS)]
    rows.append(("step", [sum(r) for r in plain], [sum(r) for r in ours]))
    for name, before, now in rows:
        ratio = statistics.median(n / b for n, b in zip(now, before))
        print(f"{name:12}{min(before) * 1e3:12.1f}{min(now) * 1e3:12.1f}{ratio:9.3f}", flush=True)


if __name__ == "__main__":
    run_program(main)
