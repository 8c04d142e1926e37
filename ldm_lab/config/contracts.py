"""The contract of a role: what a part has to have beside its options, checked when its class is registered."""

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType


def missing_of_contract(cls: type, contract: str | None) -> str:
    """Return what a class lacks of the contract of its role, in a line; "" if it lacks nothing.

    Args:
        cls: to be registered.
        contract: name of a class of `ldm_lab.interfaces`: its methods that only raise NotImplementedError, and its
            attributes that have an annotation and no value, are what a subclass has to bring. It has an attribute that
            one of its methods assigns (`self.NAME = ...`), or the class itself (a value, a property).
    """
    if contract is None:
        return ""
    from ldm_lab import interfaces  # imports torch, as a part with such a contract does, too

    members = dict(inspect.getmembers(interfaces))
    base = members[contract]
    if not issubclass(cls, base):
        return f"a {cls.part_role} has to be derived from ldm_lab.interfaces.{contract}"
    inherited, own = dict(inspect.getmembers(base)), dict(inspect.getmembers(cls))
    lacking = [f"{name}()" for name, value in inherited.items() if own[name] is value and _is_abstract(value)]
    assigned = {name for code in _codes(cls, base) for name in _assigned(code)}
    wanted = [name for name in inspect.get_annotations(base) if name not in inherited]
    lacking += [name for name in wanted if name not in own and name not in assigned]
    if lacking:
        return f"lacks {', '.join(lacking)}, which ldm_lab.interfaces.{contract} asks of every {cls.part_role}"
    return ""


def _is_abstract(member: FunctionType | property) -> bool:
    function = member.fget if isinstance(member, property) else member
    ours = isinstance(function, FunctionType) and function.__module__ == "ldm_lab.interfaces"  # not torch's forward
    return ours and "NotImplementedError" in function.__code__.co_names


def _assigned(code: CodeType) -> Iterator[str]:
    """Yield the names of the attributes that a function sets; to read one is not enough."""
    yield from (its.argval for its in dis.get_instructions(code) if its.opname == "STORE_ATTR")


def _codes(cls: type, base: type) -> Iterator[CodeType]:
    """Yield the code of all methods of a class, and of its base classes that are derived from `base`, too."""
    for owner in cls.__mro__:
        if issubclass(owner, base):
            yield from (f.__code__ for _, f in inspect.getmembers(owner, inspect.isfunction))
