"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020): any model of open_clip, as published.

open_clip builds the towers and knows where their weights are; importing it takes seconds, so that happens where it is
needed. What a config names is checked before (`open_clip_config`).
"""

import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.clip_tokens import SHOWN
from ldm_lab.conditioners.clip_preprocess import CLIPPreprocessing, normalize_pixels, transformed
from ldm_lab.conditioners.clip_tokenizers import CLIPTokenizer, HubTokenizer, adapted
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.conditioners.open_clip_config import (
    FAILURES,
    HUB,
    build_model,
    config_problems,
    download_pretrained,
    missing_pretrained,
    quiet,
    resolve_config,
)
from ldm_lab.config import check_options, register
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError, first_line

PREFIX = "clip."  # of open_clip's names in this module's state dict

log = logging.getLogger(__name__)


@register("conditioner", "clip")
class CLIP(EmbeddingConditioner):
    """CLIP by open_clip: embeddings of images in training, of texts or images in sampling.

    Attributes:
        embed_dim: D, the width of an embedding.
        text_size: L, positions of a tokenized text.
        preprocessing: what images have to look like.
    """

    trainable = False
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, *, model: str | None = None, pretrained: str | None = None, architecture: dict[str, Any] | None = None
    ) -> None:
        """Build the towers, untrained; `pretrained_path` finds the weights.

        Args:
            model: open_clip's name of an architecture, such as ViT-B-16, or hf-hub:OWNER/NAME, a repository that has
                the weights, too.
            pretrained: open_clip's name of weights for the model, such as openai or laion2b_s34b_b88k. It also says
                what images have to look like, so it is given along with a local copy of these weights, too.
            architecture: instead of a model's name what an `open_clip_config.json` has in it, for weights of your own:
                `model_cfg` of open_clip's own towers, and `preprocess_cfg` unless it is CLIP's.

        Raises:
            UserError: unknown names, an architecture that cannot be built, a repository that cannot be reached.
        """
        super().__init__()
        check_options(CLIP, model=model, pretrained=pretrained, architecture=architecture)
        import open_clip
        from open_clip.transform import PreprocessCfg

        config = resolve_config(model, pretrained, architecture)
        self.built_in = model if architecture is None and not model.startswith(HUB) else None
        self.clip = build_model(config, "architecture" if model is None else f"model: {model}")
        self.embed_dim = config["model_cfg"]["embed_dim"]
        self.text_cfg = config["model_cfg"]["text_cfg"]
        self.text_size = self.text_cfg.get("context_length", open_clip.CLIPTextCfg.context_length)
        self.preprocessing = CLIPPreprocessing(PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.clip)))
        self.register_buffer("pixel_mean", self.preprocessing.mean, persistent=False)  # [3]
        self.register_buffer("pixel_std", self.preprocessing.std, persistent=False)  # [3]

    @staticmethod
    def check(*, model: str | None, pretrained: str | None, architecture: dict[str, Any] | None) -> list[str]:
        """Return what is wrong across the options."""
        return config_problems(model, pretrained, architecture)

    @staticmethod
    def pretrained_path(config: dict[str, Any]) -> Path:
        """Return the file with a config's weights in the cache of open_clip, which downloads it at first use.

        Raises:
            UserError: the config names no published weights, or they cannot be downloaded.
        """
        model, pretrained = config.get("model"), config.get("pretrained")
        check_options(CLIP, model=model, pretrained=pretrained, architecture=config.get("architecture"))
        if model is None:
            raise UserError("conditioner.weights: has to be given, a file with the weights of this architecture")
        return download_pretrained(model, pretrained)

    @staticmethod
    def downloads(config: dict[str, Any]) -> list[Download]:
        """Return the file that `pretrained_path` would download, if it is not in open_clip's cache."""
        return missing_pretrained(config.get("model"), config.get("pretrained"))

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names of open_clip's models, old and new ones, as this module's state dict."""
        from open_clip.model import convert_to_custom_text_state_dict

        if any(name.startswith(PREFIX) for name in state):  # a file of ours
            return state
        expected, state = self.clip.state_dict(), dict(state)
        if "positional_embedding" in state and "positional_embedding" not in expected:
            state = convert_to_custom_text_state_dict(state)
        for name in ("logit_scale", "logit_bias"):  # of the contrastive loss; not in an embedding
            if name in expected and name in state and state[name].numel() == 1:
                state[name] = state[name].reshape(expected[name].shape)
        if "logit_bias" in expected:
            state.setdefault("logit_bias", torch.zeros_like(expected["logit_bias"]))
        position_ids = "text.transformer.embeddings.position_ids"  # of older transformers
        return {PREFIX + name: value for name, value in state.items() if name != position_ids or name in expected}

    # ------------------------------------------------------------------------------------------------- images

    @functools.cached_property
    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        """open_clip's own, to normalized pixels, [3, S, S]; transparent images are laid over white."""
        return partial(transformed, self.preprocessing.transform())

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the embeddings of normalized pixels [B, 3, S, S], [B, D], of any length."""
        return self.clip.encode_image(pixels)  # [B, D]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], unit rows."""
        pixels = self.normalize(self.preprocessing.resize((images + 1) / 2))  # [B, 3, S, S]
        return F.normalize(self.encode_pixels(pixels), dim=-1)  # [B, D]

    def normalize(self, images: Tensor) -> Tensor:
        """Return images in [0, 1], [B, 3, H, W], as the tower takes them."""
        return normalize_pixels(images, self.pixel_mean, self.pixel_std)  # [B, 3, H, W]

    # ------------------------------------------------------------------------------------------------- texts

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of token ids, int64 [n, L], [n, D], of any length."""
        return self.clip.encode_text(tokens)  # [n, D]

    def tokenize(self, texts: Sequence[str], warn: bool = False) -> Tensor:
        """Return token ids, int64 [n, L]; too long texts are cut, if `warn` with a line in the log for each."""
        for text in texts if warn else ():
            count, room = self.tokenizer.measure(text, self.text_size)
            if count > room:
                quoted = text if len(text) <= SHOWN else text[:SHOWN] + "..."
                log.warning("prompt %r is cut: it has %d tokens, of which %d fit", quoted, count, room)
        if not texts:
            return torch.zeros(0, self.text_size, dtype=torch.int64)  # [0, L]
        return self.tokenizer.ids(texts, self.text_size)  # [n, L]

    @functools.cached_property
    def tokenizer(self) -> CLIPTokenizer | HubTokenizer:
        """open_clip's tokenizer for this model; some of them are downloaded, none brings code."""
        import open_clip

        options = self.text_cfg.get("tokenizer_kwargs") or {}
        name = self.text_cfg.get("hf_tokenizer_name")
        try:
            with quiet():
                if self.built_in is not None:
                    return adapted(open_clip.get_tokenizer(self.built_in))
                if not name:
                    return adapted(open_clip.SimpleTokenizer(context_length=self.text_size, **options))
                mode = self.text_cfg.get("tokenizer_mode")
                return adapted(
                    open_clip.tokenizer.HFTokenizer(
                        name, context_length=self.text_size, tokenizer_mode=mode, trust_remote_code=False, **options
                    )
                )
        except FAILURES as error:
            raise UserError(
                f"conditioner: the tokenizer {name or 'of CLIP'} cannot be loaded ({first_line(error)})"
            ) from None
