"""Values as people write them on a command line or into a form, in the type that an option takes."""

import types
from collections.abc import Iterator
from typing import Annotated, Union, get_args, get_origin

from ldm_lab.config.bounds import TypeForm


def kinds(annotation: TypeForm) -> Iterator[TypeForm]:
    """Yield the types of a union without their bounds."""
    if get_origin(annotation) is Annotated:
        yield from kinds(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from kinds(member)
    else:
        yield annotation


def from_text(annotation: TypeForm, written: str) -> int | float | str:
    """Return the value that is written: a number where the type has numbers and it is one, else the text as it is."""
    found = list(kinds(annotation))
    if int in found and written.lstrip("-").isascii() and written.lstrip("-").isdigit() and len(written) < 20:
        return int(written)
    if float in found:
        try:
            return float(written)
        except ValueError:
            return written
    return written
