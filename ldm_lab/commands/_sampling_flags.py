"""Options of sampling as flags of `sample.py`: of the base model, of all upsamplers, and of each by its number."""

import argparse
import sys
from collections.abc import Iterable, Sequence

from ldm_lab.commands._flags import add_flags, words_of
from ldm_lab.config.loading import read
from ldm_lab.config.registry import infos
from ldm_lab.errors import UserError, unknown
from ldm_lab.sampling import flat
from ldm_lab.sampling.options import UPSAMPLER, SamplingOptions, stage_prefix


def numbered(words: Sequence[str]) -> list[int]:
    """Return the upsamplers of which flags are on the command line, such as 2 of --upsampler.2.steps."""
    flags = [word[2:] for word in words if word.startswith("--")]
    return sorted({int(match[1]) for flag in flags if (match := flat.NUMBERED.match(flag))})


def add_upsampler_flags(group: argparse._ArgumentGroup, numbers: Sequence[int]) -> None:
    """Add a flag for every option of upsamplers: for all of them, and for those of these numbers."""
    options = flat.upsampler_names()
    add_flags(group, options, UPSAMPLER)
    for number in numbers:
        add_flags(group, options, stage_prefix(number))


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
    base, of_upsampler = flat.base_names(), flat.upsampler_names()
    for number, stage in enumerate(stages):
        where = f"{args.stages}: stages.{number}"
        if not isinstance(stage.get("checkpoint"), str):
            raise UserError(f"{where}.checkpoint: the file of a model is needed")
        known = of_upsampler if number else base
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


def base_options(args: argparse.Namespace) -> SamplingOptions:
    """Return how the (base) model is asked. Raises UserError with the names of flags."""
    return flat.base_options(words_of(args), _flag)


def of_other_samplers(own: str | None, names: Sequence[str]) -> set[str]:
    """Return the options that one of several samplers that are compared lacks, but another has: they are not its."""
    samplers = infos("sampler")
    if len(names) < 2 or own not in samplers:
        return set()
    every = {option for name in names if name in samplers for option in samplers[name].options}
    return every - {*samplers[own].options}


def tell_owners(options: Iterable[str], names: Sequence[str]) -> None:
    """Say which of some options of samplers do not hold for all samplers that are compared."""
    samplers = infos("sampler")
    for option in options:
        having = [name for name in names if name in samplers and option in samplers[name].options]
        if having and len(having) < len(names):
            print(f"note: --{option.replace('_', '-')} is of {', '.join(having)} alone", file=sys.stderr)


def upsampler_options(args: argparse.Namespace, batch_size: int) -> list[SamplingOptions]:
    """Return how each upsampler is asked. Raises UserError with the names of flags."""
    return flat.upsampler_options(words_of(args), len(args.upsampler), batch_size, _flag)


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")
