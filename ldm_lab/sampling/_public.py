"""The public names of `ldm_lab.sampling` whose modules import torch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from ldm_lab.sampling.aesthetic import Aesthetic, RatingEmbeddings
from ldm_lab.sampling.decode import Sample
from ldm_lab.sampling.interpolation import interpolate
from ldm_lab.sampling.loras import applied_loras
from ldm_lab.sampling.model import Model
from ldm_lab.sampling.pipeline import Pipeline
from ldm_lab.sampling.stages import Stage, Stages

Public = type | Callable[..., Iterator[list[Sample]]] | Callable[..., AbstractContextManager[None]]
PUBLIC: dict[str, Public] = {
    "Aesthetic": Aesthetic,
    "Model": Model,
    "Pipeline": Pipeline,
    "RatingEmbeddings": RatingEmbeddings,
    "Sample": Sample,
    "Stage": Stage,
    "Stages": Stages,
    "applied_loras": applied_loras,
    "interpolate": interpolate,
}
