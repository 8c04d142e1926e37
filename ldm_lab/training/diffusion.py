"""The main task: a denoiser in the latent space of a frozen autoencoder, told what conditioner and sources give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import listed, save_model
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.config import ConditionerUse, RunConfig, register, signature_options
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    Conditioner,
    Conditions,
    ConditionSpec,
    Denoiser,
    ImageCondition,
    Objective,
    check_conditions,
    is_upsampler,
)
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.task import Task
from ldm_lab.training.timesteps import TIMESTEP_SAMPLERS

DROPOUT = 0.2  # share of conditions that are dropped unless the config says otherwise (cloob-latent-diffusion's)
NEARLY = 0.01  # relative difference of two latent stds that is not worth a line


@register("task", "diffusion")
class DiffusionTask(Task):
    """Train a denoiser on latents of images, conditioned on what a conditioner and condition sources say of them."""

    ROLES = (
        *("autoencoder", "conditioner", "condition_sources", "denoiser", "objective"),
        *("cache", "demo", "enlargements"),
    )
    REQUIRED = ("data", "autoencoder", "conditioner", "denoiser", "objective")
    NETWORK = ("denoiser", "objective")

    def __init__(self, config: RunConfig, read_weights: bool = True) -> None:
        super().__init__(config, read_weights)
        autoencoder: Autoencoder = load_part("autoencoder", config["autoencoder"], read_weights)
        conditioner: Conditioner = load_part("conditioner", config["conditioner"], read_weights)
        self.sources = build_sources(config.condition_sources)
        self.frozen = {"autoencoder": autoencoder, "conditioner": conditioner, **self.sources}
        self.objective: Objective = config["objective"].build()
        dropout = config["conditioner"].use_as(ConditionerUse).dropout
        self.dropout = DROPOUT if dropout is None else dropout
        given = given_conditions(conditioner, self.sources)
        denoiser: Denoiser = config["denoiser"].build(autoencoder.channels, given)
        check_conditions(denoiser, given)
        self.objective.check_denoiser(denoiser)
        self.check_image_size(config["data"].get("image_size"), autoencoder.downscale * denoiser.multiple_of)
        self.set_model(denoiser)

    @property
    def autoencoder(self) -> Autoencoder:
        """The frozen autoencoder."""
        return self.frozen["autoencoder"]

    @property
    def conditioner(self) -> Conditioner:
        """The frozen conditioner."""
        return self.frozen["conditioner"]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0, conditions = self.encode(batch)  # [B, C, h, w], name -> [B, ...]
        keep = torch.rand(len(x0), device=self.device) > self.dropout  # [B]
        conditions = drop(conditions, self.conditioner.null(conditions), keep)
        conditions |= self.from_sources(batch, x0)
        t = self.timesteps(self.batches_seen, len(x0)).to(x0)  # [B]
        noise = torch.randn_like(x0)  # [B, C, h, w]
        terms = self.objective.loss_terms(self.model, x0, conditions, t, noise)  # {"loss": [B], ...}
        self.log_means({name: term.mean() for name, term in terms.items()}, len(x0))
        self.log_by_time(terms["loss"], t)
        return terms["loss"].mean()

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Conditions]:
        """Return posterior samples of the latents, [B, C, h, w], and what the conditioner gives, name -> [B, ...].

        A cached batch brings moments of the latents, and conditions, instead of images.
        """
        with torch.autocast(self.device.type, enabled=False):  # the frozen parts stay in fp32
            if batch.mean is not None:
                mean, logvar = batch.mean.float(), batch.logvar.float()  # [B, C, h, w] each
            else:
                mean, logvar = self.autoencoder.moments(batch.image)  # [B, C, h, w] each
            x0 = self.autoencoder.sample(mean, logvar, torch.randn_like(mean))  # [B, C, h, w]
            return x0, dict(batch.conditions) or self.conditioner.from_batch(batch)

    @torch.no_grad()
    def from_sources(self, batch: Batch, x0: Tensor) -> Conditions:
        """Return what the condition sources give, name -> [B, ...]; it is never dropped."""
        given: Conditions = {}
        for source in self.sources.values():
            given |= source.from_batch(batch, x0, None)
        return given

    def log_by_time(self, loss: Tensor, t: Tensor) -> None:
        """Log the mean loss of each quarter of [0, 1), at logging steps only."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
            return
        one_hot = F.one_hot((t * 4).long(), 4)  # [B, 4]
        means = (loss.detach()[:, None] * one_hot).sum(0) / one_hot.sum(0)  # [4], nan where a quarter has no sample
        for i, mean in enumerate(means):
            if mean == mean:
                self.log(f"train/loss_t{i / 4:.2f}", mean, batch_size=len(t))

    # ------------------------------------------------------------------------------------------------- before it begins

    def check_image_size(self, size: int | None, unit: int) -> None:
        """Raise UserError for images that the levels of the network, or a condition source, do not divide.

        Args:
            size: height and width of the images, pixels; None is left to the loader.
            unit: what the network needs a multiple of, pixels.
        """
        if size is None:
            return
        if size % unit:
            raise UserError(f"data.image_size: {size} is not a multiple of {unit}, which this model's levels need")
        for name, source in self.sources.items():
            for kind in source.spec.values():
                if isinstance(kind, ImageCondition) and size % kind.scale_factor:
                    where = f"condition_sources.{name}.scale_factor"
                    raise UserError(f"data.image_size: {size} is not a multiple of {where}, {kind.scale_factor}")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        made_with = self.trainer.datamodule.source.encoded_by
        for role, checksum in self.frozen_sha256.items():
            if made_with.get(role, checksum) != checksum:
                raise UserError(f"data.path: this cache was made with another {role} than {role}.weights")
        timestep_sampler = TIMESTEP_SAMPLERS[self.objective.timestep_sampler]
        self.timesteps = timestep_sampler(self.seed, self.global_rank, self.trainer.world_size)

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        loaded, state, extra = read_model(path)
        theirs, ours = section_of(loaded, "denoiser"), self.run_config["denoiser"]
        if theirs.get("name") != ours["name"]:
            raise UserError(
                f"init_from: {path} holds the denoiser {theirs.get('name')!r}, denoiser.name is {ours['name']!r}"
            )
        check_forms(path, source_conditions(loaded), self.model.spec)
        if differing := differing_architecture(type(self.model), theirs, ours):
            raise UserError(f"init_from: {path} is of another size: {'; '.join(differing)}")
        before, std = section_of(loaded, "autoencoder").get("latent_std"), self.autoencoder.latent_std
        if isinstance(before, float) and before > 0 and bool(((std / before - 1).abs() > NEARLY).any()):
            print_rank_zero(
                f"init_from: these weights were trained on latents divided by {before:g}, this run divides by "
                f"{listed(std)} (autoencoder.latent_std={before:g} would be theirs)"
            )
        return state, f"weights of {path} (step {extra.get('step', 'unknown')})"

    def callbacks(self, folder: Path) -> list[Callback]:
        sections = {role: self.run_config.get(role) for role in ("demo", "enlargements")}
        if sections["demo"] is not None and is_upsampler(self.model.spec):
            raise UserError("demo: an upsampler makes no picture of a prompt alone; `enlargements` draws what it makes")
        if sections["enlargements"] is not None and not is_upsampler(self.model.spec):
            raise UserError("enlargements: are an upsampler's; `demo` draws what a base model makes")
        return [section.build(folder) for section in sections.values() if section is not None]

    # ------------------------------------------------------------------------------------------------ what it leaves

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FORMAT]["model"] = self.model_config().to_dict()

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write `ema.safetensors`: the averaged denoiser with the config that rebuilds it."""
        size = self.trainer.datamodule.source.image_size
        extra = {"step": str(self.trainer.global_step), "image_size": str(size), **self.frozen_sha256}
        state = {name: value.to(dtype) for name, value in self.best_model.state_dict().items()}
        save_model(folder / "ema.safetensors", state, self.model_config().to_dict(), extra)

    def model_config(self) -> RunConfig:
        """Return the run's config with what the model was trained with written out, whatever the config left open."""
        statistics = {key: value.tolist() for key, value in self.autoencoder.latent_statistics().items()}
        config = self.run_config
        config = config.with_part("autoencoder", config["autoencoder"].with_use(**statistics))
        return config.with_part("conditioner", config["conditioner"].with_use(dropout=self.dropout))


def drop(conditions: Conditions, null: Conditions, keep: Tensor) -> Conditions:
    """Return the conditions where `keep` [B] is true and the null conditions elsewhere, name -> [B, ...].

    Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """
    return {
        name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, null[name])
        for name, value in conditions.items()
    }


# ------------------------------------------------------------------------------------------ weights to begin with


def section_of(config: dict[str, Any], role: str) -> dict[str, Any]:
    """Return a section of a config that came out of a file; nothing where it is no section."""
    section = config.get(role)
    return section if isinstance(section, dict) else {}


def source_conditions(config: dict[str, Any]) -> ConditionSpec:
    """Return what the condition sources of a config give. Raises UserError for sources that are not known."""
    sources = build_sources(config.get("condition_sources"))
    return {name: kind for source in sources.values() for name, kind in source.spec.items()}


def check_forms(path: str, theirs: ConditionSpec, ours: ConditionSpec) -> None:
    """Raise UserError if a checkpoint is of another form of network than a run's.

    More conditions than the checkpoint's are welcome: weights for them begin as initialized. Those of a base model are
    none to begin an upsampler with.

    Args:
        path: of the checkpoint.
        theirs: what the checkpoint's condition sources give.
        ours: what the run's denoiser takes.
    """
    words = {True: "an upsampler", False: "a base model"}
    if is_upsampler(theirs) != is_upsampler(ours):
        holds, wanted = words[is_upsampler(theirs)], words[is_upsampler(ours)]
        raise UserError(f"init_from: {path} is {holds}, and condition_sources of this config make {wanted}")
    if missing := [name for name in theirs if name not in ours]:
        raise UserError(
            f"init_from: {path} takes {' and '.join(missing)}, which no entry of condition_sources gives here"
        )


def differing_architecture(denoiser: type[Denoiser], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return the `architecture_keys` of a denoiser in which two of its config sections differ, each in words."""
    known, differing = signature_options(denoiser), []
    for key in denoiser.architecture_keys:
        its, own = (section.get(key, known[key].default) for section in (theirs, ours))
        its, own = (list(size) if isinstance(size, tuple) else size for size in (its, own))
        if key in denoiser.unordered_keys:
            its, own = sorted(its), sorted(own)
        if its != own:
            differing.append(f"its {key} is {its}, denoiser.{key} is {own}")
    return differing
