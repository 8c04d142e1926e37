"""What is told to strangers: files without the folders that they lie in on this machine, which they need not know."""

import re

# Of a name in a path: no blank at its ends, quotes and colons inside of words alone, as other ones end a path.
LETTER = r"""(?:[^\s/\\:'"]|(?<=\w)'(?=\w)|:(?=\w))"""
ENDINGS = "safetensors|ckpt|pth?|bin|npy|npz|png|jpe?g|webp|gif|json|jsonl|yaml|yml|tar|parquet|csv|txt|model|html"
AFTER_FILE = (
    rf"(?![^/\\]*\.(?:{ENDINGS})\b[,;.)\]]*\s)"  # a blank behind a file's name ends it, in a folder's it may be
)
NAME = rf"{AFTER_FILE}{LETTER}(?: *{LETTER})*"
POSIX = re.compile(rf"(?:file://|(?<![\w.:/~\\]))~?/+(?:{NAME}/+)+")
WINDOWS = re.compile(rf"(?:(?<!\w)[A-Za-z]:[\\/]+|(?<![\w\\])\\\\+{NAME}\\+)(?:{NAME}[\\/]+)*")


def without_folders(text: str) -> str:
    """Return a text in which files are named without their folders.

    Folders may have blanks in their names, and be of any system. Where words after a path look like a part of it they
    go, too: rather that than to tell where something lies.
    """
    return POSIX.sub("", WINDOWS.sub("", text))
