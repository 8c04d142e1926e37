"""What the first shards hold, for the start of a run: from their lists of files, without reading them through."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm_lab.data.beside import lines_about
from ldm_lab.data.captions import NONE, Caption, Captions
from ldm_lab.data.folders import need_plugins
from ldm_lab.data.samples import RawSample, caption_of
from ldm_lab.data.shard_urls import is_remote, scheme_of
from ldm_lab.data.tar import read_shard
from ldm_lab.data.tar_files import KeyUntil, list_files
from ldm_lab.io.decoding import IMAGE_ENDINGS
from ldm_lab.io.json_files import parse_json

LISTED = 100  # local shards whose lists of files are begun
BEGUN = 64  # files of each
FILES = 50_000  # files of the first shard that are listed
LOOKED_AT = 50  # samples of it that are read
KEYS = ("caption", "text", "prompt", "TEXT", "alt_text")  # of json that are likely to be captions


@dataclass
class ShardFiles:
    """What a shard's list of files says.

    Attributes:
        images: samples with an image.
        kinds: other extensions -> images that have such a file.
        others: extension -> files of samples without an image.
        links: links to what is not in the shard.
        names: the images' names.
        is_whole: all of its files were listed.
    """

    images: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    links: int = 0
    names: list[str] = field(default_factory=list)
    is_whole: bool = True


def files_of(address: str, key_until: KeyUntil, most: int) -> ShardFiles | None:
    """Return what a local shard's list of at most so many files says; None if it cannot be listed."""
    listed = list_files(address, most)
    if listed is None:
        return None
    found = ShardFiles(links=len(listed.links), is_whole=listed.is_whole)
    for its in listed.by_key(key_until).values():
        image = next((extension for extension in IMAGE_ENDINGS if extension in its), None)
        if image is None:
            found.others.update(list(its))
            continue
        found.images += 1
        found.names.append(its[image].name)
        found.kinds.update(extension for extension in its if extension != image)
    return found


def describe_shards(addresses: Sequence[str], captions: Captions, key_until: KeyUntil) -> list[str]:
    """Return what is seen of some shards at the start of a run, a line each."""
    local = [address for address in addresses if not (is_remote(address) or scheme_of(address))]
    remote = len(addresses) - len(local)
    lines = [f"{count_of(len(addresses), 'shard')}{f', {remote:,} not local' if remote else ''}"]
    empty: list[str] = []
    for address in local[:LISTED]:
        files = files_of(address, key_until, BEGUN)
        if files is not None and files.is_whole and not files.images:
            empty.append(address)
    if empty:
        more = ", ..." if len(empty) > 3 else ""
        lines.append(f"{count_of(len(empty), 'shard')} without an image: {', '.join(empty[:3])}{more}")
    first = next((address for address in local if address not in empty), local[0] if local else "")
    files = files_of(first, key_until, FILES) if first else None
    if files is not None:
        lines += describe_first(first, files, captions, key_until)
    elif addresses:
        lines.append("what they hold is told at the end")
    return lines


def count_of(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def describe_first(address: str, files: ShardFiles, captions: Captions, key_until: KeyUntil) -> list[str]:
    """Return what the first shard shows, a line each."""
    name = os.path.basename(address)
    kinds = ", ".join(f"{count:,} .{kind}" for kind, count in files.kinds.most_common(6)) or "no other file"
    begun = "" if files.is_whole else f"the first {FILES:,} files of "
    lines = [f"{begun}{name}: {files.images:,} images, with {kinds}"]
    dotted = [kind for kind in files.others if "." in kind and kind.rpartition(".")[2] in IMAGE_ENDINGS]
    if dotted and not files.images:
        lines.append(f"{name}: names have dots in them; data.key_until=last_dot takes them up to the last one")
    elif files.others:
        others = ", ".join(f"{count:,} .{kind}" for kind, count in files.others.most_common(4))
        lines.append(f"{name}: files without an image: {others}")
    if files.links:
        lines.append(f"{name}: {count_of(files.links, 'link')} to files that are not in it; tar -h stores the files")
    if plugins := need_plugins(files.names):
        lines.append(f"{name}: {plugins}")
    if not files.images:
        return lines
    read = itertools.islice(read_shard(address, captions.endings, key_until), LOOKED_AT)
    samples = [item for item in read if isinstance(item, RawSample) and item.image is not None]
    found = [(sample.key, caption_of(sample, captions)) for sample in samples]
    places = Counter(caption.place for _, caption in found)
    told = ", ".join(f"{count} {place}" for place, count in places.most_common() if place != NONE) or "none"
    lines.append(f"captions of the first {len(found)} samples: {told}; {places[NONE]} without")
    return lines + lines_about([(key, its) for key, its in found if its.place != NONE]) + hints(samples, found)


def hints(samples: list[RawSample], found: list[tuple[str, Caption]]) -> list[str]:
    """Return where captions might be that are not read, a line each."""
    if any(caption.texts for _, caption in found):
        return []
    keys = Counter(key for sample in samples for key in KEYS if parse_json(sample.json).get(key))
    return [f"the json of {count} of them has {key!r}: data.captions.json_key={key} takes the captions from it"
            for key, count in keys.most_common(1)]  # fmt: skip
