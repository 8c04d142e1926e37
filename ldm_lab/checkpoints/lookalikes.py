"""Files that lie where weights should, and are none: Git LFS pointers, saved web pages, answers of a server."""

import re
from pathlib import Path

from ldm_lab.errors import UserError

HEAD = 4096  # bytes of a file that are looked at
TEXT = 1 << 16  # bytes: a longer file is not taken for an answer of a server
LFS = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
ANNEX = re.compile(rb"(\.\./|/)*(\.git/)?annex/objects/")
MARKUP = re.compile(r"<(!doctype|html|head|body|script|meta|title|!--|\?xml|error|[a-z]+[\s>])", re.IGNORECASE)
OPENVINO = re.compile(r"<(\?xml[^>]*>\s*<)?net\s")
TITLE = re.compile(r"<(title|message)[^>]*>([^<]+)", re.IGNORECASE)
SAVED = (b"From: <Saved by ", b"MIME-Version:", b"bplist00")  # MHTML of Chromium's and of others, Safari's archives
ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
ORIGINAL = "the original network's .safetensors, .pt or .ckpt is needed"
CONTAINERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras); of a head Keras's SavedModel, a folder, is read",
    b"GGUF": f"a GGUF file (llama.cpp's): {ORIGINAL}",
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg", b"algg"), f"a GGML file (llama.cpp's): {ORIGINAL}"),
    **dict.fromkeys((b"ftrt", b"ptrt"), f"a TensorRT engine: {ORIGINAL}"),
    b"\x1f\x8b": "compressed by gzip: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first (unzstd)",
    b"BZh": "compressed by bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "compressed by xz: unpack it first (unxz)",
    b"\x04\x22\x4d\x18": "compressed by lz4: unpack it first (unlz4)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
WITHIN = {  # (place, bytes) -> what it is
    (257, b"ustar"): "a tar archive: unpack it first",
    (4, b"TFL3"): f"a model of TensorFlow Lite's: {ORIGINAL}",
}
ONNX = re.compile(rb"\x08[\x01-\x14](\x12|\x3a|\x42)", re.DOTALL)  # its version, then its producer, graph or opset
ENDINGS = {
    ".onnx": f"an ONNX model: {ORIGINAL}",
    **dict.fromkeys((".engine", ".plan", ".trt"), f"a TensorRT engine: {ORIGINAL}"),
    **dict.fromkeys((".mlmodel", ".mlpackage"), f"a Core ML model: {ORIGINAL}"),
    ".tflite": f"a model of TensorFlow Lite's: {ORIGINAL}",
    ".msgpack": f"Flax's weights: {ORIGINAL}",
    ".distcp": "a part of a torch.distributed checkpoint; name its folder to be told how to put it together",
}  # of files that their first bytes do not tell


def check_is_weights(path: Path) -> None:
    """Raise UserError for a file that is known to be no weights, by its first bytes; one line says what it is."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    what = lookalike(head, path.stat().st_size)
    ending = path.suffix.lower() if path.suffix.lower() in ENDINGS else ".onnx" if ONNX.match(head) else None
    if what is None and ending is not None:
        what = f"it is {ENDINGS[ending]}"
    if what is not None:
        raise UserError(f"{path}: no weights: {what}")


def lookalike(head: bytes, size: int) -> str | None:
    """Return what a file is that is no weights, and the way out; None for all others.

    Args:
        head: its first bytes.
        size: bytes of all of it.
    """
    bare = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "the file is empty"
    if LFS.match(bare):
        meant = re.search(rb"^size (\d{1,15})\s*$", bare, re.MULTILINE)
        of = f" of a file of {int(meant[1]):,} bytes" if meant else ""
        return f"it is a Git LFS pointer{of}; `git lfs pull` in the clone brings the file itself, or download it"
    if ANNEX.match(bare):
        return "it is a git-annex pointer; `git annex get` in the clone brings the file itself"
    if bare.startswith(SAVED):
        return "it is a saved web page; take the link that downloads the file"
    for magic, what in CONTAINERS.items():
        if head.startswith(magic):
            return f"it is {what}"
    for (place, magic), what in WITHIN.items():
        if head[place:].startswith(magic):
            return f"it is {what}"
    if len(head) == HEAD and not any(head):
        return "it begins with zeros alone: a download or a copy that was broken off"
    text = _text(head)
    if text is None:
        return None
    if OPENVINO.match(text.lstrip()):
        return f"it is an OpenVINO model: {ORIGINAL}"
    if MARKUP.match(text.lstrip()):
        title = TITLE.search(text)
        named = f" ({_short(title[2])})" if title else ""
        hint = "take the link that downloads the file (on the Hugging Face Hub /resolve/ in place of /blob/)"
        return f"it is a saved web page{named}; {hint}"
    if size > TEXT:
        return None
    return f"it is a text that begins {_short(text)!r}"


def _text(head: bytes) -> str | None:
    """Return the beginning of a text; None if the bytes are not those of one."""
    encoding = next((name for mark, name in ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < len(head) - 4:  # a letter may be cut in two at the end
            text = head.decode("latin-1") if MARKUP.match(head.lstrip().decode("latin-1")) else ""
        else:
            text = head[: error.start].decode(encoding)
    readable = text.strip() and all(letter.isprintable() or letter in "\t\r\n\f\xa0\xad\u200b" for letter in text)
    return text if readable or MARKUP.match(text.lstrip()) else None


def _short(text: str) -> str:
    """Return the first words of a text as one line that a terminal may show."""
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= 60 else f"{line[:59]}…"
