"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020): any model of open_clip, as published.

open_clip builds the towers and knows where their weights are; importing it takes seconds, so that happens where it is
needed. What a config names is checked before: of a model's own files only numbers, and names of open_clip's parts, are
taken, never a folder or code.
"""

import contextlib
import difflib
import functools
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_lab.clip_tokens import CLIP_VOCAB_SIZE, SHOWN
from ldm_lab.config import register
from ldm_lab.errors import UserError, first_line
from ldm_lab.interfaces import Batch
from ldm_lab.io.images import flatten_alpha

HUB = "hf-hub:"
PREFIX = "clip."  # of open_clip's names in this module's state dict
CONFIG_FILE = "open_clip_config.json"  # as open_clip calls it in a repository or folder
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODEL_KEYS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
)
FOREIGN = ("timm_", "hf_", "tokenizer_")  # what towers and tokenizers of other libraries are told
TOKENIZER_OPTIONS = ("clean", "strip_sep_token")  # others could switch on code of a repository
# What building an unheard-of architecture, or fetching a file, is known to raise.
FAILURES = (
    *(OSError, RuntimeError, ValueError, TypeError, AssertionError, LookupError),
    *(AttributeError, ArithmeticError, ImportError),
)

log = logging.getLogger(__name__)


@register("conditioner", "clip")
class CLIP(nn.Module):
    """CLIP by open_clip: embeddings of images in training, of texts or images in sampling.

    Attributes:
        embed_dim: D, the width of an embedding.
        image_size: height and width in pixels that the image tower sees.
        text_size: positions of a tokenized text.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, *, model: str | None = None, pretrained: str | None = None, architecture: dict[str, Any] | None = None
    ) -> None:
        """Build the towers, untrained; `published` finds the weights.

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
        problems = _problems(model, pretrained, architecture)
        if problems:
            raise UserError(f"conditioner.{problems[0]}")
        import open_clip

        config = _config(model, pretrained, architecture)
        self.built_in = model if architecture is None and not model.startswith(HUB) else None
        self.clip = _build(config, "architecture" if model is None else f"model: {model}")
        self.embed_dim = config["model_cfg"]["embed_dim"]
        self.text_cfg = config["model_cfg"]["text_cfg"]
        self.text_size = self.text_cfg.get("context_length", open_clip.CLIPTextCfg.context_length)
        self.preprocess_cfg = open_clip.get_model_preprocess_cfg(self.clip)
        size = self.preprocess_cfg["size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        for name in ("mean", "std"):
            values = torch.tensor(self.preprocess_cfg[name], dtype=torch.float32)  # [3], of images in [0, 1]
            self.register_buffer(f"pixel_{name}", values[:, None, None], persistent=False)  # [3, 1, 1]

    @staticmethod
    def check(section: dict[str, Any]) -> list[str]:
        """Return what is wrong across the keys of a config section."""
        keys = [section.get(key) for key in ("model", "pretrained", "architecture")]
        if section.get("weights") and keys == [None] * 3:  # a file of ours has them inside
            return []
        return _problems(*keys)

    @staticmethod
    def published(section: dict[str, Any]) -> Path:
        """Return the file with a section's weights in the cache of open_clip, which downloads it if it is not there.

        Raises:
            UserError: the section names no published weights, or they cannot be downloaded.
        """
        problems = CLIP.check(section)
        if problems:
            raise UserError(f"conditioner.{problems[0]}")
        model, pretrained = section.get("model"), section.get("pretrained")
        if model is None:
            raise UserError("conditioner.weights: has to be given, a file with the weights of this architecture")
        import open_clip

        if model.startswith(HUB):
            return _from_hub(model, None)
        if pretrained is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise UserError(
                f"conditioner.pretrained: has to be given (open_clip has {tags} for {model}), "
                "or conditioner.weights, a file"
            )
        try:
            with quiet():
                return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained)))
        except FAILURES as error:
            raise UserError(
                f"conditioner.pretrained: {model} {pretrained} cannot be downloaded ({first_line(error)}); "
                "conditioner.weights takes a local copy"
            ) from None

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names of open_clip's models, old and new ones, as this module's state dict."""
        from open_clip.model import convert_to_custom_text_state_dict

        if any(name.startswith(PREFIX) for name in state):  # a file of ours
            return state
        own, state = self.clip.state_dict(), dict(state)
        if "positional_embedding" in state and "positional_embedding" not in own:
            state = convert_to_custom_text_state_dict(state)
        for name in ("logit_scale", "logit_bias"):  # of the contrastive loss; not in an embedding
            if name in own and name in state and state[name].numel() == 1:
                state[name] = state[name].reshape(own[name].shape)
        if "logit_bias" in own:
            state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
        position_ids = "text.transformer.embeddings.position_ids"  # of older transformers
        return {PREFIX + name: value for name, value in state.items() if name != position_ids or name in own}

    # ---------------------------------------------------------------------------------------------- embeddings

    def from_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"embed": [B, D]}, the embeddings of a batch's images, [B, 3, H, W] in [-1, 1]."""
        return {"embed": self.encode_image(batch.image)}  # [B, D]

    def from_prompts(self, texts: list[str], images: list[Image.Image]) -> dict[str, Tensor]:
        """Return {"embed": [n, D]}, the embeddings of texts, then of images, which open_clip's transform prepares.

        Transparent images are laid over white; of a strip longer than 8 times its width only the middle is seen.
        """
        embeds = [self.pixel_mean.new_zeros(0, self.embed_dim)]  # [0, D]
        if texts:
            embeds.append(self.encode_text(texts))  # [n_texts, D]
        if images:
            pixels = torch.stack([self.transform(flatten_alpha(image)) for image in images])  # [n_images, 3, S, S]
            embeds.append(self.clip.encode_image(pixels.to(self.pixel_mean), normalize=True))  # [n_images, D]
        return {"embed": torch.cat(embeds)}  # [n, D]

    def null(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return zeros, [B, D], the unconditional input, for a condition of B rows."""
        return {name: torch.zeros_like(value) for name, value in cond.items()}  # [B, D]

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images [B, 3, H, W] in [-1, 1], [B, D], unit rows."""
        pixels = self.normalize(self.resize((images + 1) / 2))  # [B, 3, S, S]
        return self.clip.encode_image(pixels, normalize=True)  # [B, D]

    def encode_text(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, [n, D], unit rows; a text that is too long is cut with a warning."""
        tokens = self.tokenize(texts, warn=True).to(self.pixel_mean.device)  # [n, text_size]
        return self.clip.encode_text(tokens, normalize=True)  # [n, D]

    # ------------------------------------------------------------------------------------------- preprocessing

    def resize(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] of any size, [B, 3, H, W], as the tower's [B, 3, S, S], as the model was trained.

        What open_clip does to Pillow images, done to tensors: antialiased, clamped and rounded to 8 bits. The two
        differ, where a value lies between two levels of 255, by one level, bilinear by two (`tests/test_clip.py`).
        """
        from open_clip.transform import center_crop_or_pad

        mode, (height, width) = self.preprocess_cfg["resize_mode"], self.image_size
        ratios = images.shape[-2] / height, images.shape[-1] / width
        if mode == "squash":
            sides = [height, width]
        elif mode == "shortest" and height == width:  # torchvision cuts fractions off, open_clip rounds them
            sides = [int(height * side / min(images.shape[-2:])) for side in images.shape[-2:]]
        else:
            ratio = min(ratios) if mode == "shortest" else max(ratios)
            sides = [max(1, round(side / ratio)) for side in images.shape[-2:]]
        bilinear = self.preprocess_cfg["interpolation"] == "bilinear"
        for step in ([images.shape[-2], sides[1]], sides):  # as Pillow: rows, then columns, both rounded to 8 bits
            images = F.interpolate(images, step, mode="bilinear" if bilinear else "bicubic", antialias=True)
            images = (images * 255).round().clamp(0, 255) / 255  # [B, 3, ...]
        fill = self.preprocess_cfg["fill_color"] / 255
        return center_crop_or_pad(images, [height, width], fill=fill)  # [B, 3, S, S]

    def normalize(self, images: Tensor) -> Tensor:
        """Return images in [0, 1], [B, 3, H, W], with the model's mean taken off and its deviation divided out."""
        return (images - self.pixel_mean) / self.pixel_std  # [B, 3, H, W]

    @functools.cached_property
    def transform(self) -> Any:
        """open_clip's transform of a Pillow image to normalised pixels, [3, S, S]."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=False)

    # ------------------------------------------------------------------------------------------------- tokens

    def tokenize(self, texts: list[str], warn: bool = False) -> Tensor:
        """Return token ids, int64 [n, text_size]; too long texts are cut, if `warn` with a line in the log for each."""
        if warn:
            for text in texts:
                count, room = self._token_count(text)
                if count > room:
                    quoted = text if len(text) <= SHOWN else text[:SHOWN] + "..."
                    log.warning("prompt %r is cut: it has %d tokens, of which %d fit", quoted, count, room)
        if not texts:
            return torch.zeros(0, self.text_size, dtype=torch.int64)  # [0, text_size]
        return self.tokenizer(texts, context_length=self.text_size)  # [n, text_size]

    def _token_count(self, text: str) -> tuple[int, int]:
        """Return how many tokens a text has and how many there is room for, both as its tokenizer counts."""
        if hasattr(self.tokenizer, "encode"):  # CLIP's; start and end come on top
            return len(self.tokenizer.encode(text)), self.text_size - 2
        clean = getattr(self.tokenizer, "clean_fn", str)
        return len(self.tokenizer.tokenizer(clean(text)).input_ids), self.text_size

    @functools.cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer for this model; some of them are downloaded, none brings code."""
        import open_clip

        options = self.text_cfg.get("tokenizer_kwargs") or {}
        name = self.text_cfg.get("hf_tokenizer_name")
        try:
            with quiet():
                if self.built_in is not None:
                    return open_clip.get_tokenizer(self.built_in)
                if not name:
                    return open_clip.SimpleTokenizer(context_length=self.text_size, **options)
                mode = self.text_cfg.get("tokenizer_mode")
                return open_clip.tokenizer.HFTokenizer(
                    name, context_length=self.text_size, tokenizer_mode=mode, trust_remote_code=False, **options
                )
        except FAILURES as error:
            raise UserError(
                f"conditioner: the tokenizer {name or 'of CLIP'} cannot be loaded ({first_line(error)})"
            ) from None


# ------------------------------------------------------------------------------------------------ what a section says


def _problems(model: str | None, pretrained: str | None, architecture: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a section, each as "key: what"."""
    if (model is None) == (architecture is None):
        also = "in place of model; give one of them" if model is not None else "or model has to be given"
        return [f"architecture: {also}"] if model is not None else ["model: has to be given, such as ViT-B-16"]
    if architecture is not None:
        if pretrained is not None:
            return ["pretrained: belongs to one of open_clip's models, not to an architecture; weights takes a file"]
        return [f"architecture.{problem}" for problem in _config_problems(_nested(architecture))]
    if model.startswith(HUB):
        if not REPOSITORY.fullmatch(model.removeprefix(HUB)):
            return [f"model: {model!r} is no repository; write hf-hub:OWNER/NAME"]
        if pretrained is not None:
            return [f"pretrained: {model} brings its own weights"]
        return []
    import open_clip

    known = open_clip.list_models()
    if model not in known:
        folder = ". Folders are not taken: architecture and weights say what is in it" if ":" in model else ""
        return [f"model: open_clip has no {model!r}{folder}. {_nearest(model.replace('/', '-'), known)}"]
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        return []
    if not open_clip.is_pretrained_cfg(model, pretrained):
        return [
            f"pretrained: open_clip has no weights {pretrained!r} for {model}. {_nearest(pretrained, tags)} "
            "(a file goes into weights)"
        ]
    trained_with = bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu"))
    twin = f"{model}-quickgelu"
    if trained_with and twin in known and not open_clip.get_model_config(model).get("quick_gelu"):
        return [f"model: the weights {pretrained!r} were trained with QuickGELU: take {twin}"]
    return []


def _config(model: str | None, pretrained: str | None, architecture: dict[str, Any] | None) -> dict[str, Any]:
    """Return {"model_cfg": ..., "preprocess_cfg": ...} of a checked section."""
    import open_clip

    if architecture is not None:
        return _nested(architecture)
    if not model.startswith(HUB):
        published = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
        return {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": published}
    try:
        config = json.loads(_from_hub(model, CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"conditioner.model: {model}: its {CONFIG_FILE} is not readable") from None
    config = _nested(config) if isinstance(config, dict) else {"model_cfg": None}
    problems = _config_problems(config, open_clip.list_models())
    if problems:
        raise UserError(f"conditioner.model: {model}: {CONFIG_FILE}: {problems[0]}")
    return config


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an `open_clip_config.json`; that of an architecture's own JSON becomes its `model_cfg`."""
    return dict(config) if "model_cfg" in config else {"model_cfg": config}


def _config_problems(config: dict[str, Any], built_in: list[str] | None = None) -> list[str]:
    """Return what must not or cannot be in the content of an `open_clip_config.json`.

    Towers and tokenizers of other libraries are given by names, which could be those of folders or of code. Only a
    repository may have them, in a form that can be neither, and text towers only if `built_in` models have them, too.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    model = config.get("model_cfg")
    sections = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    if not isinstance(model, dict) or not all(isinstance(model.get(key), dict) for key in sections):
        return ["the sections vision_cfg and text_cfg have to be given"]
    if type(model.get("embed_dim")) is not int or model["embed_dim"] < 1:
        return [f"embed_dim: a positive whole number is needed, not {model.get('embed_dim')!r}"]
    allowed = {"": [*MODEL_KEYS, *(["multimodal_cfg"] if built_in else [])]}
    for key, kind in sections.items():
        names = [field.name for field in fields(kind)]
        allowed[f"{key}."] = [name for name in names if built_in or not name.startswith(FOREIGN)]
    problems = [
        f"{prefix}{key}: open_clip's own towers have no such key. {_nearest(key, known)}"
        for prefix, known in allowed.items()
        for key in (model[prefix[:-1]] if prefix else model)
        if key not in known
    ]
    preprocess = config.get("preprocess_cfg") or {}
    known = [field.name for field in fields(PreprocessCfg)]
    unknown = [key for key in preprocess if key not in known] if isinstance(preprocess, dict) else ["preprocess_cfg"]
    problems += [f"preprocess_cfg.{key}: no such key. Known: {', '.join(known)}." for key in unknown]
    if built_in is None:
        vocab_size = model["text_cfg"].get("vocab_size", CLIP_VOCAB_SIZE)
        if not isinstance(vocab_size, int) or vocab_size < CLIP_VOCAB_SIZE:
            problems.append(f"text_cfg.vocab_size: CLIP's tokenizer needs {CLIP_VOCAB_SIZE}, not {vocab_size!r}")
        return problems
    return problems + _foreign_problems(model, built_in)


def _foreign_problems(model: dict[str, Any], built_in: list[str]) -> list[str]:
    """Return which names and options of other libraries must not be in a repository's `model_cfg`."""
    import open_clip

    text, timm = model["text_cfg"], model["vision_cfg"].get("timm_model_name")
    towers = {open_clip.get_model_config(name)["text_cfg"].get("hf_model_name") for name in built_in}
    tower, tokenizer = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    options = text.get("tokenizer_kwargs") or {}
    problems = []
    if timm is not None and not re.fullmatch(r"[\w.]+", str(timm)):
        problems.append(f"vision_cfg.timm_model_name: {timm!r} is no model of timm's")
    if tower is not None and tower not in towers:
        problems.append(f"text_cfg.hf_model_name: {tower!r} is in none of open_clip's own models, and refused")
    if tokenizer and not (re.fullmatch(r"[\w-]+", str(tokenizer)) or REPOSITORY.fullmatch(str(tokenizer))):
        problems.append(f"text_cfg.hf_tokenizer_name: {tokenizer!r} is no repository")
    if not isinstance(options, dict) or any(key not in TOKENIZER_OPTIONS for key in options):
        problems.append(f"text_cfg.tokenizer_kwargs: only {' and '.join(TOKENIZER_OPTIONS)} are taken")
    return problems


def _nearest(given: str, known: list[str]) -> str:
    """Return "Nearest: ..." for an unknown name among many, whatever its case."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), folded, n=4, cutoff=0.5)
    if near:
        return f"Nearest: {', '.join(folded[name] for name in near)}."
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"Known: {', '.join(known[:12])}{more}." if known else "It has none."


# -------------------------------------------------------------------------------------------------- calling open_clip


def _build(config: dict[str, Any], what: str) -> nn.Module:
    """Return the untrained model of a checked config, on torch's default device."""
    import open_clip

    # A folder of our own is the one way to hand open_clip a config that is in none of its lists.
    with tempfile.TemporaryDirectory() as folder, quiet():
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        try:
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=torch.empty(0).device
            )
        except FAILURES as error:
            raise UserError(f"conditioner.{what}: open_clip cannot build it ({first_line(error)})") from None


def _from_hub(model: str, filename: str | None) -> Path:
    """Return a file of a repository, its weights by default, downloaded by open_clip if it is not in its cache."""
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        with quiet():
            return Path(download_pretrained_from_hf(model.removeprefix(HUB), filename=filename))
    except FAILURES as error:
        raise UserError(f"conditioner.model: {model} cannot be downloaded ({first_line(error)})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip's chatter off the terminal: it uses the root logger, and gives it a handler if it has none."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
