"""Which network an embedding is of: what scores, heads and rating embeddings say they belong to.

An *embedder* is a small dict of texts: {"name": "clip", "model": "ViT-L-14-quickgelu", "pretrained": "openai"} where
the weights are published under a name, else {"name": "clip", "sha256": ...} (and the model's name, if it has one) with
the checksum of the weights file.
"""

from ldm_lab.checkpoints.files import is_safetensors
from ldm_lab.checkpoints.importer import detect_format, find_weights
from ldm_lab.checkpoints.native import part_config
from ldm_lab.checkpoints.parts import as_part_config
from ldm_lab.checkpoints.sharded import weights_checksum
from ldm_lab.config import PartConfig
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Json

KEYS = ("name", "model", "pretrained", "sha256")
OPENAI = {  # of OpenAI's CLIPs, by LAION's name of the size
    size: {"name": "clip", "model": f"{model}-quickgelu", "pretrained": "openai"}
    for size, model in (("vit_b_32", "ViT-B-32"), ("vit_b_16", "ViT-B-16"), ("vit_l_14", "ViT-L-14"))
}
HUB = "hf-hub:"  # such a model brings its own weights, so its name says which


def embedder_of(config: PartConfig) -> dict[str, str]:
    """Return the embedder of a conditioner's section, or of plain data of one.

    Raises:
        UserError: neither named nor in a file: nobody could make such embeddings again.
    """
    config = as_part_config("conditioner", config)
    named = {"name": config.name, **config.options}
    path = find_weights(config.use.weights) if config.use.weights else None
    if path is not None and is_safetensors(path) and (found := detect_format(path)).kind == "part":
        named |= part_config(path, found.file.metadata)[1]
    texts = {key: str(named[key]) for key in ("name", "model", "pretrained") if named.get(key)}
    if "pretrained" in texts or texts.get("model", "").startswith(HUB):
        return texts
    if path is not None:
        return {**texts, "sha256": weights_checksum(path)}
    identity = config.load().weights_identity(config.to_dict())
    if identity is None:
        raise UserError("conditioner: its weights are neither named nor in a file, so its embeddings belong to nothing")
    return {**texts, "sha256": identity}


def same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Return whether two embedders are the same network with the same weights, as far as they say."""
    if "sha256" in one and "sha256" in other:
        return one["sha256"] == other["sha256"]
    return one == other


def check_same(what: str, wanted: dict[str, str], given: dict[str, str]) -> None:
    """Raise UserError if what was made for one embedder is to be used with another one."""
    if same(wanted, given):
        return
    hint = ""
    if wanted.get("model") == given.get("model") and "pretrained" in wanted and "sha256" in given:
        hint = f"; if these are the weights {wanted['pretrained']!r}, say so: pretrained={wanted['pretrained']}"
    raise UserError(f"{what}: belongs to the embeddings of {describe(wanted)}, these are of {describe(given)}{hint}")


def describe(embedder: dict[str, str]) -> str:
    """Return an embedder in a few words."""
    if "sha256" in embedder:
        model = f" {embedder['model']}" if embedder.get("model") else ""
        return f"{embedder.get('name')}{model} with weights of sha256 {embedder['sha256'][:12]}"
    return " ".join(str(embedder[key])[:100] for key in KEYS if key in embedder) or "an unknown network"


def problems(embedder: Json) -> list[str]:
    """Return what is wrong with an embedder that came out of a file."""
    if not isinstance(embedder, dict) or not all(isinstance(v, str) for v in embedder.values()):
        return ["embedder: name, and model with pretrained, or sha256, are needed as texts"]
    strange = [key for key in embedder if key not in KEYS]
    if strange:
        return [f"embedder.{strange[0]}: no such key. Known: {', '.join(KEYS)}."]
    known = "sha256" in embedder or "pretrained" in embedder or embedder.get("model", "").startswith(HUB)
    if "name" not in embedder or not known:
        return ["embedder: has to say name, and model with pretrained or sha256 of the weights"]
    return []
