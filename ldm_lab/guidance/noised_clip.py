"""The CLIP of GLIDE that compares texts with noised images (Nichol et al. 2022, arXiv 2112.10741, section 2.4;
openai/glide-text2im@69b5307), under its own parameter names: what `ldm_lab.guidance.clip` takes its gradient of.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.clip_tokens import CLIP_VOCAB_SIZE, tokenize
from ldm_lab.errors import UserError

PIXEL_MEAN = (122.77093945, 116.74601272, 104.09373519)  # of 8-bit levels
PIXEL_STD = (68.50053285, 66.63215831, 70.32316309)
LOGIT_SCALE = 100.0
IMAGE_ONLY, TEXT_ONLY = "blocks.input.w_t", "blocks.input.w_voc"  # tensors by which a tower's weights are recognized


class NoisedCLIP(nn.Module):
    """A text tower and an image tower whose image is noised and whose input is the time, too.

    Attributes:
        logit_scale: the factor of a cosine similarity in the logits (exp of what the original calls logit_scale).
        image_size: side of the images, pixels.
        timesteps: of the noise schedule that it was trained with; as GLIDE's, cosine betas.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 4,
        image_width: int = 768,
        image_layers: int = 12,
        text_width: int = 512,
        text_layers: int = 12,
        embed_dim: int = 512,
        head_width: int = 64,
        vocab_size: int = 65536,
        text_size: int = 77,
        timesteps: int = 1000,
        logit_scale: float = LOGIT_SCALE,
    ) -> None:
        """Build the towers; the defaults are those of the released weights."""
        super().__init__()
        self.image_size, self.timesteps = image_size, timesteps
        self.text_size, self.logit_scale = text_size, logit_scale
        self.image_encoder = Tower(
            ImageInput(image_size, patch_size, image_width, timesteps), image_width, image_layers, head_width, embed_dim
        )
        self.text_encoder = Tower(
            TextInput(vocab_size, text_size, text_width), text_width, text_layers, head_width, embed_dim, causal=True
        )

    def image_embedding(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the embeddings of noised images, [B, D], unit rows; differentiable in x.

        Args:
            x: [B, 3, S, S], alpha * image + sigma * noise with the image in [-1, 1]; not clamped.
            t: [B] in [0, 1]; (i + 1) / timesteps is the original's timestep i, and others go to the nearest.

        Raises:
            UserError: images of another size.
        """
        self.check_size(*x.shape[2:])
        index = (t.float() * self.timesteps - 1).round().long().clamp(0, self.timesteps - 1)  # [B]
        embedding: Tensor = self.image_encoder(x.float(), index)  # [B, D]
        return embedding

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError for images of another size than it sees."""
        side = self.image_size
        if (height, width) != (side, side):
            raise UserError(f"CLIP guidance: the noised CLIP sees {side}x{side} pixels, not {width}x{height}")

    def text_embedding(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, [n, D], unit rows; a text that is too long is cut with a warning."""
        tokens = tokenize(texts, self.text_size, warn=True)  # [n, L]
        device = next(self.text_encoder.parameters()).device
        return self.token_embedding(tokens.to(device))  # [n, D]

    def token_embedding(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of CLIP's token ids, int64 [n, L]: start, text, end, zeros; [n, D], unit rows."""
        embedding: Tensor = self.text_encoder(tokens, last_end(tokens))  # [n, D]
        return embedding


def last_end(tokens: Tensor) -> Tensor:
    """Return the position of each text's last end token, [n]: a user may have written one out inside a text."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)  # [L]
    return torch.where(tokens == CLIP_VOCAB_SIZE - 1, positions, 0).amax(1)  # [n]


class Tower(nn.Module):
    """One encoder: `blocks.input`, `blocks.block_0` ..., `blocks.output`."""

    def __init__(
        self, first: nn.Module, width: int, layers: int, head_width: int, embed_dim: int, causal: bool = False
    ) -> None:
        super().__init__()
        blocks = {f"block_{i}": Block(width, width // head_width, causal) for i in range(layers)}
        self.blocks = nn.ModuleDict({"input": first, **blocks, "output": Output(width, embed_dim)})

    def forward(self, inputs: Tensor, index: Tensor) -> Tensor:
        """Return unit rows, [B, D]; `index` [B] is the image's timestep, or the position of a text's end."""
        *layers, output = self.blocks.values()
        position = index if isinstance(layers[0], TextInput) else torch.zeros_like(index)  # [B]
        x = layers[0](inputs, index)  # [B, L, w]
        for block in layers[1:]:
            x = block(x)  # [B, L, w]
        rows: Tensor = output(x[torch.arange(len(x), device=x.device), position])  # [B, D]
        return rows


class TextInput(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, vocab_size: int, text_size: int, width: int) -> None:
        super().__init__()
        self.w_voc = nn.Parameter(torch.randn(vocab_size, width) * 0.02)  # [V, w]
        self.w_pos = nn.Parameter(torch.randn(text_size, width) * 0.01)  # [L, w]

    def forward(self, tokens: Tensor, index: Tensor) -> Tensor:
        """Return [n, L, w] for int64 [n, L]; `index` is not used."""
        return F.embedding(tokens, self.w_voc) + self.w_pos[: tokens.shape[1]]  # [n, L, w]


class ImageInput(nn.Module):
    """A row for the timestep, then the patches, and embeddings of their positions."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, patch_size: int, width: int, timesteps: int) -> None:
        super().__init__()
        positions = (image_size // patch_size) ** 2 + 1
        self.patch_size = patch_size
        self.w_t = nn.Parameter(torch.randn(timesteps, width) * 0.02)  # [T, w]
        self.w_pos = nn.Parameter(torch.randn(positions, width) * 0.01)  # [L, w]
        self.patch_proj = nn.Parameter(torch.randn(width, 3, patch_size, patch_size) / (patch_size * math.sqrt(3)))
        self.ln = Norm(width)
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)  # [3, 1, 1]
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)  # [3, 1, 1]

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, 3, S, S], about in [-1, 1], and timesteps [B]."""
        pixels = ((x + 1) * 127.5 - self.mean) / self.std  # [B, 3, S, S]
        patches = F.conv2d(pixels, self.patch_proj, stride=self.patch_size)  # [B, w, S / p, S / p]
        rows = torch.cat([self.w_t[index][:, None], rearrange(patches, "b w i j -> b (i j) w")], dim=1)  # [B, L, w]
        normalized: Tensor = self.ln(rows + self.w_pos)  # [B, L, w]
        return normalized


class Block(nn.Module):
    """Attention and MLP, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.f_attn = Attention(width, heads, causal)
        self.f_mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        x = x + self.f_attn(x)  # [B, L, w]
        x = x + self.f_mlp(x)  # [B, L, w]
        return x


class Attention(nn.Module):
    """Attention among all positions, or of each to those before it; keys have no bias."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.ln = Norm(width)
        self.f_q, self.f_k, self.f_v = Affine(width, width), Affine(width, width, bias=False), Affine(width, width)
        self.f_c = Affine(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        x = self.ln(x)  # [B, L, w]
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.heads) for f in (self.f_q, self.f_k, self.f_v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [B, H, L, d]
        x = self.f_c(rearrange(attended, "b h l d -> b l (h d)"))  # [B, L, w]
        return x


class MLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f_1, self.f_2 = Affine(width, 4 * width), Affine(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, L, w] for x [B, L, w]."""
        x = self.f_2(F.gelu(self.f_1(self.ln(x))))  # [B, L, w]
        return x


class Output(nn.Module):
    """The last norm and projection, to unit length."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.ln = Norm(width)
        self.f = Affine(width, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return unit rows, [B, D], for x [B, w]."""
        x = self.f(self.ln(x))  # [B, D]
        unit: Tensor = x / (x.norm(dim=-1, keepdim=True) + 1e-12)  # [B, D]
        return unit


class Norm(nn.Module):
    """Layer normalization with the original's names for gain and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))  # [w] each

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., w] for x [..., w]."""
        return F.layer_norm(x.float(), self.g.shape, self.g.float(), self.b.float()).to(x.dtype)  # [..., w]


class Affine(nn.Module):
    """A linear layer with the original's names for weight and bias."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width_out, width_in) / math.sqrt(width_in))  # [out, in]
        self.b = nn.Parameter(torch.zeros(width_out)) if bias else None  # [out]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., width_out] for x [..., width_in]."""
        return F.linear(x, self.w, self.b)  # [..., width_out]
