"""The lines of text files and their fields."""

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from typing import IO

# byte order mark -> encoding, UTF-32 before UTF-16, whose mark begins it
WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHUNK = 2**16  # bytes that are recoded at a time
LONGEST = 2 * 2**20  # bytes of a line
QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')


class BadLine(ValueError):
    """A line that is no row; the message says why, in the same words for all such lines."""


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, or what is compressed in it, whatever its name says; UTF-16 with a byte order mark as UTF-8."""
    with open(path, "rb") as begin:
        is_compressed = begin.read(2) == b"\x1f\x8b"
    with _opened(path, is_compressed) as file:
        mark = file.read(4)
    encoding = next((name for first, name in WIDE.items() if mark.startswith(first)), None)
    file = _opened(path, is_compressed)
    return file if encoding is None else io.BufferedReader(_Recoded(file, encoding))


def _opened(path: str, is_compressed: bool) -> IO[bytes]:
    return gzip.open(path, "rb") if is_compressed else open(path, "rb")


class _Recoded(io.RawIOBase):
    """The UTF-8 of a file in another encoding. Halves of surrogate pairs stay what they are, which is not UTF-8."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            data = self._file.read(CHUNK)
            self._rest = self._decoder.decode(data, final=not data).encode(errors="surrogatepass")
            if not data:
                break
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


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
