"""Attention by torch's fused kernels, wherever queries, keys and values come from."""

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v, [B, heads, L, d], for q [B, heads, L, d], k and v [B, heads, M, d].

    What a convolution has made has its pixels, not its features, side by side in memory. The fused kernels of GPUs take
    no such tensors, and torch would compute, and keep, the whole table of weights: there a copy is cheaper.

    A mask is bool and broadcasts to [B, heads, L, M], true where there is attention; None is everywhere.
    """
    if q.device.type == "cuda":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, L, d]
