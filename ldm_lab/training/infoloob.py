"""The CLOOB loss: InfoLOOB on embeddings that are retrieved from modern Hopfield networks.

Fürst et al. 2022, "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP" (arXiv 2110.11316).
"""

import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ldm_lab.config import PositiveFloat, register

MAX_INV_TAU = 100.0


def retrieve(stored: Tensor, queries: Tensor, beta: float) -> Tensor:
    """Return what a modern Hopfield network gives for some queries: unit rows, [N, D] (arXiv 2110.11316, eq. 2).

    Args:
        stored: patterns, [M, D], unit rows.
        queries: state patterns, [N, D], unit rows.
        beta: inverse temperature; the larger, the nearer to the one pattern that is most alike.
    """
    retrieved = torch.softmax(beta * queries @ stored.T, dim=1) @ stored  # [N, D]
    return retrieved / retrieved.norm(dim=1, keepdim=True)  # [N, D]


def infoloob(anchors: Tensor, samples: Tensor, inv_tau: float | Tensor) -> Tensor:
    """Return InfoLOOB, a scalar: row i of both belong together (arXiv 2110.11316, eq. 9).

    Unlike InfoNCE, the positive pair is left out of the denominator, so that it never saturates; the value can be
    negative. Both are [N, D] with N >= 2 and unit rows.
    """
    logits = inv_tau * anchors @ samples.T  # [N, N]
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)  # [N, N]
    others = logits.masked_fill(diagonal, -math.inf).logsumexp(dim=1)  # [N]
    return others.mean() - logits.diagonal().mean()


@register("loss", "infoloob")
class CLOOBLoss(nn.Module):
    """InfoLOOB over the pairs of all devices, on embeddings retrieved from each other (or as they are)."""

    def __init__(
        self,
        *,
        inv_tau: PositiveFloat = 30.0,
        scale_hopfield: PositiveFloat | None = 15.0,
        learn_inv_tau: bool = False,
        convention: Literal["cloob_training", "ml_jku"] = "cloob_training",
    ) -> None:
        """Set the temperatures.

        Args:
            inv_tau: inverse temperature of InfoLOOB; where training starts if it is learned.
            scale_hopfield: inverse temperature of the retrieval. null: no retrieval, InfoLOOB of the embeddings
                themselves, which brings text and image closer together where images are easily told apart.
            learn_inv_tau: train its logarithm, kept within [0, ln 100].
            convention: "cloob_training" takes half of the sum of both directions; "ml_jku", the paper's own program,
                the sum divided by inv_tau. They differ by the factor inv_tau / 2.
        """
        super().__init__()
        self.scale_hopfield, self.convention = scale_hopfield, convention
        self.log_inv_tau = nn.Parameter(torch.tensor(math.log(inv_tau)), requires_grad=learn_inv_tau)  # []
        self.fixed_inv_tau = None if learn_inv_tau else inv_tau  # exp(log(30)) would be 29.999998

    @staticmethod
    def check(*, inv_tau: float, learn_inv_tau: bool) -> list[str]:
        """Return what is wrong across the options."""
        if learn_inv_tau and not 1 <= inv_tau <= MAX_INV_TAU:
            return [f"inv_tau: {inv_tau} is outside 1..{MAX_INV_TAU:g}, where a learned one is kept"]
        return []

    @property
    def inv_tau(self) -> float | Tensor:
        """The inverse temperature of InfoLOOB."""
        return self.log_inv_tau.exp() if self.fixed_inv_tau is None else self.fixed_inv_tau

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the loss, a scalar, of embeddings [N, D] with unit rows, N >= 2; row i of both belong together."""
        both = self._one_way(image, text) + self._one_way(text, image)
        return both / 2 if self.convention == "cloob_training" else both / self.inv_tau

    def _one_way(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Return InfoLOOB of [N, D] and [N, D], both retrieved from the anchors if there is a retrieval."""
        beta = self.scale_hopfield
        if beta is not None:
            anchors, others = retrieve(anchors, anchors, beta), retrieve(anchors, others, beta)  # [N, D] each
        return infoloob(anchors, others, self.inv_tau)

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring a learned temperature back into its range; to be called after each optimizer step."""
        self.log_inv_tau.clamp_(0, math.log(MAX_INV_TAU))


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [world_size * B, D], in rank order, on every rank; gradients flow back to theirs.

    Each rank then computes the same loss of the whole batch. Going back, a row collects the gradients that all
    world_size copies of the loss have for it; DDP's mean over ranks takes that factor out again, so that parameters
    end with the gradients of a single process with the whole batch.
    """
    if not dist.is_available() or not dist.is_initialized():
        return rows
    return GatherRows.apply(rows)  # [world_size * B, D]


class GatherRows(torch.autograd.Function):
    """The rows of all ranks; going back, each rank gets the sum over ranks of what they have for its rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        """Return [world_size * B, D] for [B, D], in rank order."""
        rows = rows.contiguous()  # [B, D]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]  # [B, D] each
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)  # [world_size * B, D]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        """Return the gradient of this rank's rows, [B, D]."""
        total = gradient.clone(memory_format=torch.contiguous_format)  # [world_size * B, D]
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]  # [B, D]
