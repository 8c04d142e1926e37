"""Condition sources: what a denoiser is told that is neither text nor embedding (`ldm_lab.interfaces.ConditionSource`).

In a config they are a mapping, part name -> options:

    condition_sources:
      low_res: {scale_factor: 4}

A new condition source is one file in this folder with one `@register("condition_source", "name")`.

`low_res`         the image itself made small, for upsamplers
`noised_low_res`  the same enlarged and noised, and how noised it is, for Imagen's
`if_low_res`      the same as DeepFloyd IF has it
`inpaint`         the known part of an image, and where it is known
`clip_embed`      the place of a CLIP vector in glide-finetune's latent models
"""

from collections.abc import Mapping
from typing import Any

from ldm_lab.conditions import ConditionKind, ConditionSpec
from ldm_lab.config import build, check_mapping
from ldm_lab.errors import UserError
from ldm_lab.interfaces import Conditioner, ConditionSource

ConditionSources = dict[str, ConditionSource]  # part name -> source


def build_sources(config: Mapping[str, Any] | None) -> ConditionSources:
    """Return the condition sources of a config's section `condition_sources`, by name; null takes one back.

    Raises:
        UserError: no such source, or options that it does not have.
    """
    config = config or {}
    if problems := check_mapping("condition_source", config, "condition_sources"):
        raise UserError(problems[0])
    wanted = {name: options for name, options in config.items() if options is not None}
    return {name: build("condition_source", {**options, "name": name}) for name, options in wanted.items()}


def given_conditions(conditioner: Conditioner, sources: ConditionSources) -> ConditionSpec:
    """Return all that a conditioner and condition sources give.

    Raises:
        UserError: two of them give conditions of one name.
    """
    given: dict[str, ConditionKind] = dict(conditioner.spec)
    for name, source in sources.items():
        if both := sorted(given.keys() & source.spec.keys()):
            raise UserError(f"condition_sources.{name}: gives {both[0]}, and another part gives it, too")
        given |= source.spec
    return given
