"""A model as a folder of diffusers': it needs torch, diffusers and its own files, and gives the same pictures.

The denoiser, the samplers and what reads prompts are classes of the folder's own files, whose code is taken from this
program (`standalone`); the autoencoder is diffusers' `AutoencoderKL`, a language model transformers' own.
"""

import dataclasses
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.autoencoders.identity import IdentityAutoencoder
from ldm_lab.checkpoints.files import write_safetensors
from ldm_lab.checkpoints.formats import diffusers_vae
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import as_part_config, read_part, weights_path
from ldm_lab.clip_tokens import CLIP_VOCAB_SIZE, Encoding
from ldm_lab.conditioners.cloob import CLOOB
from ldm_lab.conditioners.gap import Gap, ResidualMap
from ldm_lab.conditioners.glide_text import GlideText
from ldm_lab.conditioners.none import NoConditioner
from ldm_lab.conditioners.t5 import T5
from ldm_lab.conditioners.t5_models import MINILM, checked_minilm, fetched, load_encoder, load_tokenizer, local_folder
from ldm_lab.config import signature_options
from ldm_lab.config.registry import part_info
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Part
from ldm_lab.io.atomic import digest, remove_leftovers, replaced_folder
from ldm_lab.io.json_files import read_json, write_json
from ldm_lab.sampling.loading import load_frozen, load_model
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.options import ModelOptions, SamplingOptions
from ldm_lab.sampling.stages import SEED_OFFSET
from ldm_lab.sharing.checks import SourceModel
from ldm_lab.sharing.parts import copy_without_paths
from ldm_lab.sharing.standalone import Standalone

DENOISERS = ("ccld_unet", "glide_unet", "if_unet")
CONDITIONERS = ("cloob", "glide_text", "t5", "none")
SOURCES = ("low_res", "if_low_res", "noised_low_res")
OPTIONAL = ("clip_embed", "inpaint")  # sources without which a network can be asked, too
KINDS = ("Embedding", "TokenIds", "TokenStates", "ImageCondition", "Level")
SAMPLERS = ("unipc", "ddim", "dpmpp_2m", "ddpm")
GUIDANCE = {
    "ldm_lab.guidance.classifier_free": ("guided",),
    "ldm_lab.guidance.stack": ("stack",),
    "ldm_lab.guidance.thresholding": ("StaticThresholding", "DynamicThresholding"),
    "ldm_lab.conditions": ("ConditionRequest",),
    "ldm_lab.sampling.pipeline": ("SeededNoise",),
}
INDEX, CLASS, VERSION = "model_index.json", ["pipeline", "LDMPipeline"], "0.36.0"
UPSAMPLER = "upsampler_{}"
ENTRIES = re.compile(
    r"README\.md|model_index\.json|pipeline\.py|unet|vae|scheduler|prompts|text_encoder|tokenizer|upsampler_\d+"
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDS = "torch and diffusers"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model that goes into a folder.

    Attributes:
        model: loaded, on the CPU.
        config: its sections, as its checkpoint has them.
        options: of its frozen parts, by role: those that their files tell, too.
        stage: 0 for a base model, else which upsampler of a row it is.
    """

    model: Model
    config: Section
    options: dict[str, Section]
    stage: int = 0

    @classmethod
    def load(cls, source: SourceModel, loading: ModelOptions, stage: int = 0) -> "Exported":
        """Return a model of a file. Raises UserError for parts that cannot be loaded."""
        extra, options = read_model(source.path).extra, {}
        for role, moved in (("autoencoder", loading.autoencoder), ("conditioner", loading.conditioner)):
            _, found = load_frozen(role, section_of(source.config, role), moved, source.place, extra)
            options[role] = options_of(role, found)
        model = load_model(source.path, dataclasses.replace(loading, device="cpu"))
        if model.gap is not None and not isinstance(model.conditioner, CLOOB):  # whatever its config says
            raise UserError(f"--diffusers: {source.path}: holds conditioner.gap, which is exported of cloob alone")
        return cls(model, source.config, options, stage)


def write(out: Path, base: Exported, upsamplers: Sequence[Exported] = (), license: str | None = None) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` loads; it appears whole.

    Args:
        out: the folder; one that is there is replaced.
        base: the (base) model.
        upsamplers: what enlarges its pictures, each a folder of its own in it.
        license: of the weights, as an id of the Hub's.
    """
    remove_leftovers(out)
    with replaced_folder(out) as folder:
        _write_into(folder, base)
        for number, one in enumerate(upsamplers, start=1):
            (folder / UPSAMPLER.format(number)).mkdir()
            _write_into(folder / UPSAMPLER.format(number), one)
        front = f"license: {license}\n" if license else ""
        text = template("README").replace("@FRONT@", front).replace("@NAME@", out.resolve().name)
        text = text.replace("@UPSAMPLERS@", template("README_upsampler") if upsamplers else "")
        (folder / "README.md").write_text(text, encoding="utf-8")


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError if a folder cannot be written, or holds what must stay."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out}: a folder is written, and this is a file or a link")
    if not out.is_dir() or not any(out.iterdir()):
        return
    strange = sorted(path.name for path in out.iterdir() if not ENTRIES.fullmatch(path.name))
    ours = read_json(out / INDEX).get("_class_name") == CLASS
    if strange or not ours:
        raise UserError(f"{out}: is there, with other things in it ({(strange or [INDEX])[0]}); name a new folder")
    if not overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it")


def options_of(role: str, config: Section) -> Section:
    """Return the options of a frozen part, those that its file tells, too."""
    path = weights_path(role, config)
    options = dict(as_part_config(role, config).architecture())
    if path is not None:
        options = {**read_part(path, role, str(options["name"])).config, **options}
    return Section({key: its for key, its in options.items() if key != "name"})


def section_of(config: Section, role: str) -> Section:
    """Return a section of a model's config; an empty one if there is none."""
    section = config.get(role)
    return Section(section) if isinstance(section, dict) else Section()


def check(config: Section) -> None:
    """Raise UserError for a model of parts that a folder of diffusers' cannot have."""
    for role, known in (("denoiser", DENOISERS), ("conditioner", CONDITIONERS), ("autoencoder", ("kl_f8", "identity"))):
        name = section_of(config, role).get("name")
        if name not in known:
            raise UserError(
                f"--diffusers: {role} {name}: is not exported; {', '.join(known)} are. --hub-folder has all"
            )
    sources = section_of(config, "condition_sources")
    if unknown := [name for name in sources if name not in (*SOURCES, *OPTIONAL)]:
        raise UserError(f"--diffusers: condition_sources.{unknown[0]}: is not exported; --hub-folder has it")
    if section_of(config, "conditioner").get("gap") and section_of(config, "conditioner").get("name") != "cloob":
        raise UserError("--diffusers: conditioner.gap: is exported of cloob alone; --hub-folder has it")


def _write_into(folder: Path, exported: Exported) -> None:
    """Write all files of one model."""
    model = exported.model
    index = Section(_class_name=[*CLASS], _diffusers_version=VERSION)
    index["unet"] = [*_write_network(folder / "unet", exported)]
    index["scheduler"] = [*_write_scheduler(folder / "scheduler", exported)]
    index |= _write_prompts(folder, model, exported.options["conditioner"])
    index["vae"], pixels = [None, None], None
    if isinstance(model.autoencoder, IdentityAutoencoder):
        mean, std = float(model.autoencoder.latent_mean), float(model.autoencoder.latent_std)
        pixels = Section(mean=mean, std=std, zero_to_one=model.autoencoder.zero_to_one)
    else:
        index["vae"] = [*_write_autoencoder(folder / "vae", model.autoencoder, exported.options["autoencoder"])]
    height, width = model.image_size or (None, None)
    unit = model.autoencoder.downscale * model.denoiser.multiple_of
    index |= Section(height=height, width=width, factor=model.upscale_factor, unit=unit, pixels=pixels)
    write_json(folder / INDEX, index)
    (folder / "pipeline.py").write_text(template("pipeline"), encoding="utf-8")


def template(name: str) -> str:
    """Return the text of a file of the folder's that is the same for all models."""
    return files("ldm_lab.sharing").joinpath("diffusers_code", f"{name}.py.txt").read_text(encoding="utf-8")


def write_code(folder: Path, stem: str, cls: str, text: str) -> list[str]:
    """Write a module with a class; return how model_index.json names it.

    diffusers runs a module anew in its old place each time that a folder is loaded, and takes all of one name for one,
    whatever folder they are from: so the name has a checksum of the text in it, and the class is imported.
    """
    name = f"{stem}_{digest([text.encode()])[:8]}"
    (folder / f"{name}_code.py").write_text(text, encoding="utf-8")
    shim = template("imported").replace("@CLASS@", cls).replace("@MODULE@", f"{name}_code")
    (folder / f"{name}.py").write_text(shim, encoding="utf-8")
    return [name, cls]


def code_of(part: Part) -> tuple[str, str]:
    """Return the module and the name of a part's class."""
    cls = type(part)
    return cls.__module__, cls.__name__


def _write_network(folder: Path, exported: Exported) -> list[str]:
    """Write the denoiser: weights, config, code."""
    model = exported.model
    code = Standalone()
    name = code.add(*code_of(model.denoiser))
    for kind in KINDS:
        code.add("ldm_lab.conditions", kind)
    folder.mkdir()
    text = code.text("The denoiser.", NEEDS, template("unet").replace("@NETWORK@", name))
    entry = write_code(folder, "unet", "LDMUNet", text)
    spec = model.denoiser.spec.items()
    conditions = Section({its: [type(kind).__name__, dataclasses.asdict(kind)] for its, kind in spec})
    _write_weights(folder / WEIGHTS, {"network": model.denoiser})
    options = Section({key: its for key, its in section_of(exported.config, "denoiser").items() if key != "name"})
    told = Section(channels=model.autoencoder.channels, conditions=conditions, options=options)
    _write_config(folder, "LDMUNet", told)
    return entry


def _write_config(folder: Path, cls: str, options: Section, name: str = "config.json") -> None:
    write_json(folder / name, {"_class_name": cls, "_diffusers_version": VERSION, **options})


def _write_weights(path: Path, modules: dict[str, nn.Module]) -> None:
    """Write the tensors of modules, each below its attribute."""
    state: dict[str, Tensor] = {
        f"{attribute}.{name}": value for attribute, its in modules.items() for name, value in its.state_dict().items()
    }
    write_safetensors(path, state, {"format": "pt"})


def _write_scheduler(folder: Path, exported: Exported) -> list[str]:
    """Write objective and samplers: config and code."""
    model, config = exported.model, exported.config
    code = Standalone()
    objective = code.add(*code_of(model.objective))
    for module, names in GUIDANCE.items():
        for name in names:
            code.add(module, name)
    samplers = {name: part_info("sampler", name).load() for name in SAMPLERS}
    sources = {name: its for name, its in model.condition_sources.items() if name in SOURCES}
    text = template("scheduler").replace("@OBJECTIVE@", objective)
    classes = {name: (its.__module__, its.__name__) for name, its in samplers.items()}
    text = text.replace("@SAMPLERS@", _table(code, classes))
    text = text.replace("@SOURCES@", _table(code, {name: code_of(its) for name, its in sources.items()}))
    folder.mkdir()
    entry = write_code(folder, "scheduler", "LDMSampler", code.text("Objective and samplers.", NEEDS, text))
    sections, asked = section_of(config, "condition_sources"), section_of(config, "objective")
    told = Section(
        objective={key: its for key, its in asked.items() if key != "name"},
        sources={name: sections.get(name) or {} for name in sources},
        seed_offset=exported.stage * SEED_OFFSET,
    )
    told |= _defaults(model)
    _write_config(folder, "LDMSampler", told, "scheduler_config.json")
    return entry


def _table(code: Standalone, classes: dict[str, tuple[str, str]]) -> str:
    """Return the inside of a dict of classes by name, which are added to the code."""
    return ", ".join(f'"{name}": {code.add(*its)}' for name, its in classes.items())


def _defaults(model: Model) -> Section:
    """Return how a model is sampled unless it is said otherwise."""
    timesteps, defaults = model.objective.schedule.timesteps, model.denoiser.sampling_defaults
    options = SamplingOptions().resolved(model.upscale_factor is not None, timesteps, defaults)
    sampler = options.sampler
    assert isinstance(sampler, dict)
    bound = model.pixel_bound
    return Section(
        sampler=Section(sampler),
        guidance=options.guidance if model.dropout else 1.0,
        temperature=options.temperature,
        bound=bound,
        thresholding=None if bound is None else options.thresholding,
        percentile=options.threshold_percentile,
        most=options.threshold_divisor,
    )


def _write_autoencoder(folder: Path, autoencoder: nn.Module, options: Section) -> list[str]:
    """Write the autoencoder as diffusers' own. Raises UserError for an architecture that it does not have."""
    defaults = {key: known.default for key, known in signature_options(type(autoencoder)).items()}
    diffusers_vae.write(folder, autoencoder.state_dict(), Section({**defaults, **options}))
    return ["diffusers", "AutoencoderKL"]


# ------------------------------------------------------------------------------------------------------------ prompts


def _write_prompts(folder: Path, model: Model, options: Section) -> Section:
    """Write what reads prompts; return its entries in model_index.json."""
    out, conditioner = folder / "prompts", model.conditioner
    out.mkdir()
    entries = Section(text_encoder=[None, None], tokenizer=[None, None])
    code, name, kind = Standalone(), "", str(conditioner.part_name)
    if isinstance(conditioner, CLOOB | GlideText):
        name = code.add(*code_of(conditioner))
        code.add("ldm_lab.sharing.stand_ins", "MERGES")
    if isinstance(conditioner, CLOOB):
        code.add("ldm_lab.conditioners.cloob", "TextEncoder")
        for its in ("Gap", "RidgeMap", "ResidualMap"):
            code.add("ldm_lab.conditioners.gap", its)
        shift = {} if model.gap is None else {"shift": model.gap}
        _write_weights(out / WEIGHTS, {"towers": conditioner, **shift})
        told = Section(options=options, merges=[*_clip_merges(conditioner.vocab_size)], gap=_described(model.gap))
    elif isinstance(conditioner, GlideText):
        is_clip = conditioner.vocabulary == "clip"
        merges = _clip_merges(conditioner.vocab_size) if is_clip else _gpt2_merges(conditioner.merges_file())
        told = Section(options=options, merges=[*merges])
    elif isinstance(conditioner, T5):
        told = Section(text_size=conditioner.text_size, width=conditioner.width, padding=conditioner.padding)
        told |= Section(lowercase=conditioner.lowercase, dtype=str(conditioner.dtype).removeprefix("torch."))
        entries |= _write_language_model(folder, conditioner)
    else:
        assert isinstance(conditioner, NoConditioner)
        told = Section(width=conditioner.embed_dim)
    tail = template(f"prompts_{kind}").replace("@CONDITIONER@", name)
    text = code.text("What reads prompts.", NEEDS, tail)
    entries["prompts"] = [*write_code(out, "prompts", "LDMPrompts", text)]
    _write_config(out, "LDMPrompts", told)
    return entries


def _described(gap: Gap | None) -> Section | None:
    """Return what a gap is built by, before its file fills it."""
    if gap is None:
        return None
    hidden = gap.map.first.out_features if isinstance(gap.map, ResidualMap) else None
    return Section(width=gap.width, map=gap.map_name, hidden=hidden)


def _clip_merges(vocab_size: int) -> list[str]:
    """Return the merges of CLIP's vocabulary of a size, "a b" each."""
    return [" ".join(pair) for pair in Encoding(min(vocab_size, CLIP_VOCAB_SIZE)).ranks]


def _gpt2_merges(path: Path) -> list[str]:
    """Return GPT-2's merges, "a b" each, of their file."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _write_language_model(folder: Path, conditioner: T5) -> Section:
    """Write a language model and its tokenizer as transformers' own."""
    model = conditioner.model_name
    source = checked_minilm() if model == MINILM else local_folder(model) or fetched(model)
    encoder = load_encoder(source, conditioner.dtype, torch.device("cpu"))
    encoder.config.name_or_path = ""
    encoder.save_pretrained(folder / "text_encoder")
    out = folder / "tokenizer"
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.suffix == ".model" or "token" in file.name or file.name in ("vocab.txt", "vocab.json", "merges.txt"):
            copy_without_paths(file, out / file.name)
    tokenizer = type(load_tokenizer(source)).__name__
    return Section(text_encoder=["transformers", type(encoder).__name__], tokenizer=["transformers", tokenizer])
