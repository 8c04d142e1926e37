"""What pictures are made with in an evaluation: models, and the choices of sampling that are compared."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ldm_lab.checkpoints.parts import weights_sha256
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
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


def model_names(checkpoints: Sequence[str]) -> list[str]:
    """Return a name for each model: as short as they stay apart. Raises UserError for one that is given twice."""
    paths = [Path(checkpoint) for checkpoint in checkpoints]
    ways = (
        [model_name(path).removesuffix(".safetensors").removesuffix(".ckpt") for path in checkpoints],
        [f"{path.absolute().parent.name}/{path.stem}" for path in paths],
        [str(path) for path in paths],
    )
    for names in ways:
        if len({*names}) == len(names):
            return names
    twice = next(name for name in ways[-1] if ways[-1].count(name) > 1)
    raise UserError(f"--checkpoint {twice}: is given twice")


def settings_of(
    models: Models, checkpoints: Sequence[str], choices: Sequence[SamplingOptions], prompts: Sequence[Prompt]
) -> list[Setting]:
    """Return every model with every choice, models first.

    Raises:
        UserError: a missing or foreign file; something that a model cannot do.
    """
    found = []
    names = model_names(checkpoints)
    for (name, checkpoint), options in itertools.product(zip(names, checkpoints, strict=True), choices):
        pipeline = models.pipeline(checkpoint, torch.device("cpu"))
        try:
            request = pipeline.check([[prompt] for prompt in prompts[:1]], options)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from None
        sampler = str(request.options.sampler["name"])
        identity, steps = models.identity(checkpoint), request.sampler.steps
        embeds = isinstance(pipeline.model.conditioner, EmbeddingConditioner)
        embedder = pipeline.model.embedder() if embeds else None
        told = told_settings(checkpoint, models.options, options, request)
        found.append(Setting(name, checkpoint, identity, options, request.guidance, sampler, steps, told, embedder))
    return found


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
