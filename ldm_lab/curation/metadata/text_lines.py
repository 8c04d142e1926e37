"""The lines of text files and their fields."""

import gzip
import re
from collections.abc import Iterator
from typing import IO

LONGEST = 2 * 2**20  # bytes of a line
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


class BadLine(ValueError):
    """A line that is no row; the message says why, in the same words for all such lines."""


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, or what is compressed in it."""
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def read_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Return the numbers and bytes of lines without their ends; None for one that is over `LONGEST`.

    Only a line feed, with or without carriage returns before it, ends a line.
    """
    number = 0
    while line := file.readline(LONGEST + 2):
        number += 1
        too_long = len(line.rstrip(b"\r\n")) > LONGEST or (len(line) == LONGEST + 2 and not line.endswith(b"\n"))
        while line and not line.endswith(b"\n") and too_long:
            line = file.readline(LONGEST)
        if too_long:
            yield number, None
            continue
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        yield number, line.removesuffix(b"\n").rstrip(b"\r")


def csv_fields(record: str) -> list[str] | None:
    """Return the fields of a CSV's record; None if it goes on in the next line.

    A field that begins with a quotation mark ends with one, "" within it stands for one; a mark within a field
    that does not begin with one is a character. Raises BadLine for text behind a field's last mark.
    """
    if '"' not in record:
        return record.split(",")
    fields, place = [], 0
    while True:
        if not record.startswith('"', place):
            comma = record.find(",", place)
            fields.append(record[place : comma if comma >= 0 else None])
            if comma < 0:
                return fields
            place = comma + 1
            continue
        quoted = QUOTED.match(record, place)
        if quoted is None:
            return None
        fields.append(quoted[0][1:-1].replace('""', '"'))
        place = quoted.end()
        if place == len(record):
            return fields
        if record[place] != ",":
            raise BadLine("text beside a quoted field")
        place += 1
