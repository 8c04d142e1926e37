"""The listing of all parts with their options: what `train.py --parts` prints."""

import gc
import shutil
import textwrap

from ldm_lab.config.bounds import describe
from ldm_lab.config.registry import ROLES, broken, infos, use_keys
from ldm_lab.errors import UserError


def describe_parts() -> str:
    """Return all parts with their options: type and bounds, default, meaning; nothing is imported."""
    collects = gc.isenabled()
    gc.disable()  # the syntax trees all stay, and looking through them again and again takes a third of the time
    try:
        return _described()
    finally:
        if collects:
            gc.enable()


def _described() -> str:
    width = max(60, min(120, shutil.get_terminal_size((120, 24)).columns))
    lines = []
    for role, its in ROLES.items():
        if not its.listed:
            continue
        for name, info in infos(role).items():
            try:
                summary, options = info.summary, info.options
            except UserError as error:
                lines.append(f"left out: {error}")
                continue
            lines.append(f"{role if name == role else f'{role}: {name}'}  -- {summary}")
            for key, option in options.items():
                default = list(option.default) if isinstance(option.default, tuple) else option.default
                said = "has to be given" if option.required else f"default {default!r}"
                lines += _entry(f"{key}: {describe(option.annotation)}; {said}", option.meaning, width)
            lines += [f"    {key}: {describe(kind)}; how it is used" for key, kind in use_keys(role).items()]
    lines += [f"not readable: {path}: {why}" for path, why in broken.items()]
    return "\n".join(lines)


def _entry(head: str, meaning: str, width: int) -> list[str]:
    """Return the lines of an option: what may be given, and below it what it means."""
    return [f"    {head}", *textwrap.wrap(meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]
