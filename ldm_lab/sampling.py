"""From prompts to pictures: conditioner, guided denoiser, sampler and autoencoder put together.

    from ldm_lab.sampling import Sampler

    sampler = Sampler.from_checkpoint("runs/quickstart/ema.safetensors")
    images = sampler(["a red star on a blue background", ["watercolor", "blurry:-0.5"]], seeds=[0, 1], guidance=3.0)

`sample.py` and the demo grids of training are thin layers over this class.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.parts import load_part, load_strictly, weights_sha256
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.guidance import guided, null_weight
from ldm_lab.images import to_images
from ldm_lab.objectives import Prediction
from ldm_lab.prompts import Prompt, parse_prompt

# One prompt: `text` or `text:weight`, or as an object. One picture's prompts: one of them, or several to be mixed.
OnePrompt = str | Prompt | Image.Image
Mix = OnePrompt | Sequence[OnePrompt]

log = logging.getLogger(__name__)

DECODE_BATCH = 8  # images; the autoencoder's full-size feature maps need far more memory than the denoiser's


class Sampler:
    """A trained model, ready to be asked for pictures.

    An image is made from its own prompts and its own seed: its noise comes from a generator of its own on the CPU, so
    that it is the same on every device, and no step mixes images. Batches of other sizes can still change its last
    bits, because matrix products round differently with other shapes: in fp32 on a CPU a latent moves by less than
    1e-4 of its norm, nearly all of it in the first steps, which divide by a small alpha, and a pixel by at most one of
    255 levels (`tests/test_sampling.py`).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        objective: Any,
        autoencoder: nn.Module,
        conditioner: nn.Module,
        *,
        dropout: float,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Take the parts of a model; all are used where they are, none is copied.

        Args:
            denoiser: the network, usually the averaged one.
            objective: what its output means.
            autoencoder: decodes latents.
            conditioner: encodes prompts.
            dropout: share of the conditions that were dropped in training; guidance needs more than 0.
            size: default height and width in pixels.
        """
        self.denoiser, self.objective = denoiser, objective
        self.autoencoder, self.conditioner = autoencoder, conditioner
        self.dropout, self.size = dropout, size

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        autoencoder: str | Path | None = None,
        conditioner: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> "Sampler":
        """Load a trained model with its averaged weights.

        Args:
            path: `ema.safetensors`, or a `.ckpt` of a run.
            autoencoder: weights file of the autoencoder, if not where the checkpoint says.
            conditioner: weights file of the conditioner, if not where the checkpoint says.
            device: where to run.

        Raises:
            UserError: missing, damaged or foreign file; weights of another architecture.
        """
        config, state, extra = read_model(path)
        for role in ("autoencoder", "conditioner", "denoiser", "objective"):
            if not isinstance(config.get(role), dict):
                raise UserError(f"{path}: not a diffusion model; its config has no section {role!r}")
        frozen = {
            role: _load_frozen(role, config[role], moved, extra.get(role))
            for role, moved in (("autoencoder", autoencoder), ("conditioner", conditioner))
        }
        channels, embed_dim = frozen["autoencoder"].channels, frozen["conditioner"].embed_dim
        denoiser = build("denoiser", config["denoiser"], channels, embed_dim)
        load_strictly(denoiser, state, path)
        side = extra.get("image_size", "")
        return cls(
            denoiser.eval().requires_grad_(False).to(device),
            build("objective", config["objective"]),
            frozen["autoencoder"].to(device),
            frozen["conditioner"].to(device),
            dropout=config["conditioner"].get("dropout", 0.0),
            size=(int(side), int(side)) if side.isdecimal() else None,
        )

    def __call__(self, prompts: Sequence[Mix], **options: Any) -> list[Image.Image]:
        """Return one 8-bit RGB image per entry of `prompts`. Options and errors are those of `batches`."""
        return [image for batch in self.batches(prompts, **options) for image in batch]

    def batches(
        self,
        prompts: Sequence[Mix],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float = 3.0,
        sampler: str | dict[str, Any] = "plms",
        size: int | tuple[int, int] | None = None,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[list[Image.Image]]:
        """Return an iterator over the images, batch by batch, in the order of `prompts`.

        Args:
            prompts: one entry per image: a text (`text` or `text:weight`, see `ldm_lab.prompts`), a `Prompt`, a Pillow
                image as an image prompt, or a list of these that are mixed by their weights.
            seeds: one per image; by default 0, 1, 2, ...
            guidance: weight of the prompts that have none.
            sampler: a sampler's name, or its config section such as {"name": "ddim", "steps": 50, "eta": 0.5}.
            size: pixels: a square's side, or height and width; by default the size of training.
            batch_size: images at once; the denoiser sees 1 + (number of prompts) rows for each.
            progress: called after each step as `progress(steps done, steps in all)`, counted over all batches.

        Raises:
            UserError: an unknown sampler or option, a size that the model's levels do not divide, guidance asked of a
                model that was trained without dropped conditions, no prompt for an image, a weight that is not finite.
        """
        walk = build("sampler", {"name": sampler} if isinstance(sampler, str) else sampler)
        latent_size = self.latent_size(size)
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise UserError(f"seeds: {len(seeds)} for {len(prompts)} images; one per image is needed")
        if batch_size < 1:
            raise UserError(f"batch_size: at least 1 is needed, not {batch_size}")
        mixes = [as_mix(entry) for entry in prompts]
        weights = self._weights(mixes, guidance)  # [N, k]
        total = math.ceil(len(mixes) / batch_size) * walk.steps
        embedded, index = self._encode(mixes)  # [U, ...] for U distinct prompts, [N, k]

        def run() -> Iterator[list[Image.Image]]:
            for first in range(0, len(mixes), batch_size):
                part = slice(first, first + batch_size)
                done = first // batch_size * walk.steps
                report = (lambda step, x, x0, done=done: progress(done + step + 1, total)) if progress else None
                cond = {name: rows[index[part].to(rows.device)] for name, rows in embedded.items()}  # [B, k, ...]
                latents = self.latents(walk, latent_size, cond, weights[part], seeds[part], report)  # [B, C, h, w]
                yield self.decode(latents)

        return run()

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Return height and width of the latents for a size in pixels.

        Raises:
            UserError: no size known, or one that autoencoder and denoiser do not divide.
        """
        size = self.size if size is None else size
        if size is None:
            raise UserError("size: this checkpoint does not say what size it was trained at; give one (--size)")
        height, width = (size, size) if isinstance(size, int) else size
        unit = self.autoencoder.downscale * self.denoiser.multiple_of
        if height < 1 or width < 1 or height % unit or width % unit:
            near = [max(1, round(side / unit)) * unit for side in (width, height)]
            raise UserError(
                f"size {width}x{height}: this model takes multiples of {unit} pixels, such as {near[0]}x{near[1]}"
            )
        return height // self.autoencoder.downscale, width // self.autoencoder.downscale

    @torch.no_grad()
    def latents(
        self,
        walk: Callable[..., Tensor],
        latent_size: tuple[int, int],
        cond: dict[str, Tensor],
        weights: Tensor,
        seeds: Sequence[int],
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Return one batch of latents, float32 [B, C, h, w].

        Args:
            walk: a sampler (`ldm_lab.samplers`).
            latent_size: h and w.
            cond: conditions, tensors of [B, k, ...] on the model's device.
            weights: of the conditions, [B, k], on the CPU.
            seeds: one per image.
            callback: handed to the sampler.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise(x: Tensor) -> Tensor:
            rows = [torch.randn(x.shape[1:], generator=generator) for generator in generators]  # [C, h, w] each
            return torch.stack(rows).to(x.device)  # [B, C, h, w]

        def predict(x: Tensor, t: Tensor, rows: dict[str, Tensor]) -> Prediction:
            return self.objective.predict(self.denoiser, x, t, rows)

        null = self.conditioner.null({name: value[:, 0] for name, value in cond.items()})  # [B, ...]
        start = torch.empty(len(seeds), self.autoencoder.channels, *latent_size, device=self.device)  # [B, C, h, w]
        with _evaluating(self.denoiser):
            return walk(
                guided(predict, cond, null, weights),
                noise(start),
                schedule=self.objective.schedule,
                noise=noise,
                callback=callback,
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the images of latents [B, C, h, w]."""
        return [image for part in latents.split(DECODE_BATCH) for image in to_images(self.autoencoder.decode(part))]

    def _weights(self, mixes: list[list[Prompt]], guidance: float) -> Tensor:
        """Return the weights, float64 [N, k], 0 where an image has fewer than k prompts."""
        rows = [[guidance if prompt.weight is None else prompt.weight for prompt in mix] for mix in mixes]
        longest = max(map(len, rows), default=0)
        weights = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows], dtype=torch.float64)  # [N, k]
        if not weights.isfinite().all():
            raise UserError("guidance and weights have to be finite numbers")
        if not self.dropout and len(mixes) and null_weight(weights).any():
            raise UserError(
                "guidance needs a model that was trained with dropped conditions (conditioner.dropout above 0); "
                "with this one the weights of an image have to add up to 1, as a single prompt's with --guidance 1 do"
            )
        return weights

    @torch.no_grad()
    def _encode(self, mixes: list[list[Prompt]]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the conditions of the U distinct prompts, [U, ...], and which of them each image has, [N, k].

        They are encoded one at a time: an embedding that depended on its neighbours would change the image.
        """
        longest = max(map(len, mixes), default=0)
        index = torch.zeros(
            len(mixes), longest, dtype=torch.long
        )  # [N, k]; any prompt, at weight 0, where there is none
        numbers: dict[Any, int] = {}
        conds: list[dict[str, Tensor]] = []
        for i, mix in enumerate(mixes):
            for j, prompt in enumerate(mix):
                key = prompt.text if prompt.image is None else id(prompt.image)
                if key not in numbers:
                    numbers[key] = len(conds)
                    texts, images = ([prompt.text], []) if prompt.image is None else ([], [prompt.image])
                    conds.append(self.conditioner.from_prompts(texts, images))  # [1, ...]
                index[i, j] = numbers[key]
        names = conds[0] if conds else ()
        return {name: torch.cat([cond[name] for cond in conds]) for name in names}, index


def as_mix(entry: Mix) -> list[Prompt]:
    """Return the prompts of one image. Raises UserError for an empty mix, or a weight that is not finite."""
    if isinstance(entry, str):
        return [parse_prompt(entry)]
    if isinstance(entry, Prompt):
        return [entry]
    if isinstance(entry, Image.Image):
        return [Prompt("image", image=entry)]
    if not entry:
        raise UserError("an image needs at least one prompt")
    return [prompt for part in entry for prompt in as_mix(part)]


def _load_frozen(role: str, section: dict[str, Any], moved: str | Path | None, trained_with: str | None) -> nn.Module:
    """Return a frozen part of a checkpoint, from `moved` if given; warn if it is not the file of training."""
    if moved is not None:
        section = {**section, "weights": str(moved)}
    try:
        part = load_part(role, section)
        given = weights_sha256(role, section)
    except UserError as error:
        hint = "" if moved else f"; if it lies elsewhere, say where: --{role} FILE"
        raise UserError(f"{role} of the checkpoint: {error}{hint}") from None
    if trained_with and given != trained_with:
        name = section.get("weights") or section.get("pretrained") or section.get("model")
        log.warning("%s: not the %s file that the model was trained with", name, role)
    return part


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a while; during training it may be the one that is trained."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
