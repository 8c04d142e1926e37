"""Options under flat names, as flags, forms and requests give them. Imports no torch.

A sampler's options stand beside the others ("steps"); what is said of all upsamplers has a prefix ("upsampler_steps"),
what is said of one of them its number ("upsampler.2.steps").
"""

import re
from collections.abc import Callable

from ldm_lab.config.reading import Option
from ldm_lab.config.registry import infos, part_info
from ldm_lab.errors import UserError
from ldm_lab.sampling.aliases import our_sampler
from ldm_lab.sampling.options import (
    BASE_ONLY,
    BELONGS,
    DEFAULT_SAMPLER,
    DEFAULT_UPSAMPLER,
    STAGE,
    UPSAMPLER,
    OptionValues,
    SamplingOptions,
    belongs_to,
    stage_prefix,
)

NUMBERED = re.compile(rf"{re.escape(STAGE)}(\d{{1,4}})\.")
Naming = Callable[[str], str]  # a flat name -> what users know it by: a flag, or the name itself


def base_names() -> dict[str, Option]:
    """Return all options of a base model, those of samplers last."""
    return {**part_info("sampling", None).options, **sampler_names()}


def upsampler_names() -> dict[str, Option]:
    """Return the options that upsamplers have."""
    return {name: option for name, option in base_names().items() if name not in BASE_ONLY}


def sampler_names() -> dict[str, Option]:
    """Return the options of all samplers; whose they are stands in their meanings."""
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


def idle(values: OptionValues, upsamplers: int) -> dict[str, str]:
    """Return the options that have no effect beside the others, each with the reason.

    What is refused for them on a command line, a form that keeps its values from one use to the next may leave out.
    """
    found: dict[str, str] = {}
    defaults = {"": DEFAULT_SAMPLER, UPSAMPLER: DEFAULT_UPSAMPLER}
    for prefix, default in defaults.items():
        sampler = str(values.get(f"{prefix}sampler") or default)
        its = infos("sampler")[sampler].options if sampler in infos("sampler") else sampler_names()
        for name in upsampler_names() if prefix else base_names():
            if values.get(prefix + name) is None:
                continue
            if prefix and not upsamplers:
                found[prefix + name] = "belongs to an upsampler, and there is none"
            elif name in sampler_names() and name not in its:
                found[prefix + name] = f"the sampler {sampler} has no such option"
            elif (other := _missing(name, values, prefix)) is not None:
                found[prefix + name] = belongs_to(prefix + other)
    return found


def _missing(name: str, values: OptionValues, prefix: str) -> str | None:
    """Return the option that another one means nothing without, if it is not given; or what that one needs."""
    other = BELONGS.get(name)
    if other is None or values.get(prefix + other) is None:
        return other
    return _missing(other, values, prefix)


def base_options(values: OptionValues, naming: Naming) -> SamplingOptions:
    """Return how the (base) model is asked. Raises UserError with the names that users know."""
    chosen = values.named(part_info("sampling", None).options)
    return _options(chosen, values.named(sampler_names()), DEFAULT_SAMPLER, naming)


def upsampler_options(values: OptionValues, count: int, batch_size: int, naming: Naming) -> list[SamplingOptions]:
    """Return how each of so many upsamplers is asked. Raises UserError with the names that users know."""
    for_all = values.named(upsampler_names(), UPSAMPLER)
    if for_all and not count:
        raise UserError(f"{naming(UPSAMPLER + next(iter(for_all)))} belongs to an {naming(UPSAMPLER.rstrip('_'))}")
    for name, value in values.items():
        match = NUMBERED.match(name)
        if match and value is not None and not 1 <= int(match[1]) <= count:
            there = f"there are upsamplers 1 to {count}" if count > 1 else f"there is {count or 'no'} upsampler"
            raise UserError(f"{naming(name)}: {there}")
    return [_of_upsampler(values, number, batch_size, naming) for number in range(1, count + 1)]


def _of_upsampler(values: OptionValues, number: int, batch_size: int, naming: Naming) -> SamplingOptions:
    """Return how an upsampler is asked: as all are, but for what is said of it alone."""
    prefix, options, of_samplers = stage_prefix(number), upsampler_names(), sampler_names()
    for_all, own = values.named(options, UPSAMPLER), values.named(options, prefix)
    if "sampler" in own:  # another one's options are not this one's
        its = infos("sampler").get(str(own["sampler"]))
        known = of_samplers if its is None else its.options
        for_all = OptionValues({k: v for k, v in for_all.items() if k not in of_samplers or k in known})
    both = {**for_all, **own}
    chosen = OptionValues({k: v for k, v in both.items() if k not in of_samplers} | {"batch_size": batch_size})
    of_sampler = OptionValues({k: v for k, v in both.items() if k in of_samplers})
    try:
        return _options(chosen, of_sampler, DEFAULT_UPSAMPLER, naming)
    except UserError as error:
        where, colon, what = str(error).partition(":")
        key = where.removeprefix("sampler.").removeprefix("--").replace("-", "_")
        raise UserError(f"{naming(prefix + key)}:{what}" if colon and key in own else str(error)) from None


def _options(chosen: OptionValues, of_sampler: OptionValues, default_sampler: str, naming: Naming) -> SamplingOptions:
    name = chosen.get("sampler")
    if isinstance(name, str) and name not in infos("sampler") and (ours := our_sampler(name)):
        raise UserError(ours)
    if name is not None or of_sampler:
        chosen = OptionValues({**chosen, "sampler": {"name": name or default_sampler, **of_sampler}})
    try:
        return SamplingOptions.from_values(chosen)
    except UserError as error:
        key = str(error).partition(":")[0]
        raise UserError(str(error).replace(key, naming(key), 1) if key in chosen else str(error)) from None
