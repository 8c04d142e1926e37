"""Protocol buffers as they lie in a file: fields by their numbers, read without a schema and without a library."""

from collections.abc import Iterator

Field = tuple[int, int | bytes]  # number; a varint or fixed number, or the bytes of a text or message


class Malformed(ValueError):
    """Bytes that are not what they should be."""


def varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at a place, at most 64 bits, and the place behind it. Raises Malformed."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise Malformed("cut off within a number")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, place
    raise Malformed("a number of more than 64 bits")


def message(data: bytes) -> Iterator[Field]:
    """Yield the fields of a message in their order. Raises Malformed."""
    place = 0
    while place < len(data):
        key, place = varint(data, place)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, place = varint(data, place)
            yield number, value
            continue
        if wire_type == 2:
            size, place = varint(data, place)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise Malformed(f"a field of the kind {wire_type}")
        if size > len(data) - place:
            raise Malformed("cut off within a field")
        piece = data[place : place + size]
        place += size
        yield number, piece if wire_type == 2 else int.from_bytes(piece, "little")
