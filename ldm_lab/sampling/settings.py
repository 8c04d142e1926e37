"""What a picture tells of how it was made: in its own metadata, in samples.json, and as other programs read it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm_lab.checkpoints.importer import find_weights
from ldm_lab.config.registry import part_info
from ldm_lab.prompts import Prompt
from ldm_lab.sampling.decode import Sample
from ldm_lab.sampling.loading import locate_model
from ldm_lab.sampling.loras import split_weight
from ldm_lab.sampling.names import FileRecord, checksum, model_name, public_name
from ldm_lab.sampling.options import (
    IMAGE_FILES,
    MODEL_FILES,
    OF_LOADING,
    STAGE,
    UPSAMPLER,
    OptionValues,
    SamplingOptions,
)
from ldm_lab.sampling.output import SampleFolder
from ldm_lab.sampling.parameters import SAMPLER_NAMES, Parameters, escaped, version, written_prompt
from ldm_lab.sampling.recorded import Entry
from ldm_lab.sampling.request import Request

UNSAID = ("sampler", "guidance", "seed", "batch_size", "size", *IMAGE_FILES, *MODEL_FILES)
HASH = 10  # letters of a checksum in A1111's text


@dataclass(frozen=True)
class Given:
    """What was asked for, as it was given.

    Attributes:
        checkpoint: the (base) model.
        upsamplers: that enlarge its pictures.
        loras: as `ModelOptions.lora` takes them.
        values: options under flat names (`ldm_lab.sampling.flat`), and those of loading that tell on pictures.
        noised_clip: the towers of CLIP guidance; none for the released ones.
    """

    checkpoint: str
    upsamplers: Sequence[str] = ()
    loras: Sequence[str] = ()
    values: OptionValues = field(default_factory=OptionValues)
    noised_clip: Sequence[str] = ()


def described(given: Given, options: SamplingOptions, base: Request, device: str) -> Entry:
    """Return the settings that are not at their defaults, those of the sampler, and what names the models.

    Args:
        given: what was asked for.
        options: all choices of the base model, as they were given.
        base: the base model's request.
        device: the kind of device that it runs on.
    """
    settings = Entry(_of_sampler(base))
    settings["guidance"] = base.guidance
    words = given.values
    others = {**options.given(), "strength": base.options.strength}
    others |= {key: value for key, value in words.items() if key.startswith((UPSAMPLER, STAGE)) or key in OF_LOADING}
    settings |= {key: value for key, value in others.items() if key not in UNSAID and value is not None}
    for key in (*IMAGE_FILES, *MODEL_FILES):
        if words.get(key) is not None:
            settings |= _named(key, [FileRecord.of(str(words[key]))])
    if given.noised_clip:
        settings |= _named("noised_clip", list(map(FileRecord.of, given.noised_clip)))
    settings |= _named("checkpoint", [_model_record(given.checkpoint)])
    if loras := [(file, weight) for file, weight in map(split_weight, given.loras) if weight]:
        settings |= _named("lora", [_lora_record(file) for file, _ in loras])
        settings["lora_weight"] = [weight for _, weight in loras]
    if given.upsamplers:
        settings |= _named("upsampler", list(map(_model_record, given.upsamplers)))
    settings["device"] = device
    return settings


def _of_sampler(base: Request) -> Entry:
    """Return the sampler's name and all its options: their defaults may be others one day."""
    options = {**base.options.sampler}
    name = options.pop("name")
    defaults = {key: option.default for key, option in part_info("sampler", name).options.items()}
    said = {key: value for key, value in {**defaults, **options}.items() if value is not None}
    return Entry({"sampler": name, **said})


def _named(key: str, records: Sequence[FileRecord]) -> Entry:
    """Return a key with the name of a file, or a list of several, and one with the checksum."""
    names, sums = [record.name for record in records], [record.sha256 for record in records]
    entry = Entry({key: names[0] if len(names) == 1 else names})
    if any(sums):
        entry[f"{key}_sha256"] = sums[0] if len(sums) == 1 else sums
    return entry


def _model_record(name: str) -> FileRecord:
    return FileRecord(model_name(name), checksum(locate_model(name)))


def _lora_record(name: str) -> FileRecord:
    return FileRecord(model_name(name), checksum(find_weights(name, "lora")))


def prompt_entry(prompt: Prompt, request: Request) -> Entry:
    """Return a prompt as it stands in samples.json, with the weight that it really had."""
    weight = request.guidance if prompt.weight is None else prompt.weight
    if prompt.image is None:
        return Entry({"text": prompt.text, "weight": weight})
    return Entry({**_named("image", [FileRecord.of(prompt.text)]), "weight": weight})


def caption(prompt: Prompt) -> str:
    """Return a prompt as it is written, of an image without its folders."""
    shown = prompt.text if prompt.image is None else public_name(prompt.text)
    return shown if prompt.weight is None else f"{shown}:{prompt.weight:g}"


def keep(
    folder: SampleFolder,
    row: Sequence[Sample],
    mix: Sequence[Prompt],
    base: Request,
    settings: Entry,
    only_last: bool = False,
    text: str | None = None,
) -> None:
    """Write a picture, at all its sizes, with its settings inside.

    Args:
        folder: where to.
        row: its sizes, small to large.
        mix: its prompts.
        base: the base model's request.
        settings: `described`.
        only_last: write the largest alone.
        text: a caption to be written beside it; None writes none.
    """
    told = row[0].image.info | {"batch": list(row[0].batch)}
    entry = Entry({"prompts": [prompt_entry(prompt, base) for prompt in mix], **told, **settings})
    shown = " + ".join(map(caption, mix))
    as_others_read = parameters(mix, base, settings, row[0].seed)
    folder.add([sample.image for sample in row], shown, entry, as_others_read, only_last, text)


def training_caption(mix: Sequence[Prompt], guidance: float) -> str:
    """Return the texts that a picture is guided toward, as one caption in one line; "" if there is none.

    Args:
        mix: its prompts; images have no text, and those of a weight that is not above 0 tell what is not to be seen.
        guidance: weight of prompts without one.
    """
    toward = [prompt for prompt in mix if (guidance if prompt.weight is None else prompt.weight) > 0]
    texts = [" ".join(prompt.text.replace("\ufeff", "").split()) for prompt in toward if prompt.image is None]
    return ", ".join(filter(None, texts))


def parameters(mix: Sequence[Prompt], request: Request, settings: Entry, seed: int) -> Parameters:
    """Return what other programs read of a picture."""
    weights = [request.guidance if prompt.weight is None else prompt.weight for prompt in mix]
    texts = [(prompt.text, weight) for prompt, weight in zip(mix, weights, strict=True) if prompt.image is None]
    images = [public_name(prompt.text) for prompt in mix if prompt.image is not None]
    prompt, scale = written_prompt(texts, request.guidance) if texts else ("", request.guidance)
    name = str(settings["sampler"])
    fields = {"Steps": str(settings["steps"]), "Sampler": SAMPLER_NAMES.get(name, name)}
    if settings.get("spacing") == "karras":
        fields["Schedule type"] = "Karras"
    checksum = str(settings.get("checkpoint_sha256", ""))[:HASH]
    fields |= {"CFG scale": f"{scale:g}", "Seed": str(seed), "Size": ""}
    fields |= {"Model hash": checksum, "Model": str(settings["checkpoint"])}
    if request.options.init_image is not None:
        fields["Denoising strength"] = f"{request.options.strength or 0:g}"
    if request.options.mask_blur:
        fields["Mask blur"] = f"{request.options.mask_blur:g}"
    if images:
        fields["Image prompts"] = ", ".join(images)
    negative = request.options.negative
    return Parameters(prompt, escaped(negative) if negative else "", {**fields, "Version": version()})
