"""Addresses of shards: what a pattern stands for, and which kind of place an address names.

An address is a local path, `http(s)://...`, a cloud address that webdataset knows, or `pipe:` and a shell command that
writes a tar file to its standard output.
"""

import glob
import os

import braceexpand
from webdataset.gopen import gopen_schemes

from ldm_lab.errors import UserError, unknown


def expand(patterns: list[str]) -> list[str]:
    """Return the shard addresses that some patterns stand for: braces first, then globs (sorted).

    Raises:
        UserError: no pattern at all, a pattern that matches nothing, a named local file that is not there, an unknown
            kind of address.
    """
    addresses, missing = [], []
    for pattern in patterns:
        try:
            alternatives = list(braceexpand.braceexpand(pattern, escape=False))
        except braceexpand.UnbalancedBracesError:
            raise UserError(f"data.shards: unbalanced braces in {pattern!r}") from None
        for address in alternatives:
            scheme = scheme_of(address)
            if scheme and scheme not in gopen_schemes:
                kind = unknown("kind of address", scheme, [s for s in gopen_schemes if not s.startswith("_")])
                hint = f" A command can read it: 'pipe:aws s3 cp {address} -'." if scheme == "s3" else ""
                raise UserError(f"data.shards: {address}: {kind}{hint}")
            if scheme:
                addresses.append(address)
                continue
            path = os.path.expanduser(address.removeprefix("file://"))
            if os.path.isfile(path):
                addresses.append(path)
            elif os.path.isdir(path):
                raise UserError(f"data.shards: {path} is a folder; its shards are {os.path.join(path, '*.tar')}")
            elif glob.has_magic(path):
                found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
                if not found:
                    raise UserError(f"data.shards: {pattern!r} matches no file")
                addresses += found
            else:
                missing.append(path)
    if missing:
        files = f"no such file: {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise UserError(f"data.shards: {files}; a pattern with * takes those that are there")
    if not addresses:
        raise UserError("data.shards: the list of shards is empty")
    return addresses


def is_remote(address: str) -> bool:
    """Return whether an address names a place on another machine."""
    return "://" in address


def scheme_of(address: str) -> str:
    """Return "pipe", "http", ... of an address, "" for a local path."""
    if address.startswith("pipe:"):
        return "pipe"
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    return "" if scheme == "file" else scheme


def without_ending(address: str) -> str:
    """Return a shard's address without its ending: .tar, .tar.gz, .tgz."""
    return address.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
