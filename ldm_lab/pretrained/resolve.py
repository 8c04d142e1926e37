"""Released weights by name: where they are, whether what came is what was meant, and where they lie on this machine.

`locate` turns whatever a `weights:`, `init_from` or `--checkpoint` says into a path: a name of `RELEASED`, a path, or
`hf://OWNER/REPOSITORY/FILE[@REVISION]` on the Hugging Face Hub, which huggingface_hub fetches and caches itself.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError, first_line, unknown
from ldm_lab.io.atomic import sha256
from ldm_lab.io.download import Wanted, download
from ldm_lab.io.json_files import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[2]
HUB = "hf://"
SAFE_PART = r"[A-Za-z0-9_][\w.+-]*"  # of a name or path: no "..", nothing hidden
HUB_ADDRESS = re.compile(
    rf"hf://(?P<repository>{SAFE_PART}/{SAFE_PART})/(?P<path>(?:{SAFE_PART}/)*(?:{SAFE_PART})?)(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Released:
    """A released file.

    Attributes:
        role: the role of the part that it holds; "model" for a whole denoiser.
        what: one line for the user.
        file: its name in the cache.
        mirrors: http(s) addresses, tried in this order; none if no trustworthy one is known.
        sha256: its checksum; None if its publisher gave none. Then the one seen first holds from there on.
        size: bytes, or None if not known.
        licence: as the page says.
        page: where it is described.
    """

    role: str
    what: str
    file: str
    mirrors: tuple[str, ...] = ()
    sha256: str | None = None
    size: int | None = None
    licence: str = "not stated"
    page: str = ""


_CLOOB = "https://the-eye.eu/public/AI/models/cloob/"
_CLOOB_16 = "cloob_laion_400m_vit_b_16_16_epochs-405a3c31572e0a38f8632fa0db704d0e4521ad663555479f86babd3d178b1892.pkl"
_CLOOB_32 = "cloob_laion_400m_vit_b_16_32_epochs-646f61628eb4bc03a01ce5c23b727a348105f0405b6037a329da062739a06441.pkl"
_LDM = "https://ommer-lab.com/files/latent-diffusion/"
_LDM_PAGE = "https://github.com/CompVis/latent-diffusion"
_AESTHETIC = "LAION-AI/aesthetic-predictor"
_AESTHETIC_RAW = f"https://raw.githubusercontent.com/{_AESTHETIC}/6d122adad522ab246644d9dc1c6d7a3810ee255f/"
_AESTHETIC_HEADS = {
    "vit_b_16": "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0",
    "vit_b_32": "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f",
    "vit_l_14": "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
}
_RATINGS = {  # sha256 of rating0.npy, rating1.npy, ...
    "vit_b_32": (
        "c7079b161f5656e9016de6acf45b46438299682b65a6e8b556ab64bc91672657",
        "fc51b3dcb67df1ba779b2ba5dc075b014d875e5e3ea18299769fce7375075bd6",
        "1d6b5bbf88624eb080970d5e6e4f7c11b924d9b7069d82547499d4fbd439d500",
        "b62132442d499fcbe6fac155a4cd918cf9c1f275b987bd827db2242800cc1567",
        "fbe065d6e0120c90161963769535869bed8f8eda85b2360d78547f96b81f4b4f",
        "5566bffd5766e25aba477a65969d53aac2fba9d80c5cce65448b6b299cfbaa64",
        "c18a22c6289d8ae969a749e5d9ad92f1ee9822070f0bef913fe518abee40fa2a",
        "37b0ae988dbcf3ae67bb984c6572c8f9faa370e9393bfbaf91f794861d01e249",
        "48d928ea36c3d5ddb6f2f52051821d7fce0bd488eb4915c89f5dca89439298b5",
        "edbf4bfe1ac0d353e05343b55296ef4cfb780ffd8b1c63553d5059bc739e93c0",
    ),
    "vit_l_14": (
        "ece2e6f5dffe1f81b9f488fc8a078c29462d44463448393af7b60c93bf33fb1b",
        "8b3970dda1475b67f9d7eaebb0f15292435ef81359aeb29bbaa56bab5a6cee9b",
        "2fbb46eab2240454f6d81d3e2713fe067e22ceabcdaa00a67b44148ddc4a58d7",
        "affc5e25225a0b8de68ebe4bf194a7c4bb33a2e3fd4ea4201e428b80490425f5",
        "8de9c65431d5eaa823ba3ff9db749d5f394b89456d1bee8dc32247abae075484",
        "630e0d67aff97eeaf60211a30cf48e26c301fb1e0f29a6977a50bc56f1f3bdf9",
        "ae1537d1e1c041e948ecf4c40e52cf8949d24601551c5ba72bd28566a9389473",
        "a34b95ce2251d072bcb950abe96728739439c7d23f84bb0b01ae61c9f389214e",
        "3e23cbf0bf5ba5c768fbcba3c379ce5dcc639e22bb41b3c78e24dc63a5c3f9ae",
        "c500ee887b3382d9c48625da1eca8635d63fb18055ed57ec95225608a1e46828",
    ),
}
_IMPROVED = "christophschuhmann/improved-aesthetic-predictor"
_IMPROVED_RAW = f"https://raw.githubusercontent.com/{_IMPROVED}/6934dd81792f086e613a121dbce43082cb8be85e/"
_CCLD_FILE = "yfcc-latent-diffusion-f8-e2-s250k.ckpt"
_GLIDE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/"
_GLIDE_PAGE = "https://github.com/openai/glide-text2im"
_LAIONIDE = "https://github.com/afiaka87/laionide/releases/download/Checkpoints/"
_MINI_PAGE = "https://github.com/Aaronlozhkin/miniGLIDE-and-dogGLIDE"

RELEASED: dict[str, Released] = {
    "cloob/vit_b_16_laion400m_16e": Released(
        role="conditioner",
        what="CLOOB ViT-B/16, 16 epochs of LAION-400M; that of ccld/yfcc_cfg",
        file=_CLOOB_16,
        mirrors=(_CLOOB + _CLOOB_16,),
        sha256="405a3c31572e0a38f8632fa0db704d0e4521ad663555479f86babd3d178b1892",
        licence="MIT",
        page="https://github.com/crowsonkb/cloob-training",
    ),
    "cloob/vit_b_16_laion400m_32e": Released(
        role="conditioner",
        what="CLOOB ViT-B/16, 32 epochs of LAION-400M",
        file=_CLOOB_32,
        mirrors=(_CLOOB + _CLOOB_32,),
        sha256="646f61628eb4bc03a01ce5c23b727a348105f0405b6037a329da062739a06441",
        licence="MIT",
        page="https://github.com/crowsonkb/cloob-training",
    ),
    "ccld/yfcc_cfg": Released(
        role="model",
        what="CCLD, 1.2 billion parameters, YFCC100M, 250,000 steps",
        file=_CCLD_FILE,
        mirrors=(
            f"https://the-eye.eu/public/AI/models/{_CCLD_FILE}",
            f"https://mystic.the-eye.eu/public/AI/models/{_CCLD_FILE}",
        ),
        licence="MIT",
        page="https://github.com/JD-P/cloob-latent-diffusion",
    ),
    **{
        f"kl-f{f}": Released(
            role="autoencoder",
            what=f"CompVis KL autoencoder, {channels} channels at 1/{f} of the size",
            file=f"kl-f{f}.zip",
            mirrors=(f"{_LDM}kl-f{f}.zip",),
            licence="MIT",
            page=_LDM_PAGE,
        )
        for f, channels in ((4, 3), (8, 4), (16, 16), (32, 64))
    },
    **{
        f"aesthetic/{size}": Released(
            role="head",
            what=f"LAION-Aesthetics V1 score from OpenAI's CLIP {size}",
            file=f"sa_0_4_{size}_linear.pth",
            mirrors=(f"{_AESTHETIC_RAW}sa_0_4_{size}_linear.pth",),
            sha256=checksum,
            size=4071 if size == "vit_l_14" else 3047,
            licence="MIT",
            page=f"https://github.com/{_AESTHETIC}",
        )
        for size, checksum in _AESTHETIC_HEADS.items()
    },
    "aesthetic/improved_vit_l_14": Released(
        role="head",
        what="LAION-Aesthetics V2 score (another scale than V1's) from OpenAI's CLIP vit_l_14",
        file="sac+logos+ava1-l14-linearMSE.pth",
        mirrors=(f"{_IMPROVED_RAW}sac%2Blogos%2Bava1-l14-linearMSE.pth",),
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        size=3714759,
        licence="Apache-2.0",
        page=f"https://github.com/{_IMPROVED}",
    ),
    **{
        f"aesthetic/{size}/rating{rating}": Released(
            role="rating",
            what=f"mean embedding of images rated {rating} to {rating + 1}, of OpenAI's CLIP {size}",
            file=f"rating{rating}.npy",
            mirrors=(f"{_AESTHETIC_RAW}{size}_embeddings/rating{rating}.npy",),
            sha256=checksum,
            size=3200 if size == "vit_l_14" else 2176,
            licence="MIT",
            page=f"https://github.com/{_AESTHETIC}",
        )
        for size, checksums in _RATINGS.items()
        for rating, checksum in enumerate(checksums)
    },
    **{
        f"glide/{name.replace('_', '-')}": Released(
            role=role,
            what=f"GLIDE (filtered), {what}",
            file=f"{name}.pt",
            mirrors=(f"{_GLIDE}{name}.pt",),
            licence="MIT",
            page=_GLIDE_PAGE,
        )
        for name, role, what in (
            ("base", "model", "text to 64 px, 385,030,726 parameters"),
            ("upsample", "model", "64 to 256 px, 398,361,286 parameters"),
            ("base_inpaint", "model", "inpainting at 64 px, 385,037,638 parameters"),
            ("upsample_inpaint", "model", "inpainting, 64 to 256 px, 398,368,198 parameters"),
            ("clip_image_enc", "guide", "noised CLIP, image tower, for CLIP guidance"),
            ("clip_text_enc", "guide", "noised CLIP, text tower, for CLIP guidance"),
        )
    },
    **{
        f"laionide/{name}": Released(
            role="model",
            what=what,
            file=f"laionide-{name}.pt",
            mirrors=(f"{_LAIONIDE}laionide-{name}.pt",),
            page="https://github.com/LAION-AI/laionide",
        )
        for name, what in (
            ("v2-base", "GLIDE's base, fine-tuned on LAION"),
            ("v2-sr", "GLIDE's upsampler, fine-tuned on LAION"),
            ("v3-base", "laionide v2-base, fine-tuned on CC12M, COCO and others"),
        )
    },
    **{
        name.lower(): Released(
            role="model",
            what=f"{what}; 156,947,494 parameters",
            file=f"{name}.pt",
            page=_MINI_PAGE,  # on a drive that wants a browser
        )
        for name, what in (
            ("miniGLIDE", "a small GLIDE of 100 timesteps, SBU captions"),
            ("miniGLIDEsimple", "the same without the bound on the variance"),
            ("dogGLIDE", "a small GLIDE of 1000 timesteps, Stanford Dogs"),
        )
    },
    "gpt2/vocab.bpe": Released(
        role="conditioner",
        what="GPT-2's byte-pair encoding, for GLIDE's texts",
        file="vocab.bpe",
        mirrors=("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",),
        sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        size=456_318,
        licence="MIT (modified)",
        page="https://github.com/openai/gpt-2",
    ),
}


# ---------------------------------------------------------------------------------------------------- what is meant


def locate(text: str | Path, what: str) -> Path:
    """Return the path of weights, downloaded first if they are named and not in the cache yet.

    Args:
        text: a name of `RELEASED`, `hf://OWNER/REPOSITORY/FILE[@REVISION]` (a folder with a slash at its end), or a
            path, looked for here and then in the repository's folder. `./NAME` and a `Path` are paths for sure.
        what: what the weights are for, in error messages.

    Returns:
        A file or folder that is there.

    Raises:
        UserError: nothing there, the download failed, or what came is not what was meant.
    """
    if isinstance(text, str):
        if text in RELEASED:
            return fetch(text)
        if text.startswith(HUB):
            return _from_hub(text, what, offline())
        if "://" in text:
            raise UserError(f"{what}: {text!r} is neither a path nor a name of released weights; download it yourself")
    path = Path(text).expanduser()
    for found in (path, REPOSITORY / path):
        if found.is_file() or found.is_dir():
            return found
    if path.exists():  # reading a pipe or a device would never end
        raise UserError(f"{path}: not a file ({what})")
    raise UserError(f"{path}: no such file ({what}), and {unknown('released weights', text, RELEASED)}")


def check_foreign(text: Any, where: str) -> None:
    """Refuse weights that a config out of a checkpoint may not name: whoever made it would choose what is downloaded.

    Released names and paths are let in, and of the Hub what is in this machine's cache, as after a training with it.

    Raises:
        UserError: another address, or nothing of the kind.
    """
    if isinstance(text, str) and text.startswith(HUB):
        try:
            _from_hub(text, where, local=True)
        except UserError:
            raise UserError(
                f"{where}: refused, a checkpoint must not have {text!r} downloaded; "
                "`python -m ldm_lab pretrained get` does if you trust it"
            ) from None
    elif text is not None and (not isinstance(text, str) or "://" in text):
        raise UserError(f"{where}: refused, a checkpoint's config names released weights or paths, not {text!r}")


# ------------------------------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Return the folder of downloaded weights: $LDM_LAB_CACHE, else ldm_lab in the user's cache folder."""
    if os.environ.get("LDM_LAB_CACHE"):
        return Path(os.environ["LDM_LAB_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "ldm_lab"


def cached_path(name: str) -> Path:
    """Return where the file of a released name lies, or has to be put. Raises UserError for an unknown name."""
    if name not in RELEASED:
        raise UserError(unknown("released weights", name, RELEASED))
    parts = [*name.split("/"), RELEASED[name].file]
    assert all(re.fullmatch(SAFE_PART, part) for part in parts), f"{name}: unsafe as a path"
    return cache_folder().joinpath(*parts)


def fetch(name: str) -> Path:
    """Return the file of a released name, downloaded if it is not in the cache, and checked.

    Processes that need the same file at once wait for the one that downloads it.

    Raises:
        UserError: an unknown name; offline; every mirror failed; no room; the file in the cache is another one.
    """
    from filelock import FileLock

    path, entry = cached_path(name), RELEASED[name]
    if _is_unchanged(path, entry):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if not path.exists():
                _download(name, entry, path)
            elif not _is_unchanged(path, entry):
                _check_found(name, entry, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written: {reason} (LDM_LAB_CACHE=FOLDER moves it)") from None
    return path


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_record(path: Path, checksum: str, source: str) -> None:
    """Write down which file has come: its checksum, and by what an unchanged one is known."""
    stat = path.stat()
    facts = {"sha256": checksum, "size": stat.st_size, "modified": stat.st_mtime_ns, "source": source}
    write_json(_record_path(path), facts)


def _is_unchanged(path: Path, entry: Released) -> bool:
    """Return whether a file is there and is the one that was checked: hashing gigabytes at every start is too slow."""
    if not path.is_file():
        return False
    record, stat = read_json(_record_path(path)), path.stat()
    same = (record.get("size"), record.get("modified")) == (stat.st_size, stat.st_mtime_ns)
    return same and entry.sha256 in (None, record.get("sha256"))


def _expected(entry: Released, path: Path) -> str | None:
    """Return the checksum that a file has to have: the published one, else the one seen first."""
    return entry.sha256 or read_json(_record_path(path)).get("sha256")


def _check_found(name: str, entry: Released, path: Path) -> None:
    """Check a file that the user has put into the cache, or that has changed there."""
    checksum, expected = sha256(path), _expected(entry, path)
    if expected not in (None, checksum):
        known = "published" if entry.sha256 else "seen first"
        raise UserError(
            f"{path}: not {name}: its sha256 is {checksum}, the one {known} {expected}; "
            "remove the file to download it again"
        )
    _write_record(path, checksum, "found in the cache")


def offline() -> bool:
    """Return whether the environment forbids downloads (LDM_LAB_OFFLINE, HF_HUB_OFFLINE)."""
    switches = (os.environ.get(key, "").lower() for key in ("LDM_LAB_OFFLINE", "HF_HUB_OFFLINE"))
    return any(switch in ("1", "true", "yes", "on") for switch in switches)


def _download(name: str, entry: Released, path: Path) -> None:
    """Bring a file into the cache, from the first mirror that gives the right one."""
    sources = " or ".join((*entry.mirrors, entry.page) if entry.mirrors else (entry.page or "its publisher",))
    by_hand = f"put {entry.file} (from {sources}) at {path}"
    if offline():
        raise UserError(f"{name}: not in the cache, and downloads are switched off: {by_hand}")
    if not entry.mirrors:
        raise UserError(f"{name}: no address is known to download it from: {by_hand}")
    expected = _expected(entry, path)
    try:
        checksum, source = download(entry.mirrors, path, Wanted(name, expected, entry.size))
    except UserError as error:
        changed = "" if entry.sha256 or expected is None else f"; if the change is right, remove {_record_path(path)}"
        raise UserError(f"{error}{changed}; to do it by hand, {by_hand}") from None
    _write_record(path, checksum, source)
    if expected is None:
        told = f"{name}: its publisher gave no checksum; {checksum} is the one it has to have from now on"
        print(told, file=sys.stderr)  # standard output is for what a program was asked for


# ------------------------------------------------------------------------------------------------ Hugging Face Hub


def _from_hub(text: str, what: str, local: bool) -> Path:
    """Return a file, or the folder of a diffusers model, from huggingface_hub's cache; unless `local` it fetches it."""
    match = HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(
            f"{what}: {text!r} should be hf://OWNER/REPOSITORY/FILE[@REVISION], or end in a slash for a folder"
        )
    import huggingface_hub

    repository, path, revision = match["repository"], match["path"], match["revision"]
    try:
        if path and not path.endswith("/"):
            return Path(huggingface_hub.hf_hub_download(repository, path, revision=revision, local_files_only=local))
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[f"{path}*.json", f"{path}*.safetensors"],
            ignore_patterns=[f"{path}*/*", "*.fp16.safetensors"],
            local_files_only=local,
        )
    except Exception as error:  # whatever the Hub, its client or the connection has to complain about
        if local:
            raise UserError(f"{what}: {text} is not in the Hub's cache, and downloads are switched off") from None
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what}: {text} cannot be downloaded ({reason})") from None
    if not (Path(folder) / path / "config.json").is_file():
        raise UserError(f"{what}: {text} has no config.json; a folder has to be that of a diffusers model")
    return Path(folder) / path
