"""The main task: a denoiser in the latent space of a frozen autoencoder, conditioned by a frozen conditioner."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import Tensor

from ldm_lab.checkpoints.models import read_model, save_model
from ldm_lab.checkpoints.parts import FORMAT, load_part
from ldm_lab.config import build, options, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Batch
from ldm_lab.training.logs import say
from ldm_lab.training.low_res import LowRes
from ldm_lab.training.task import Task
from ldm_lab.training.timesteps import TIMESTEP_SAMPLERS

# Attributes of a denoiser that say which form it has -> such a one, and one without it, in words.
FORMS = {"super_res": ("an upsampler", "a base model")}
DROPOUT = 0.2  # share of conditions that are dropped unless the config says otherwise (cloob-latent-diffusion's)


@register("task", "diffusion")
class DiffusionTask(Task):
    """Train a denoiser on latents of images, conditioned on embeddings of the same images."""

    ROLES = ("autoencoder", "conditioner", "denoiser", "objective", "low_res", "cache", "demo", "enlargements")
    REQUIRED = ("data", "autoencoder", "conditioner", "denoiser", "objective")
    NETWORK = ("denoiser", "objective")

    def __init__(self, config: dict[str, Any], read_weights: bool = True) -> None:
        super().__init__(config, read_weights)
        autoencoder = load_part("autoencoder", config["autoencoder"], read_weights)
        conditioner = load_part("conditioner", config["conditioner"], read_weights)
        self.frozen = {"autoencoder": autoencoder, "conditioner": conditioner}
        self.objective = build("objective", config["objective"])
        self.dropout = config["conditioner"].get("dropout", DROPOUT)
        self.adopt(build("denoiser", config["denoiser"], autoencoder.channels, conditioner.embed_dim))
        check_fit(conditioner, self.model, self.objective)
        self.low_res = low_resolution(config, self.model)
        size, unit = config["data"].get("image_size"), autoencoder.downscale * self.model.multiple_of
        if size is not None and size % unit:
            raise UserError(f"data.image_size: {size} is not a multiple of {unit}, which this model's levels need")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0, cond = self.encode(batch)  # [B, C, h, w], {"embed": [B, D]} or {"tokens": [B, L], "mask": [B, L]}
        t = self.timesteps(self.batches_seen, len(x0)).to(x0)  # [B]
        noise = torch.randn_like(x0)  # [B, C, h, w]
        terms = self.objective.loss_terms(self.model, x0, cond, t, noise)  # {"loss": [B], ...}
        self.log_means({name: term.mean() for name, term in terms.items()}, len(x0))
        self.log_by_time(terms["loss"], t)
        return terms["loss"].mean()

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return posterior samples of the latents, [B, C, h, w], and the condition, dropped for a share of the rows.

        A cached batch brings `mean`, `logvar` and `conditions`, no `image`. An upsampler's condition has the image made
        small besides, as "low_res", which is never dropped.
        """
        autoencoder, conditioner = self.frozen["autoencoder"], self.frozen["conditioner"]
        with torch.autocast(self.device.type, enabled=False):  # the frozen parts stay in fp32
            if batch.mean is not None:
                mean, logvar = batch.mean.float(), batch.logvar.float()  # [B, C, h, w] each
            else:
                mean, logvar = autoencoder.moments(batch.image)  # [B, C, h, w] each
            x0 = autoencoder.sample(mean, logvar, torch.randn_like(mean))  # [B, C, h, w]
            cond = dict(batch.conditions) or conditioner.from_batch(batch)
        keep = torch.rand(len(x0), device=self.device) > self.dropout  # [B]
        cond = drop(cond, conditioner.null(cond), keep)
        if self.low_res is not None:
            cond["low_res"] = self.low_res(batch.require_image("train an upsampler"))  # [B, 3, H / factor, W / factor]
        return x0, cond

    def log_by_time(self, loss: Tensor, t: Tensor) -> None:
        """Log the mean loss of each quarter of [0, 1), at logging steps only."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
            return
        quarter = (t * 4).long()  # [B]
        one_hot = torch.nn.functional.one_hot(quarter, 4)  # [B, 4]
        means = (loss.detach()[:, None] * one_hot).sum(0) / one_hot.sum(0)  # [4], nan where a quarter has no sample
        for i, mean in enumerate(means):
            if mean == mean:
                self.log(f"train/loss_t{i / 4:.2f}", mean, batch_size=len(t))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        made_with = getattr(self.trainer.datamodule.source, "description", {})  # of a cache
        for role, checksum in self.frozen_sha256.items():
            if made_with.get(role, checksum) != checksum:
                raise UserError(f"data.path: this cache was made with another {role} than {role}.weights")
        timestep_sampler = TIMESTEP_SAMPLERS[self.objective.timestep_sampler]
        self.timesteps = timestep_sampler(self.seed, self.global_rank, self.trainer.world_size)

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        config, state, extra = read_model(path)
        ours = self.run_config["denoiser"]["name"]
        theirs, part = (s if isinstance(s := config.get(role), dict) else {} for role in ("denoiser", "autoencoder"))
        if theirs.get("name") != ours:
            raise UserError(f"init_from: {path} holds the denoiser {theirs.get('name')!r}, denoiser.name is {ours!r}")
        for form, (name, other) in FORMS.items():
            if bool(theirs.get(form)) != getattr(self.model, form, False):
                holds, wanted = (name, other) if theirs.get(form) else (other, name)
                raise UserError(f"init_from: {path} is {holds}, and denoiser.{form} asks for {wanted}")
        if theirs.get("inpaint") and not getattr(self.model, "inpaint", False):
            raise UserError(f"init_from: {path} is an inpainting model; denoiser.inpaint=true goes with it")
        if other := other_sizes(type(self.model), theirs, self.run_config["denoiser"]):
            raise UserError(f"init_from: {path} is of another size: {'; '.join(other)}")
        scale, before = getattr(self.frozen["autoencoder"], "scale", None), part.get("scale")
        if scale is not None and isinstance(before, float) and before > 0 and abs(float(scale) / before - 1) > 0.01:
            say(
                f"init_from: these weights were trained on latents divided by {before:g}, this run divides by "
                f"{float(scale):g} (autoencoder.scale={before:g} would be theirs)"
            )
        return state, f"weights of {path} (step {extra.get('step', 'unknown')})"

    def callbacks(self, folder: Path) -> list[Callback]:
        sections = {role: self.run_config.get(role) for role in ("demo", "enlargements")}
        if sections["demo"] is not None and self.low_res is not None:
            raise UserError("demo: an upsampler makes no picture of a prompt alone; `enlargements` draws what it makes")
        if sections["enlargements"] is not None and self.low_res is None:
            raise UserError("enlargements: are an upsampler's; `demo` draws what a base model makes")
        return [build(role, section, folder) for role, section in sections.items() if section is not None]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FORMAT]["model"] = self.model_config()

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write `ema.safetensors`: the averaged denoiser with the config that rebuilds it."""
        size = self.trainer.datamodule.source.image_size
        extra = {"step": str(self.trainer.global_step), "image_size": str(size), **self.frozen_sha256}
        state = {name: value.to(dtype) for name, value in self.best_model.state_dict().items()}
        save_model(folder / "ema.safetensors", state, self.model_config(), extra)

    def model_config(self) -> dict[str, Any]:
        """Return the run's config with what the model was trained with written out, whatever the config left open."""
        config = dict(self.run_config)
        if hasattr(self.frozen["autoencoder"], "scale"):  # the scale that was trained with is authoritative
            scale = float(self.frozen["autoencoder"].scale)
            config["autoencoder"] = {**config["autoencoder"], "scale": scale}
        config["conditioner"] = {**config["conditioner"], "dropout": self.dropout}
        return config


def check_fit(conditioner: Any, denoiser: Any, objective: Any) -> None:
    """Raise UserError if the denoiser does not read what the conditioner gives, or counts timesteps otherwise."""
    gives, takes = (getattr(part, name, ("embed",)) for part, name in ((conditioner, "gives"), (denoiser, "takes")))
    if not set(takes) <= set(gives):
        raise UserError(
            f"conditioner.name: {denoiser.part_name} reads {' and '.join(takes)}, and the conditioner "
            f"{conditioner.part_name} gives {' and '.join(gives)}"
        )
    if "tokens" in takes and denoiser.text_size != conditioner.text_size:
        raise UserError(
            f"conditioner.text_size: {conditioner.text_size}, and denoiser.text_size: {denoiser.text_size}; "
            "they have to be the same"
        )
    ours, theirs = getattr(denoiser, "timesteps", None), getattr(objective.schedule, "timesteps", None)
    if None not in (ours, theirs) and ours != theirs:
        raise UserError(f"objective.timesteps: {theirs}, and denoiser.timesteps: {ours}; they have to be the same")


def other_sizes(denoiser: type, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return the `SIZES` of a denoiser in which two of its config sections differ, each in words."""
    known, differing = options(denoiser), []
    for key in getattr(denoiser, "SIZES", ()):
        its, own = (section.get(key, known[key].default) for section in (theirs, ours))
        its, own = (list(size) if isinstance(size, tuple) else size for size in (its, own))
        if key == "attention":  # in any order
            its, own = sorted(its), sorted(own)
        if its != own:
            differing.append(f"its {key} is {its}, denoiser.{key} is {own}")
    return differing


def low_resolution(config: dict[str, Any], denoiser: Any) -> LowRes | None:
    """Return what makes an upsampler's condition; None for a denoiser that is none.

    Raises:
        UserError: a section `low_res` for a denoiser that is no upsampler, an image size that it does not divide.
    """
    if not getattr(denoiser, "super_res", False):
        if config.get("low_res") is not None:
            raise UserError("low_res: is for upsamplers; denoiser.super_res=true makes one")
        return None
    low_res = build("low_res", config.get("low_res"))
    size = config["data"].get("image_size")
    if size is not None and size % low_res.factor:
        raise UserError(f"data.image_size: {size} is not a multiple of low_res.factor, {low_res.factor}")
    return low_res


def drop(cond: dict[str, Tensor], null: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Return the condition where `keep` [B] is true and the null condition elsewhere.

    Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """
    return {
        name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, null[name]) for name, value in cond.items()
    }
