"""What may be asked of open_clip, and the asking: names of models, hub configs, downloads.

Of a model's own files only numbers, and names of open_clip's parts, are taken, never a folder or code.
"""

import contextlib
import difflib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_lab.clip_tokens import CLIP_VOCAB_SIZE
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError, first_line

HUB = "hf-hub:"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip calls them there
CONFIG_FILE = "open_clip_config.json"  # as open_clip calls it in a repository or folder
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
MODEL_KEYS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
)
THIRD_PARTY = ("timm_", "hf_", "tokenizer_")  # what towers and tokenizers of other libraries are configured by
TOKENIZER_OPTIONS = ("clean", "strip_sep_token")  # others could switch on code of a repository
# What building an unheard-of architecture, or fetching a file, is known to raise.
FAILURES = (
    *(OSError, RuntimeError, ValueError, TypeError, AssertionError, LookupError),
    *(AttributeError, ArithmeticError, ImportError),
)


def config_problems(model: str | None, pretrained: str | None, architecture: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a conditioner's config, each as "key: what"."""
    if (model is None) == (architecture is None):
        also = "in place of model; give one of them" if model is not None else "or model has to be given"
        return [f"architecture: {also}"] if model is not None else ["model: has to be given, such as ViT-B-16"]
    if architecture is not None:
        if pretrained is not None:
            return ["pretrained: belongs to one of open_clip's models, not to an architecture; weights takes a file"]
        return [f"architecture.{problem}" for problem in _hub_problems(_nested(architecture))]
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


def resolve_config(model: str | None, pretrained: str | None, architecture: dict[str, Any] | None) -> dict[str, Any]:
    """Return {"model_cfg": ..., "preprocess_cfg": ...} of a checked config."""
    import open_clip

    if architecture is not None:
        return _nested(architecture)
    if not model.startswith(HUB):
        preprocess = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
        return {"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": preprocess}
    try:
        config = json.loads(download_from_hub(model, CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"conditioner.model: {model}: its {CONFIG_FILE} is not readable") from None
    config = _nested(config) if isinstance(config, dict) else {"model_cfg": None}
    problems = _hub_problems(config, open_clip.list_models())
    if problems:
        raise UserError(f"conditioner.model: {model}: {CONFIG_FILE}: {problems[0]}")
    return config


def _nested(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of an `open_clip_config.json`; that of an architecture's own JSON becomes its `model_cfg`."""
    return dict(config) if "model_cfg" in config else {"model_cfg": config}


def _hub_problems(config: dict[str, Any], built_in: list[str] | None = None) -> list[str]:
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
        allowed[f"{key}."] = [name for name in names if built_in or not name.startswith(THIRD_PARTY)]
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
    return problems + _third_party_problems(model, built_in)


def _third_party_problems(model: dict[str, Any], built_in: list[str]) -> list[str]:
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


def build_model(config: dict[str, Any], what: str) -> nn.Module:
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


def download_pretrained(model: str, pretrained: str | None) -> Path:
    """Return the file with a model's weights in the cache of open_clip, which downloads it at first use.

    Args:
        model: open_clip's name, or a repository of the hub.
        pretrained: open_clip's name of the weights; a repository has only its own.

    Raises:
        UserError: no weights are named, or they cannot be downloaded.
    """
    import open_clip

    if model.startswith(HUB):
        return download_from_hub(model, None)
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


def missing_pretrained(model: str | None, pretrained: str | None) -> list[Download]:
    """Return the file that `download_pretrained` would download, if it is in no cache; nothing if it is not named."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    if not isinstance(model, str) or (pretrained is None and not model.startswith(HUB)):
        return []
    where = f"{model} {pretrained}" if pretrained else model
    known = open_clip.get_pretrained_cfg(model, str(pretrained)) if pretrained else {}
    address = model.removeprefix(HUB) + "/" if not pretrained else known.get("hf_hub", "")
    if address:
        repository, _, name = address.rpartition("/")
        names = [name, str(Path(name).with_suffix(".safetensors"))] if name else list(WEIGHTS_FILES)
        if any(isinstance(try_to_load_from_cache(repository, file), str) for file in names):
            return []
        return [Download("conditioner", where, Path(HF_HUB_CACHE), None, (f"https://huggingface.co/{repository}",))]
    if url := known.get("url", ""):
        target = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
        return [] if target.is_file() else [Download("conditioner", where, target, None, (url,))]
    return []


def download_from_hub(model: str, filename: str | None) -> Path:
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
