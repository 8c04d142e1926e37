"""The main task: a denoiser in the latent space of a frozen autoencoder, told what conditioner and sources give."""

from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import Callback
from torch import Tensor
from torch.nn import functional as F

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.initialization import built
from ldm_lab.checkpoints.lora import FILE as LORA_FILE
from ldm_lab.checkpoints.lora import save_lora
from ldm_lab.checkpoints.models import read_model
from ldm_lab.checkpoints.native import save_model
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.condition_sources import build_sources, given_conditions
from ldm_lab.conditions import blank_conditions
from ldm_lab.config import ConditionerUse, PartConfig, RunConfig, register
from ldm_lab.data.source import Source
from ldm_lab.devices import pick_device
from ldm_lab.errors import UserError
from ldm_lab.interfaces import (
    Autoencoder,
    Batch,
    Conditioner,
    Conditions,
    ImageCondition,
    Objective,
    check_conditions,
    is_upsampler,
)
from ldm_lab.pretrained.own_runs import note_weights
from ldm_lab.training.caching import encoder_differences, encoder_facts
from ldm_lab.training.compiling import Compile, compile_network
from ldm_lab.training.conditioning import Conditioning
from ldm_lab.training.encoders import Encoders
from ldm_lab.training.initial import (
    check_forms,
    differences,
    differing_architecture,
    fitted,
    section_of,
    source_conditions,
)
from ldm_lab.training.logs import print_rank_zero
from ldm_lab.training.lora import additions
from ldm_lab.training.run_state import Checkpoint
from ldm_lab.training.sharding import Sharded
from ldm_lab.training.spread import LatentSpread
from ldm_lab.training.task import Task
from ldm_lab.training.texts import cut_summary, load_conditioner, text_callbacks, watch
from ldm_lab.training.timesteps import TIMESTEP_SAMPLERS, UniformTimesteps

DROPOUT = 0.2  # share of conditions that are dropped unless the config says otherwise (cloob-latent-diffusion's)


OWN_CALLBACKS = ("demo", "enlargements", "inpaintings", "ema_snapshots", "held_out", "evaluate")


@register("task", "diffusion")
class DiffusionTask(Task):
    """Train a denoiser on latents of images, conditioned on what a conditioner and condition sources say of them."""

    ROLES = (
        *("autoencoder", "conditioner", "condition_sources", "denoiser", "objective"),
        *("cache", "demo", "enlargements", "inpaintings", "ema_snapshots", "held_out", "evaluate", "lora"),
    )
    REQUIRED = ("data", "autoencoder", "conditioner", "denoiser", "objective")
    NETWORK = ("denoiser", "objective")

    def __init__(self, config: RunConfig, read_weights: bool = True, weights_follow: bool = False) -> None:
        super().__init__(config, read_weights)
        autoencoder: Autoencoder = load_part("autoencoder", config["autoencoder"], read_weights)
        conditioner = load_conditioner(config, read_weights)
        self.sources = build_sources(config.condition_sources)
        self.frozen = {"autoencoder": autoencoder, "conditioner": conditioner, **self.sources}
        in_precision = [config[role].get("precision") for role in ("autoencoder", "conditioner")]
        self.encoders = Encoders(autoencoder, conditioner, *in_precision)
        self.objective: Objective = config["objective"].build()
        dropout = config["conditioner"].use_as(ConditionerUse).dropout
        self.dropout = DROPOUT if dropout is None else dropout
        self.conditioning = Conditioning(config["conditioner"], conditioner, read_weights and self.lora is None)
        given = given_conditions(conditioner, self.sources)
        denoiser, self.drawn = built(partial(config["denoiser"].build, autoencoder.channels, given), weights_follow)
        check_conditions(denoiser, given)
        self.objective.check_denoiser(denoiser)
        self.check_image_size(config["data"].get("image_size"), autoencoder.downscale * denoiser.multiple_of)
        self.set_model(denoiser)
        self.spread = LatentSpread(
            autoencoder, config.init_from is not None or config.part("resume").option("checkpoint") is not None
        )

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
        if not self.rehearsing:
            self.spread.watch(x0)
        keep = torch.rand(len(x0), device=self.device) > self.dropout  # [B]
        conditions = drop(conditions, conditions if self.rehearsing else self.conditioner.null(conditions), keep)
        conditions |= self.from_sources(batch, x0)
        self.laps.lap("encode")
        drawn = self.objective.times(self.timesteps(self.samples_seen, len(x0)))  # [B], on the CPU
        t = drawn.to(x0, non_blocking=True)  # [B]
        noise = torch.randn_like(x0)  # [B, C, h, w]
        terms = self.objective.loss_terms(self.model, x0, conditions, t, noise)  # {"loss": [B], ...}
        self.log_means({name: term.mean() for name, term in terms.items()}, len(x0))
        self.log_by_time(terms["loss"], drawn)
        return terms["loss"].mean()

    def rehearse(self, batch: Batch) -> Tensor:
        self.timesteps = UniformTimesteps(self.seed, 0, 1)
        self.encoders.in_chunks = trains_on_cpu(self.run_config)  # wherever it is counted
        return super().rehearse(batch)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of images of a size, pixels."""
        side = image_size // self.autoencoder.downscale
        return self.autoencoder.channels, side, side

    @torch.no_grad()
    def encode(self, batch: Batch, noisy: bool = True) -> tuple[Tensor, Conditions]:
        """Return posterior samples of the latents, [B, C, h, w], and what the denoiser is told, name -> [B, ...].

        A cached batch brings moments of the latents, and conditions, instead of images.

        Args:
            batch: of images, or of a cache.
            noisy: add the noise of training to images' embeddings (`conditioner.gap`).
        """
        with torch.autocast(self.device.type, enabled=False):  # whatever the denoiser's precision is
            if batch.mean is not None:
                mean, logvar = batch.mean.float(), batch.logvar.float()  # [B, C, h, w] each
            else:
                mean, logvar = self.encoders.moments(batch.image)  # [B, C, h, w] each
            x0 = self.autoencoder.sample(mean, logvar, torch.randn_like(mean))  # [B, C, h, w]
            conditions = dict(batch.conditions)
            if not conditions and self.rehearsing and not any(True for _ in self.conditioner.parameters()):
                conditions = blank_conditions(self.conditioner.spec, len(x0))  # of a model that is not loaded, too
            if not conditions and (self.conditioning.reads_images or self.rehearsing):
                conditions = self.encoders.conditions(batch, self.device.type)  # name -> [B, ...]
            conditions = {k: its.float() if its.is_floating_point() else its for k, its in conditions.items()}
            return x0, conditions if self.rehearsing else self.conditioning(batch, conditions, noisy)

    @torch.no_grad()
    def from_sources(self, batch: Batch, x0: Tensor) -> Conditions:
        """Return what the condition sources give, name -> [B, ...]; it is never dropped."""
        given: Conditions = {}
        if self.rehearsing:  # some decide by the numbers that they draw, and no numbers are there
            for source in self.sources.values():
                given |= blank_conditions(source.spec, len(x0), *x0.shape[2:])
            return given
        with torch.autocast(self.device.type, enabled=False):  # the frozen parts stay in fp32
            for source in self.sources.values():
                given |= source.from_batch(batch, x0, self.autoencoder, None)
        return given

    def log_by_time(self, loss: Tensor, t: Tensor) -> None:
        """Log the mean loss [B] of each quarter of [0, 1), at logging steps only; t [B] is on the CPU."""
        if not self.is_logged:
            return
        one_hot = F.one_hot((t * 4).long(), 4)  # [B, 4]
        counts = one_hot.sum(0)  # [4]
        means = loss.detach() @ (one_hot / counts.clamp(min=1)).to(loss, non_blocking=True)  # [4]
        for i, count in enumerate(counts.tolist()):
            if count:
                self.log(f"train/loss_t{i / 4:.2f}", means[i], batch_size=len(t))

    # ------------------------------------------------------------------------------------------------- before it begins

    def compile_network(self, what: Compile) -> str:
        checkpoints = bool(self.run_config["denoiser"].option("gradient_checkpointing"))
        return compile_network(self.model, what, checkpoints)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharded):
            for network in (self.model, self.model_ema):
                if network is not None:
                    self.trainer.strategy.share_out(network)

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

    def check_encoded_by(self, source: Source, where: str) -> None:
        """Raise UserError for a cache, described at a key path, that other frozen parts than the run's have made."""
        for role, there in source.encoded_by.items():
            here = encoder_facts(self.run_config[role], self.frozen_sha256.get(role))
            if other := encoder_differences(role, there, here):
                raise UserError(f"{where}.path: this cache was made with another {', '.join(other)}")
        watch(source, self.conditioner)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if is_upsampler(self.model.spec):
            say_enlarged(self.run_config["data"])
        self.check_encoded_by(self.trainer.datamodule.source, "data")
        timestep_sampler = TIMESTEP_SAMPLERS[self.objective.timestep_sampler]
        self.timesteps = timestep_sampler(self.seed, self.global_rank, self.trainer.world_size)

    def on_train_end(self) -> None:
        self.spread.report()  # of a run of few images

    def initial_weights(self, path: str) -> tuple[dict[str, Tensor], str]:
        loaded, state, extra = read_model(path)
        theirs, ours = section_of(loaded, "denoiser"), Section(self.run_config["denoiser"].to_dict())
        if theirs.get("name") != ours["name"]:
            raise UserError(
                f"init_from: {path} holds the denoiser {theirs.get('name')!r}, denoiser.name is {ours['name']!r}"
            )
        given = source_conditions(build_sources(loaded.get("condition_sources")))
        check_forms(path, given, self.model.spec)
        if differing := differing_architecture(type(self.model), theirs, ours):
            raise UserError(f"init_from: {path} is of another size: {'; '.join(differing)}")
        for line in differences(path, loaded, self.run_config, self.autoencoder):
            print_rank_zero(f"init_from: {line}")
        state = self.conditioning.begin_with(path, state, adds=self.lora is not None)
        state, line = fitted(path, self.model, state, given)
        if line and self.lora is not None:
            raise UserError(f"lora: needs all of the network from init_from: {line}")
        if line:
            print_rank_zero(f"init_from: {line}")
        return state, f"weights of {path} (step {extra.get('step', 'unknown')})"

    def callbacks(self, folder: Path) -> list[Callback]:
        sections = {role: self.run_config.get(role) for role in OWN_CALLBACKS}
        for role in ("demo", "evaluate") if is_upsampler(self.model.spec) else ():
            if sections[role] is not None:
                raise UserError(f"{role}: an upsampler makes no picture of a prompt alone; `enlargements` draws")
        if sections["enlargements"] is not None and not is_upsampler(self.model.spec):
            raise UserError("enlargements: are an upsampler's; `demo` draws what a base model makes")
        if sections["inpaintings"] is not None and "inpaint" not in self.sources:
            raise UserError("inpaintings: are an inpainting model's, which condition_sources.inpaint makes")
        if sections["ema_snapshots"] is not None and self.lora is not None:
            raise UserError("ema_snapshots: are of a whole network, and with a section lora none is trained")
        own = [section.build(folder) for section in sections.values() if section is not None]
        return text_callbacks(self.run_config, self.conditioner) + own

    # ------------------------------------------------------------------------------------------------ what it leaves

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FORMAT]["model"] = self.model_config().to_dict()
        checkpoint[FORMAT]["image_size"] = self.picture_size()
        self.conditioning.put_into(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.conditioning.take_from(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)

    def export(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Write `ema.safetensors`: the averaged denoiser with the config that rebuilds it; of LoRA its own file."""
        self.write_model(folder / ("ema.safetensors" if self.base is None else LORA_FILE), weights, dtype, {})

    def write_model(self, path: Path, state: dict[str, Tensor], dtype: torch.dtype, facts: dict[str, str]) -> None:
        """Write weights of the denoiser, of LoRA the additions, with the config that rebuilds it, and further facts."""
        config, facts = self.model_config(), {**self.facts(), **facts}
        if self.base is None:
            weights = {name: value.to(dtype) for name, value in state.items()}
            self.conditioning.put_into(weights)
            save_model(path, weights, config.to_dict(), facts)
        else:
            save_lora(
                path, {name: value.to(dtype) for name, value in additions(state).items()}, config, self.base, facts
            )
        note_weights(path)

    def facts(self) -> dict[str, str]:
        """Return what is told of the weights besides."""
        told = {"step": str(self.trainer.global_step), "image_size": str(self.picture_size()), **self.frozen_facts}
        images = (self.at_step or self).samples_seen
        return {**told, **self.history.facts(self.trainer, self.run_config, images), **self.conditioning.facts()}

    def picture_size(self) -> int | None:
        """Return the side of training images, pixels, of crops that of what they are cut from; None if it is any."""
        source = self.trainer.datamodule.source
        return source.picture_size if is_upsampler(self.model.spec) else source.image_size

    def model_config(self) -> RunConfig:
        """Return the run's config with what the model was trained with written out, whatever the config left open."""
        statistics = {key: value.tolist() for key, value in self.autoencoder.latent_statistics().items()}
        config = self.run_config
        config = config.with_part("autoencoder", config["autoencoder"].with_use(**statistics))
        conditioner = config["conditioner"].with_use(dropout=self.dropout, store=None, missing=None)
        return config.with_part("conditioner", self.conditioning.stored(conditioner))

    def summary(self) -> list[str]:
        return self.conditioning.summary() + cut_summary(self.conditioner)


def say_enlarged(data: PartConfig) -> None:
    """Say that an upsampler is trained on images which are enlarged themselves, if its data let them through."""
    size, least = data.get("image_size"), data.option("min_size")
    if data.option("resize_to") is None and isinstance(size, int) and isinstance(least, int) and least < size:
        print_rank_zero(
            f"data.min_size: {least}: images of less than {size} px are enlarged first, and an upsampler learns to "
            f"make blurred ones; data.min_size={size} skips them"
        )


def trains_on_cpu(config: RunConfig) -> bool:
    """Return whether a run takes the CPU of this machine."""
    accelerator = config.part("trainer").option("accelerator")
    return accelerator == "cpu" or (accelerator == "auto" and pick_device(None).type == "cpu")


def drop(conditions: Conditions, null: Conditions, keep: Tensor) -> Conditions:
    """Return the conditions where `keep` [B] is true and the null conditions elsewhere, name -> [B, ...].

    Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """
    return {
        name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, null[name])
        for name, value in conditions.items()
    }
