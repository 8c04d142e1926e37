"""The text in some bytes: by byte order mark, as UTF-8, or in an encoding that the user names; never guessed."""

import codecs
import unicodedata

MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Encodings whose bytes may be those of another text in UTF-8: what the user says goes before it.
NOT_TOLD_FROM_UTF8 = ("utf-16", "utf-32", "utf-7", "iso2022", "iso-2022", "hz")
# Encodings of two bytes a letter: short texts in them may look like UTF-8 of two bytes a letter, as a Chinese cat does.
OF_TWO_BYTES = ("gb", "big5", "cp950", "cp932", "shift-jis", "euc-", "cp949", "johab", "hz")
MARK = "\ufeff"  # files that were put together have one within
THREE_BYTES = "\u0800"  # the first letter that takes three bytes in UTF-8


def decode_text(data: bytes, encoding: str | None = None) -> str | None:
    """Return the text in some bytes, without its byte order mark; None if it cannot be read.

    Args:
        data: a byte order mark says what they are; else they are UTF-8, or else in `encoding`.
        encoding: of the bytes that are not UTF-8; None if there should be none.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            return _strictly(data[len(mark) :], name)
    named = _strictly(data, encoding) if encoding is not None else None
    if _starts(encoding, NOT_TOLD_FROM_UTF8):
        return named
    text = _strictly(data, "utf-8")
    if (
        text is not None
        and named is not None
        and _starts(encoding, OF_TWO_BYTES)
        and max(text, default="") < THREE_BYTES
    ):
        return named
    return named if text is None else text


def _starts(encoding: str | None, names: tuple[str, ...]) -> bool:
    """Return whether an encoding is one of some families."""
    return encoding is not None and codecs.lookup(encoding).name.replace("_", "-").startswith(names)


def _strictly(data: bytes, encoding: str) -> str | None:
    """Return the text, None if the bytes are not in the encoding. A text holds no NUL: UTF-16's bytes have them."""
    try:
        text = data.decode(encoding)
    except (UnicodeError, LookupError):
        return None
    return None if "\0" in text else text.replace(MARK, "")


def is_encoding(name: str) -> bool:
    """Return whether a name is that of an encoding of texts."""
    try:
        b"a\0\0\0".decode(name, "replace")
        "a".encode(name, "replace")
    except (LookupError, UnicodeError, ValueError):
        return False
    return True


def composed(name: str) -> str:
    """Return a file's name in the one form (NFC) that compares equal: macOS takes letters and accents apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spellings(name: str) -> list[str]:
    """Return the forms that a file's name may have on the disk, the given one first."""
    if name.isascii():
        return [name]
    return list(dict.fromkeys([name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]))
