"""Options of sampling as flags of `sample.py`: of the base model, of all upsamplers, and of each by its number."""

import argparse
import re
from collections.abc import Sequence

from ldm_lab.commands._flags import add_flags, given
from ldm_lab.config.loading import read
from ldm_lab.config.reading import Option
from ldm_lab.config.registry import infos, part_info
from ldm_lab.errors import UserError, unknown
from ldm_lab.sampling.aliases import our_sampler
from ldm_lab.sampling.options import (
    BASE_ONLY,
    DEFAULT_SAMPLER,
    DEFAULT_UPSAMPLER,
    STAGE,
    UPSAMPLER,
    OptionValues,
    SamplingOptions,
    stage_prefix,
)

NUMBERED = re.compile(rf"--{re.escape(STAGE)}(\d{{1,4}})\.")


def numbered(words: Sequence[str]) -> list[int]:
    """Return the upsamplers of which flags are on the command line, such as 2 of --upsampler.2.steps."""
    return sorted({int(match[1]) for word in words if (match := NUMBERED.match(word))})


def add_upsampler_flags(group: argparse._ArgumentGroup, numbers: Sequence[int]) -> None:
    """Add a flag for every option of upsamplers: for all of them, and for those of these numbers."""
    options = upsampler_flags()
    add_flags(group, options, UPSAMPLER)
    for number in numbers:
        add_flags(group, options, stage_prefix(number))


def upsampler_flags() -> dict[str, Option]:
    """Return the options that upsamplers have."""
    sampling = part_info("sampling", None).options
    return {**{name: option for name, option in sampling.items() if name not in BASE_ONLY}, **sampler_options()}


def fill_in_stages(args: argparse.Namespace) -> None:
    """Put the stages of the YAML `--stages` in the place of flags that are not given.

    It has a list `stages`, base first, each of them with its `checkpoint` and the names of flags.

    Raises:
        UserError: no such file, a stage without a checkpoint, a name that is no flag's.
    """
    if args.stages is None:
        return
    if args.checkpoint is not None or args.upsampler:
        raise UserError("--stages: names the models, and does not go with --checkpoint and --upsampler")
    stages = read(args.stages).get("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"{args.stages}: stages: a list is needed, each with its checkpoint, the base model's first")
    given_already = {dest for dest, value in args._get_kwargs() if value is not None}
    base = {**part_info("sampling", None).options, **sampler_options()}
    for number, stage in enumerate(stages):
        where = f"{args.stages}: stages.{number}"
        if not isinstance(stage.get("checkpoint"), str):
            raise UserError(f"{where}.checkpoint: the file of a model is needed")
        known = upsampler_flags() if number else base
        for name, value in stage.items():
            if name not in known and name != "checkpoint":
                raise UserError(f"{where}.{name}: {unknown('option', str(name), [*known, 'checkpoint'])}")
            if name == "sampler" and not isinstance(value, str):
                raise UserError(
                    f"{where}.sampler: a name is needed, such as ddim; its options stand beside it (steps: 20)"
                )
            dest = (stage_prefix(number) if number else "") + str(name)
            of_all = UPSAMPLER + str(name) if number else dest
            if name != "checkpoint" and not {dest, of_all} & given_already:
                setattr(args, dest, value)
    args.checkpoint, *args.upsampler = (stage["checkpoint"] for stage in stages)


def sampler_options() -> dict[str, Option]:
    """Return the options of all samplers by flag; whose they are stands in their meanings."""
    samplers = infos("sampler")
    owners: dict[str, list[str]] = {}
    merged: dict[str, Option] = {}
    for sampler, info in samplers.items():
        for name, option in info.options.items():
            owners.setdefault(name, []).append(sampler)
            kind = option.annotation if name not in merged else merged[name].annotation | option.annotation
            meaning = merged[name].meaning if name in merged else option.meaning
            merged[name] = Option(kind, None, False, meaning)
    for name, option in merged.items():
        whose = "" if len(owners[name]) == len(samplers) else f"of {', '.join(owners[name])}: "
        merged[name] = Option(option.annotation, None, False, f"{whose}{option.meaning.rstrip('.')}")
    return merged


def base_options(args: argparse.Namespace) -> SamplingOptions:
    """Return how the (base) model is asked. Raises UserError with the names of flags."""
    chosen = given(args, part_info("sampling", None).options)
    return _options(chosen, given(args, sampler_options()), DEFAULT_SAMPLER)


def upsampler_options(args: argparse.Namespace, batch_size: int) -> list[SamplingOptions]:
    """Return how each upsampler is asked. Raises UserError with the names of flags."""
    options, count = upsampler_flags(), len(args.upsampler)
    for_all = given(args, options, UPSAMPLER)
    if for_all and not count:
        raise UserError(f"{_flag(UPSAMPLER + next(iter(for_all)))} belongs to an --upsampler")
    for dest, value in args._get_kwargs():
        match = NUMBERED.match(f"--{dest}")
        if match and value is not None and not 1 <= int(match[1]) <= count:
            there = f"there are upsamplers 1 to {count}" if count > 1 else f"there is {count or 'no'} upsampler"
            raise UserError(f"{_flag(dest)}: {there}")
    return [_of_upsampler(args, number, batch_size) for number in range(1, count + 1)]


def _of_upsampler(args: argparse.Namespace, number: int, batch_size: int) -> SamplingOptions:
    """Return how an upsampler is asked: as all are, but for what is said of it alone."""
    prefix, options = stage_prefix(number), upsampler_flags()
    for_all, own = given(args, options, UPSAMPLER), given(args, options, prefix)
    of_samplers = sampler_options()
    if "sampler" in own:  # another one's options are not this one's
        known = infos("sampler")[own["sampler"]].options if own["sampler"] in infos("sampler") else of_samplers
        for_all = OptionValues({k: v for k, v in for_all.items() if k not in of_samplers or k in known})
    both = {**for_all, **own}
    chosen = OptionValues({k: v for k, v in both.items() if k not in of_samplers} | {"batch_size": batch_size})
    of_sampler = OptionValues({k: v for k, v in both.items() if k in of_samplers})
    try:
        return _options(chosen, of_sampler, DEFAULT_UPSAMPLER)
    except UserError as error:
        where, colon, what = str(error).partition(":")
        key = where.removeprefix("sampler.").removeprefix("--").replace("-", "_")
        raise UserError(f"{_flag(prefix + key)}:{what}" if colon and key in own else str(error)) from None


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _options(chosen: OptionValues, of_sampler: OptionValues, default_sampler: str) -> SamplingOptions:
    name = chosen.get("sampler")
    if name is not None and name not in infos("sampler") and (ours := our_sampler(name)):
        raise UserError(ours)
    if name is not None or of_sampler:
        chosen = OptionValues({**chosen, "sampler": {"name": name or default_sampler, **of_sampler}})
    try:
        return SamplingOptions.from_values(chosen)
    except UserError as error:
        key = str(error).partition(":")[0]
        message = str(error).replace(key, "--" + key.replace("_", "-"), 1) if key in chosen else str(error)
        raise UserError(message) from None
