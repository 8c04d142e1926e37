"""What pictures are made with in an evaluation: models, and the choices of sampling that are compared."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ldm_lab.checkpoints.parts import weights_sha256
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained.catalogue import catalogue
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import Model, ModelOptions, Pipeline, SamplingOptions
from ldm_lab.sampling.loading import locate_model
from ldm_lab.sampling.names import model_name
from ldm_lab.sampling.options import OptionValues
from ldm_lab.sampling.recorded import Entry
from ldm_lab.sampling.request import Request
from ldm_lab.sampling.settings import Given, described

SEED_STEP = 1_000_003  # between the noise of two seeds' first pictures: seeds never share a picture's noise


@dataclass(frozen=True)
class Setting:
    """A model, and how it is asked.

    Attributes:
        model: its name in the table.
        checkpoint: as it was given.
        identity: sha256 of its file and of all weights that it is used with (`Models.identity`).
        options: all choices but the seed.
        guidance, sampler, steps: as they come out with all defaults.
        told: all that pictures are made with but seed and device, as samples.json has it, and their size.
        embedder: whose embeddings its conditioner gives (`ldm_lab.checkpoints.embedders`); None if it gives none.
    """

    model: str
    checkpoint: str
    identity: str
    options: SamplingOptions
    guidance: float
    sampler: str
    steps: int
    told: Entry = field(default_factory=Entry, compare=False)
    embedder: dict[str, str] | None = field(default=None, compare=False)

    def key(self, prompts: Sequence[Prompt]) -> str:
        """Return what stands for the setting with these prompts."""
        given = json.dumps(self.options.given(), sort_keys=True, default=str)
        texts = json.dumps([[prompt.text, prompt.weight] for prompt in prompts])
        return hashlib.sha256(f"{self.identity} {given} {texts}".encode()).hexdigest()[:16]


class Models:
    """Trained models, of which the one used last is in memory."""

    def __init__(self, options: ModelOptions) -> None:
        """Set how they are loaded; where they run is said later."""
        self.options = options
        self._loaded: tuple[str, str, Pipeline] | None = None
        self._identities: dict[str, str] = {}

    def pipeline(self, checkpoint: str, device: torch.device) -> Pipeline:
        """Return a model on a device. Errors are those of `Pipeline.from_checkpoint`."""
        if self._loaded is None or self._loaded[:2] != (checkpoint, str(device)):
            self._loaded = None  # the memory is free before the next one comes
            loading = replace(self.options, device=str(device))
            pipeline = Pipeline.from_checkpoint(checkpoint, loading)
            self._loaded = checkpoint, str(device), pipeline
            if checkpoint not in self._identities:  # before anything is loaded later, or moved
                self._identities[checkpoint] = f"{checksum_of(checkpoint)} {identity_of(pipeline.model, self.options)}"
        return self._loaded[2]

    def identity(self, checkpoint: str) -> str:
        """Return what stands for a model as it is loaded: its file, and the weights of all parts, in hexadecimal."""
        if checkpoint not in self._identities:
            self.pipeline(checkpoint, torch.device("cpu"))
        return hashlib.sha256(self._identities[checkpoint].encode()).hexdigest()


def identity_of(model: Model, options: ModelOptions) -> str:
    """Return the sha256 of all weights in memory: frozen parts, a guide model, LoRAs in the denoiser's weights.

    So it is another one wherever a file was exchanged, or another option of loading names other weights. A text encoder
    that is not in memory, as its texts are stored, counts by what pins its weights.
    """
    parts = {
        "autoencoder": model.autoencoder, "conditioner": model.conditioner, "denoiser": model.denoiser,
        "guide_model": model.guide_model, "noised_clip": model.noised_clip, "gap": model.gap,
        **{f"condition_sources.{name}": its for name, its in model.condition_sources.items()},
    }  # fmt: skip
    total = hashlib.sha256(f"head width {options.noised_clip_head_width}".encode())
    for role, part in parts.items():
        if part is None:
            continue
        tensors = [*part.named_parameters(), *part.named_buffers()]
        for name, tensor in tensors:
            total.update(f"{role}.{name} {tensor.dtype} {list(tensor.shape)}".encode())
            if not tensor.is_meta:
                total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        config = model.conditioner_config if role == "conditioner" else None
        if config is not None and (not tensors or any(tensor.is_meta for _, tensor in tensors)):
            total.update(f"{role} {weights_sha256(role, config)}".encode())
    return total.hexdigest()


class RowNames(NamedTuple):
    """What the rows of a table are called: models, and folders of pictures."""

    models: list[str]
    folders: list[str]


def row_names(checkpoints: Sequence[str], folders: Sequence[str] = ()) -> RowNames:
    """Return a name for each model and each folder: its last part, and of those that would be called the same as many
    folders before it as tell them apart.

    Raises:
        UserError: one that is given twice.
    """
    ways = [*map(_ways_of_model, checkpoints), *map(_ways_of_folder, folders)]
    places = [0] * len(ways)
    while True:
        names = [its[place] for its, place in zip(ways, places, strict=True)]
        alike = [number for number, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return RowNames(names[: len(checkpoints)], names[len(checkpoints) :])
        longer = [number for number in alike if places[number] + 1 < len(ways[number])]
        if not longer:
            flag = "--checkpoint" if alike[0] < len(checkpoints) else "--images"
            raise UserError(f"{flag} {[*checkpoints, *folders][alike[0]]}: is given twice")
        for number in longer:
            places[number] += 1


def _ways_of_model(checkpoint: str) -> list[str]:
    """Return what a model may be called, the shortest first."""
    short = model_name(checkpoint).removesuffix(".safetensors").removesuffix(".ckpt")
    if checkpoint in catalogue() or "://" in checkpoint:
        return [short, checkpoint]
    path = Path(checkpoint)
    last = path.name.removesuffix(".safetensors").removesuffix(".ckpt")
    return [short, *_longer(path.absolute().parent, last), str(path)]


def _ways_of_folder(folder: str) -> list[str]:
    """Return what a folder of pictures may be called, the shortest first."""
    path = Path(os.path.abspath(folder))  # "." has no name
    return [path.name, *_longer(path.parent, path.name), f"{Path(folder)} (pictures)"]


def _longer(parent: Path, name: str) -> list[str]:
    """Return a name with the last folder before it, the last two, and so on."""
    folders = [part for part in parent.parts if part != parent.anchor]
    return ["/".join([*folders[-count:], name]) for count in range(1, len(folders) + 1)]


def settings_of(
    models: Models,
    named: Iterable[tuple[str, str]],
    choices: Sequence[SamplingOptions],
    prompts: Sequence[Prompt],
    are_asked: bool,
) -> list[Setting]:
    """Return every model with every choice, models first.

    Args:
        models: that are loaded.
        named: (name in the table, checkpoint) of each.
        choices: how each is asked.
        prompts: what each is asked for.
        are_asked: whether it really is these; one may stand for others that are not known yet.

    Raises:
        UserError: a missing or foreign file; something that a model cannot do.
    """
    found = []
    for (name, checkpoint), options in itertools.product(named, choices):
        pipeline = models.pipeline(checkpoint, torch.device("cpu"))
        try:
            request = pipeline.check([[prompt] for prompt in prompts[:1]], options)
            if are_asked:
                check_prompts(pipeline, prompts, options)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        sampler = str(request.options.sampler["name"])
        identity, steps = models.identity(checkpoint), request.sampler.steps
        embeds = isinstance(pipeline.model.conditioner, EmbeddingConditioner)
        embedder = pipeline.model.embedder() if embeds else None
        told = told_settings(checkpoint, models.options, options, request)
        found.append(Setting(name, checkpoint, identity, options, request.guidance, sampler, steps, told, embedder))
    return found


def check_prompts(pipeline: Pipeline, prompts: Iterable[Prompt], options: SamplingOptions) -> None:
    """Look at all that a model is to be asked for, before the first picture is made.

    Raises:
        UserError: a prompt that the model cannot draw, with the reason.
    """
    distinct = list({(prompt.text, prompt.weight): prompt for prompt in prompts}.values())
    try:
        pipeline.check([[prompt] for prompt in distinct], options)
    except UserError:  # of which one?
        for prompt in distinct:
            try:
                pipeline.check([[prompt]], options)
            except UserError as error:
                raise UserError(f"prompt {str(prompt)!r}: {error}") from None
        raise
    pipeline.model.conditioner.check_texts([prompt.text for prompt in distinct])


def told_settings(checkpoint: str, loading: ModelOptions, options: SamplingOptions, request: Request) -> Entry:
    """Return all that pictures are made with, but seed and device: files by name and checksum, and their size."""
    named = {"guide_model": loading.guide_model, "autoencoder": loading.autoencoder, "conditioner": loading.conditioner}
    files = {name: str(its) for name, its in named.items() if its is not None}
    values = OptionValues({"precision": loading.precision, **files})
    given = Given(checkpoint, loras=[str(its) for its in loading.lora], values=values,
                  noised_clip=[str(its) for its in loading.noised_clip or ()])  # fmt: skip
    told = described(given, options, request, "")
    height, width = (side * request.downscale for side in request.latent_size)
    return Entry({**{name: its for name, its in told.items() if name != "device"}, "width": width, "height": height})


@functools.cache
def checksum_of(checkpoint: str) -> str:
    """Return the sha256 of a model's file."""
    return sha256(locate_model(checkpoint))


def picture_seeds(seed: int, count: int) -> list[int]:
    """Return the seeds of the pictures of one seed: of seed 0 they are 0, 1, 2, ..., as sample.py counts."""
    return [seed * SEED_STEP + number for number in range(count)]
