"""What image files hold beside the picture: the orientation, texts, and how a picture is read without all that."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import ExifTags, Image

ORIENTATION = ExifTags.Base.Orientation
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")  # a bare code stream, a container
JXL_RATIOS = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height
LARGEST_PROFILE = 16 * 2**20  # bytes, unpacked
# Chunks of a PNG that are kept beside the critical ones -> the least length of their content.
KEPT_CHUNKS = {b"tRNS": 1, b"eXIf": 0, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"cICP": 4}
XMP = b"XML:com.adobe.xmp\0\0\0"  # the beginning of a PNG text that is not compressed
LARGEST_XMP = 2**20  # bytes
LARGEST_TEXT, MOST_TEXTS = 4 * 2**20, 100  # bytes of a text, unpacked; texts of a file
LARGEST_TEXTS = (
    64 * 2**20
)  # bytes of all texts of a file, unpacked: a chunk may be a thousandth of what comes out of it
EXIF_HEADER, ICC_HEADER = b"Exif\0\0", b"ICC_PROFILE\0"
BYTE, SHORT, LONG, SIGNED_BYTE = 1, 3, 4, 6  # types of EXIF values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, whatever else is wrong with the EXIF data; 1 if they do not say."""
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # on malformed bytes Pillow raises all kinds
        found = None
    if isinstance(found, tuple | list | bytes) and found:
        found = found[0]
    if isinstance(found, int) and 1 <= found <= 8:
        return found
    exif = image.info.get("exif")
    return _scanned(exif) if isinstance(exif, bytes) else 1


def _scanned(exif: bytes) -> int:
    """Return the orientation among the first directory's entries, read one by one; 1 if it is not there."""
    exif = exif.removeprefix(EXIF_HEADER)
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 10:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for place in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, place)
        code = {SHORT: "H", LONG: "I", BYTE: "B", SIGNED_BYTE: "B"}.get(kind)
        if tag == ORIENTATION and code:
            at = place + 8  # up to four bytes lie here, more of them elsewhere
            if values * struct.calcsize(f"<{code}") > 4:
                (at,) = struct.unpack_from(f"{order}I", exif, at)
            if at + struct.calcsize(f"<{code}") > len(exif):
                return 1
            (value,) = struct.unpack_from(order + code, exif, at)
            return value if 1 <= value <= 8 else 1
    return 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image turned as its orientation says, with its format's name; the image itself at 1."""
    turn = TURNS.get(orientation)
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def jxl_size(data: bytes) -> tuple[int, int]:
    """Return the stored width and height of a JPEG XL image (ISO/IEC 18181-1, SizeHeader).

    Raises:
        EOFError: the file breaks off before it says that.
    """
    boxes = [place for place in (data.find(b"jxlc"), data.find(b"jxlp")) if place >= 0]  # of a container
    start = data.find(JXL_STARTS[0], min(boxes, default=0)) + 2
    header = int.from_bytes(data[start : start + 16], "little")
    if start < 2 or len(data) < start + 16:
        raise EOFError

    def take(bits: int) -> int:
        nonlocal header
        value = header % 2**bits
        header >>= bits
        return value

    def side() -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    small = take(1)
    height = side()
    ratio = take(3)
    if not ratio:
        return side(), height
    across, down = JXL_RATIOS[ratio - 1]
    return height * across // down, height


# ------------------------------------------------------------------------------------------- pictures without the rest


class Stripped(NamedTuple):
    """An encoded picture without the metadata that it may have failed for.

    Attributes:
        data: the encoded picture.
        info: what was taken out and still counts, as Pillow's `Image.info` has it: "exif", "icc_profile".
    """

    data: bytes
    info: dict[str, bytes]


def without_metadata(data: bytes) -> Stripped | None:
    """Return a PNG or JPEG with hardly more than its pixels, profile and orientation; None for other formats."""
    if data.startswith(PNG):
        return _plain_png(data)
    return _plain_jpeg(data) if data.startswith(JPEG) else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, the start and the end of a PNG's chunks: length, kind, content, checksum."""
    place = len(PNG)
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        yield data[place + 4 : place + 8], place, end
        place = end


def png_chunk(data: bytes, wanted: bytes) -> bytes | None:
    """Return the content of a chunk that stands before a PNG's pixels; None in other formats, or if it is not there."""
    if data.startswith(PNG):
        for kind, start, end in _chunks(data):
            if kind == wanted:
                return data[start + 8 : end - 4]
            if kind == b"IDAT":
                return None
    return None


def texts_of(data: bytes) -> dict[str, str]:
    """Return keyword -> text of a PNG's text chunks, and what the EXIF comment of a JPEG or WebP says as "parameters".

    What is damaged, or longer than 4 MiB, is left out; so is what comes after a hundred texts, or 64 MiB of them.
    """
    if not data.startswith(PNG):
        comment = _comment(_exif_of(data))
        return {"parameters": comment} if comment else {}
    found: dict[str, str] = {}
    looked, left = 0, LARGEST_TEXTS
    for kind, start, end in _chunks(data):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        looked += 1
        if looked > MOST_TEXTS or left <= 0:
            break
        word, separator, content = data[start + 8 : end - 4].partition(b"\0")
        keyword = word.decode("latin-1")
        if separator and keyword not in found and len(content) <= LARGEST_TEXT:
            text = _text(kind, content)
            left -= LARGEST_TEXT if text is None else len(text)
            if text is not None:
                found[keyword] = text
    return found


def _text(kind: bytes, content: bytes) -> str | None:
    """Return the text of a PNG's chunk without its keyword; None for what is damaged or too long."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed, content = content[:1] == b"\1", content[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        content = content[1:]
    if packed:
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(content, LARGEST_TEXT)
        except zlib.error:
            return None
        if unpacker.unconsumed_tail:
            return None
    return content.decode("utf-8" if kind == b"iTXt" else "latin-1", errors="replace")


def _exif_of(data: bytes) -> bytes:
    """Return the EXIF data of a JPEG or WebP; nothing without."""
    if data.startswith(JPEG):
        return _plain_jpeg(data).info.get("exif", b"")
    place = 12
    while data.startswith(b"RIFF") and data[8:12] == b"WEBP" and place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"EXIF":
            return data[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
    return b""


def _comment(exif: bytes) -> str:
    """Return the user comment in EXIF data, "" without one."""
    found: str | bytes = b""
    if exif:
        block = Image.Exif()
        try:
            block.load(exif)
            found = block.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
        except Exception:  # on malformed bytes Pillow raises all kinds
            return ""
    if not isinstance(found, bytes):
        return str(found)
    code, text = found[:8], found[8 : 8 + LARGEST_TEXT]
    if code != b"UNICODE\0":
        return (text if code.startswith((b"ASCII", b"JIS", b"\0")) else found).decode("utf-8", "replace").strip("\0")
    little = text[1::2].count(0) > text[::2].count(0)  # most letters have a byte of 0, at one side or the other
    return text.decode("utf-16-le" if little else "utf-16-be", errors="replace").strip("\ufeff\0")


def _plain_png(data: bytes) -> Stripped:
    kept, info = [PNG], {}
    for kind, start, end in _chunks(data):
        chunk = data[start:end]
        critical = not kind[0] & 0x20
        if not critical and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            continue
        known = kind in KEPT_CHUNKS and len(chunk) >= 12 + KEPT_CHUNKS[kind]
        if critical or known or (kind == b"iTXt" and _is_small_xmp(chunk[8:-4])):
            kept.append(chunk)
        elif kind == b"iCCP":
            unpacker = zlib.decompressobj()
            try:
                profile = unpacker.decompress(chunk[8:-4].partition(b"\0")[2][1:], LARGEST_PROFILE)
            except zlib.error:
                continue
            if not unpacker.unconsumed_tail:
                info["icc_profile"] = profile
    return Stripped(b"".join(kept), info)


def _is_small_xmp(text: bytes) -> bool:
    return text.startswith(XMP) and len(text) < LARGEST_XMP


def _plain_jpeg(data: bytes) -> Stripped:
    kept, info, place = [data[:2]], {}, 2
    profile: dict[int, bytes] = {}
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == 0xDA or marker == 0xD9 or 0xD0 <= marker <= 0xD7:  # start of scan: pixels from here on
            break
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : end]
        if marker == 0xE1 and body.startswith(EXIF_HEADER):
            info.setdefault("exif", body)
        elif marker == 0xE2 and body.startswith(ICC_HEADER) and len(body) > len(ICC_HEADER) + 2:
            profile[body[len(ICC_HEADER)]] = body[len(ICC_HEADER) + 2 :]
        elif not (0xE1 <= marker <= 0xEF and marker != 0xEE) and marker != 0xFE:  # Adobe's says what the colors are
            kept.append(data[place:end])
        place = end
    if profile:
        info["icc_profile"] = b"".join(profile[number] for number in sorted(profile))
    return Stripped(b"".join([*kept, data[place:]]), info)
