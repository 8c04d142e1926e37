"""How embeddings of texts and images are brought into one space: the section `conditioner.gap`, and its means."""

from typing import Literal

import torch
from torch import Tensor

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.gap_files import GapFile, read_gap
from ldm_lab.conditioners.gap import Gap
from ldm_lab.config import ConditionerUse, NonNegativeFloat, PartConfig, PositiveInt, build, register
from ldm_lab.errors import UserError
from ldm_lab.interfaces import ConditionSpec, Embedding
from ldm_lab.training.logs import print_rank_zero

FILE = "gap.safetensors"  # in the folder of a run that measured its means itself
MapChoice = Literal["none", "ridge", "residual", "best"]


@register("gap")
class GapOptions:
    """Take the means off image and text embeddings, and train with noise on those of images (`docs/no_captions.md`)."""

    def __init__(
        self,
        *,
        means: str | None = None,
        shift: bool = True,
        noise: NonNegativeFloat | None = None,
        map: MapChoice | None = None,
        texts: str | None = None,
        images: PositiveInt = 10_000,
    ) -> None:
        """Set what is done.

        Args:
            means: file that `python -m ldm_lab gap` wrote; null measures them when training starts.
            shift: take off the means; false trains with noise alone, which needs no file if `noise` is given.
            noise: mean length of what is added to an image's embedding, which has length 1, in training; null takes
                the measured one.
            map: from texts' embeddings to images', fitted on images that have captions: linear (ridge), a small
                network (residual), whichever finds held-out images best, or none; null takes what the file has.
            texts: file of texts, one a line, whose mean is taken where means are measured, or `captions`, those of the
                data; null takes some thousand texts that come with the program.
            images: how many are measured, evenly spread over the data.
        """
        self.means, self.shift, self.noise, self.map = means, shift, noise, map
        self.texts, self.images = texts, images

    @staticmethod
    def check(*, shift: bool, map: MapChoice | None) -> list[str]:
        """Return what is wrong across the options."""
        if not shift and map not in (None, "none"):
            return [f"map: {map} is of embeddings without their means, and shift=false leaves those in"]
        return []

    @staticmethod
    def unused(*, means: str | None, shift: bool, noise: float | None) -> dict[str, str]:
        """Return which options have no effect, and why."""
        if not shift and noise is not None:
            why = "shift=false with a noise needs nothing that is measured"
            return dict.fromkeys(("means", "map", "texts", "images"), why)
        if means is None:
            return {}
        return dict.fromkeys(
            ("texts", "images"), "means names a file, and these are of means that a run measures itself"
        )

    @property
    def needs_means(self) -> bool:
        """Whether something of it is measured."""
        return self.shift or self.noise is None


def gap_options(conditioner: PartConfig) -> GapOptions | None:
    """Return the section `gap` of a conditioner's section; None without one."""
    section = conditioner.use_as(ConditionerUse).gap
    options: GapOptions | None = None if section is None else build("gap", section)
    return options


def gap_in_training(conditioner: PartConfig, spec: ConditionSpec) -> Gap:
    """Return what a run shifts embeddings by.

    Args:
        conditioner: its section, with a section `gap`.
        spec: what it gives.

    Raises:
        UserError: no means, or those of another conditioner; a map that the file does not have.
    """
    options = gap_options(conditioner)
    embed = spec.get("embed")
    assert options is not None and isinstance(embed, Embedding)  # or else `Conditioning` has refused
    width = embed.width
    if not options.needs_means:
        return Gap(torch.zeros(width), torch.zeros(width), options.noise)
    if options.means is None:
        raise UserError("conditioner.gap.means: has to be given, a file that `python -m ldm_lab gap` writes")
    file = read_gap(options.means, embedder_of(conditioner))
    return chosen(file, options, width)


def chosen(file: GapFile, options: GapOptions, width: int) -> Gap:
    """Return what a section makes of a file of means. Raises UserError for another width or a map that it lacks."""
    gap, where = file.gap, f"conditioner.gap.means: {options.means}"
    if gap.width != width:
        raise UserError(f"{where}: means of {gap.width} numbers; this conditioner's embeddings have {width}")
    its = gap.map_name
    wanted = its if options.map is None or (options.map == "best" and file.facts.get("map") == "best") else options.map
    if wanted not in ("none", its):
        raise UserError(
            f"conditioner.gap.map: {wanted} is asked for, and {options.means} was made with --map "
            f"{file.facts.get('map', its)}; `python -m ldm_lab gap --map {wanted}` makes another"
        )
    zeros = torch.zeros(width)  # [D]
    means = (gap.image_mean, gap.text_mean) if options.shift else (zeros, zeros)
    noise = float(gap.noise) if options.noise is None else options.noise
    text_map = gap.map if wanted != "none" and options.shift else None
    return Gap(*means, noise, text_map).eval().requires_grad_(False)


def resumed_gap(own: Gap | None, state: dict[str, Tensor], conditioner: PartConfig) -> Gap | None:
    """Return what a run that goes on shifts embeddings by: the checkpoint's means, as far as it has those asked for.

    Args:
        own: as the config says.
        state: of the checkpoint's `Gap`; {} without.
        conditioner: its section.
    """
    if not state or own is None:
        if state:
            print_rank_zero("conditioner.gap: null: the checkpoint's embeddings were shifted, and are no longer")
        elif own is not None:
            print_rank_zero("conditioner.gap: the checkpoint's embeddings were not shifted, and are from here on")
        return own
    stored, options = Gap.from_state(state, "resume.checkpoint"), gap_options(conditioner)
    if stored.shifts != own.shifts or stored.width != own.width:
        return own  # the changes of the config say so
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(_means(own), _means(stored)))
    if not same:
        print_rank_zero("conditioner.gap: means other than the checkpoint's are named; the checkpoint's hold")
    noise = stored.noise_length if options is None or options.noise is None else options.noise
    text_map = stored.map if stored.map_name == own.map_name else own.map
    return Gap(*_means(stored), noise, text_map).eval().requires_grad_(False)


def stored_gap(state: dict[str, Tensor], where: str, conditioner: PartConfig) -> Gap:
    """Return a model's own means for a run that adds to it, with the noise that the run's config names, if it does.

    Args:
        state: of the model's `Gap`.
        where: its file.
        conditioner: the run's section.
    """
    stored, options = Gap.from_state(state, where), gap_options(conditioner)
    noise = stored.noise_length if options is None or options.noise is None else options.noise
    return Gap(*_means(stored), noise, stored.map).eval().requires_grad_(False)


def _means(gap: Gap) -> tuple[Tensor, Tensor]:
    return gap.image_mean, gap.text_mean  # [D] each
