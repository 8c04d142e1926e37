"""From YAML and `key=value` to parts: the registry of names, the checks, the building. The only importer of OmegaConf.

`registry`    role and name -> part; how a part is registered, and where parts outside the package come from
`reading`     what a part's text says of its options, without importing it
`bounds`      types and bounds of options, and words for them
`written`     values as people write them
`contracts`   what a part has to have beside its options
`uses`        how a run uses a frozen part: its weights, the latents' normalization, dropout
`checks`      a section against its part
`overrides`   `key=value` words, and another part in a section's place
`loading`     YAML files
`run_config`  a whole run
`listing`     all parts, for people
"""

from ldm_lab.config.bounds import (
    NonNegativeFloat,
    NonNegativeInt,
    PartMapping,
    PartSection,
    Plain,
    PositiveFloat,
    PositiveInt,
    Share,
    ShareBelowOne,
)
from ldm_lab.config.checks import check_keys, check_mapping, check_options, check_section
from ldm_lab.config.listing import describe_parts
from ldm_lab.config.loading import read, to_yaml
from ldm_lab.config.registry import FROZEN, MAPPINGS, ROLES, part_class, parts, register, signature_options, use_keys
from ldm_lab.config.run_config import LARGEST_SEED, PartConfig, RunConfig, build, check, load
from ldm_lab.config.uses import AutoencoderUse, ConditionerUse, PartUse

__all__ = [
    "FROZEN",
    "LARGEST_SEED",
    "MAPPINGS",
    "ROLES",
    "AutoencoderUse",
    "ConditionerUse",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PartConfig",
    "PartMapping",
    "PartSection",
    "PartUse",
    "Plain",
    "PositiveFloat",
    "PositiveInt",
    "RunConfig",
    "Share",
    "ShareBelowOne",
    "build",
    "check",
    "check_keys",
    "check_mapping",
    "check_options",
    "check_section",
    "describe_parts",
    "load",
    "part_class",
    "parts",
    "read",
    "register",
    "signature_options",
    "to_yaml",
    "use_keys",
]
