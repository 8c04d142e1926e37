"""What training programs put around a network's weights: dicts around the state dict, prefixes before its names.

    {"model": {...}, "ema": {"module": {"module._orig_mod.conv.weight": ...}}, "step": 7}  ->  {"conv.weight": ...}

Of several copies of a network the averaged one (EMA) is taken, which is what people sample from, and that is said.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")
EMA = (
    *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_state_dict_ema"),
    *("ema_model_state_dict", "params_ema", "ema_params", "averaged_model"),
)
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "weights", "net", "network", "params"),
    *("generator", "shadow_params", "shadow", "checkpoint", "ckpt"),
)
NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "callbacks", "loops", "config", "args", "loss", "discr")
DEEPEST = 5  # dicts within one another
COMPILED = "_orig_mod."  # of torch.compile, before a network's names or a submodule's
WRAPPED = (COMPILED, "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # such, of others: FSDP, checkpointing
PREFIXES = ("module.", COMPILED, "_forward_module.")  # of DDP and averages, of torch.compile, of Lightning
EMA_PREFIXES = ("ema.", "ema_model.")
STAGE = re.compile(r"(\d+)\.ema_model\.(.+)")
COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")  # beside the tensors of an average


class Unwrapped(NamedTuple):
    """A state dict out of its wrappers.

    Attributes:
        tensors: by name.
        rest: what else lay in the outermost dict.
        notes: what was chosen, for people.
    """

    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    notes: tuple[str, ...] = ()


def unwrap(content: Mapping[str, Any]) -> Unwrapped:
    """Return the state dict in a checkpoint's dict; no tensors if there is none."""
    raw_key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping) and _inner(content[key])), None)
    ema_key = next((key for key in EMA if isinstance(content.get(key), Mapping) and _inner(content[key])), None)
    raw = _inner(content if raw_key is None else content[raw_key], own=raw_key is None)
    if not raw and raw_key is None:
        networks = [key for key in _others(content) if key not in EMA and _inner(content[key])]
        raw_key = networks[0] if len(networks) == 1 else None
        raw = _inner(content[networks[0]]) if raw_key is not None else {}
    average = {} if ema_key is None else _of_stages(_inner(content[ema_key]))
    rest = {key: value for key, value in content.items() if key not in (raw_key, ema_key)}
    if ema_key is None:
        strange = next((key for key in EMA if isinstance(content.get(key), Mapping | list)), None)
        notes = () if strange is None else (f"{strange!r} in it is no state dict, and is left aside",)
        return Unwrapped(raw, {} if raw_key is None else rest, notes)
    shown = f"its averaged weights (EMA, {ema_key!r}) are taken"
    if raw_key is None:
        return Unwrapped(average, rest, (shown,))
    plain, averaged = _plain(raw), _plain(average)
    if not set(averaged) <= set(plain) or any(averaged[name].shape != plain[name].shape for name in averaged):
        return Unwrapped(raw, rest, (f"{ema_key!r} in it has not the tensors of {raw_key!r}, and is left aside",))
    left = len(plain) - len(averaged)
    beside = f"; {left} tensors that are not averaged are those of {raw_key!r}" if left else f", not {raw_key!r}"
    return Unwrapped({**plain, **averaged}, rest, (shown + beside,))


def _of_stages(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return averages of a cascade's networks, "<i>.ema_model.<name>" of imagen-pytorch, as the networks are named."""
    found = {f"unets.{m[1]}.{m[2]}": value for name, value in average.items() if (m := STAGE.fullmatch(name))}
    return found or average


def _inner(content: Mapping[str, Any], own: bool = False, depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a dict, or of the first wrapper within it that has any.

    Args:
        content: the dict.
        own: take its own tensors alone.
        depth: how many wrappers are around it.
    """
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if any(name not in COUNTERS for name in tensors) or own or depth == DEEPEST:
        return tensors
    for key in (*EMA, *WRAPPERS):
        inner = content.get(key)
        if isinstance(inner, Mapping) and (found := _inner(inner, depth=depth + 1)):
            return found
    others = [_inner(content[key], depth=depth + 1) for key in _others(content)]
    return others[0] if len(others) == 1 else {}


def _others(content: Mapping[str, T]) -> list[str]:
    """Return the keys of dicts that may hold a network under a name of their own, such as "vae"."""
    return [
        key
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Mapping) and not any(word in key for word in NOT_WEIGHTS)
    ]


def _plain(tensors: Mapping[str, T]) -> dict[str, T]:
    return {name: tensors[stored] for name, stored in plain_names(tensors)[0].items()}


def plain_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the names of tensors without what DDP, torch.compile and averages put before them, and what to say.

    Args:
        names: of all tensors in a file.

    Returns:
        The plain name -> the one in the file, in its order; and lines for people.
    """
    found, notes = {name: name for name in names}, ()
    for wrapped in WRAPPED:
        if any(wrapped in name for name in found):
            found = _renamed(found, {name: name.replace(wrapped, "") for name in found})
    while shorter := _without_prefix(found):
        prefix, found = shorter
        if prefix in EMA_PREFIXES:
            notes = (f"its averaged weights (EMA, {prefix!r} in their names) are taken",)
    return found, notes


def _without_prefix(found: dict[str, str]) -> tuple[str, dict[str, str]] | None:
    """Return a prefix that all names have, and the names without it; None where there is none.

    An average that lies beside the network, both under prefixes, stands for both.
    """
    named = [name for name in found if name not in COUNTERS]
    for prefix in (*PREFIXES, *EMA_PREFIXES):
        inner = [name for name in named if name.startswith(prefix)]
        if not inner:
            continue
        cut = {name: name.removeprefix(prefix) for name in inner}
        others = [name for name in named if not name.startswith(prefix)]
        tops = {name.partition(".")[0] for name in others}
        twin = prefix in EMA_PREFIXES and len(tops) == 1 and {n.partition(".")[2] for n in others} == set(cut.values())
        if not others or twin:
            return prefix, {cut[name]: found[name] for name in inner}
    return None


def _renamed(found: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Return names under new ones, if no two become one."""
    return {new[name]: stored for name, stored in found.items()} if len({*new.values()}) == len(new) else found
