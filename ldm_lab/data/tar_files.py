"""The list of a local tar file's members, without their content, and the names of samples' files."""

import os
import tarfile
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from webdataset.tariterators import base_plus_ext

from ldm_lab.data.folders import DROPPINGS
from ldm_lab.data.shard_urls import scheme_of
from ldm_lab.data.text import composed

KeyUntil = Literal["first_dot", "last_dot"]


LARGEST_SIZE = 2**37  # bytes of a member; tarfile would look for the end of a larger one for hours


class Archive(tarfile.TarFile):
    """A tar file, or several in a row (`cat a.tar b.tar`), read without forbearance.

    tarfile takes a damaged header in mid-archive for its end, and so the file's end without the archive's own, and
    leaves what comes behind an end; here the first two are errors, and the last is read.
    """

    ignore_zeros = True
    has_ended = False  # the last block was one of those that end an archive

    class tarinfo(tarfile.TarInfo):
        """The header of a member, called as tarfile looks for it."""

        @classmethod
        def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
            assert isinstance(archive, Archive)
            try:
                member = super().fromtarfile(archive)
            except tarfile.EOFHeaderError:
                archive.has_ended = True
                raise
            except tarfile.EmptyHeaderError as error:
                if archive.has_ended:
                    raise
                raise tarfile.ReadError(str(error)) from None
            except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
                raise tarfile.ReadError(str(error)) from None
            archive.has_ended = False
            if member.size > LARGEST_SIZE:
                raise tarfile.ReadError(f"{member.name} cannot have {member.size} bytes")
            return member


def split_name(name: str, key_until: KeyUntil = "first_dot") -> tuple[str, str]:
    """Return (key, extension in lower case) of a file in a shard; the extension is "" for what belongs to no sample."""
    base = os.path.basename(name)
    if base.startswith(".") or any(part in DROPPINGS for part in name.split("/")):
        return name, ""
    if key_until == "last_dot":
        key, extension = os.path.splitext(name)
        return key, extension[1:].lower()
    key, extension = base_plus_ext(name)
    return key or name, (extension or "").lower()


def target_of(member: tarfile.TarInfo) -> str:
    """Return the name of the member that a link means."""
    if member.islnk():
        return os.path.normpath(member.linkname)
    return os.path.normpath(os.path.join(os.path.dirname(member.name), member.linkname))


@dataclass(frozen=True)
class Member:
    """A file in a local tar file.

    Attributes:
        name: of it.
        offset: of its content, bytes; -1 if the content has holes.
        size: of its content, bytes.
        stored: the name that its content is stored under; another one for a link.
    """

    name: str
    offset: int
    size: int
    stored: str

    def read(self, path: str) -> bytes:
        """Return the content. Raises OSError, tarfile.TarError."""
        if self.offset < 0:
            with tarfile.open(path, "r:") as archive:
                return archive.extractfile(self.stored).read()
        with open(path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise EOFError(f"{path}: ends within {self.name}")
        return content


@dataclass
class TarList:
    """The files in a local tar file.

    Attributes:
        members: files and links to files that are in it.
        links: names of links to what is not in it.
        is_broken: it breaks off behind these.
        is_whole: the list ends where the tar file does.
        repeated: composed keys of more than one sample, once `by_key` has been asked.
    """

    members: list[Member] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    is_broken: bool = False
    is_whole: bool = True
    repeated: set[str] = field(default_factory=set)
    _by_key: dict[KeyUntil, dict[str, dict[str, Member]]] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it is the list of a whole tar file in which all files lie as such: no links, no holes."""
        plain = all(member.offset >= 0 and member.stored == member.name for member in self.members)
        return plain and self.is_whole and not self.is_broken and not self.links

    @cached_property
    def by_name(self) -> dict[str, Member]:
        """Its members by their names."""
        return {os.path.normpath(member.name): member for member in self.members}

    def by_key(self, key_until: KeyUntil) -> dict[str, dict[str, Member]]:
        """Return composed key -> extension -> the first such file."""
        if key_until not in self._by_key:
            samples = self._by_key[key_until] = {}
            for member in self.members:
                key, extension = split_name(member.name, key_until)
                if extension and samples.setdefault(composed(key), {}).setdefault(extension, member) is not member:
                    self.repeated.add(composed(key))
        return self._by_key[key_until]

    def are_apart(self, key_until: KeyUntil) -> bool:
        """Return whether files of one sample lie apart."""
        seen: dict[str, set[str]] = {}
        last = None
        for member in self.members:
            key, extension = split_name(member.name, key_until)
            if not extension:
                continue
            key = composed(key)
            kinds = seen.setdefault(key, set())
            if kinds and key != last and extension not in kinds:
                return True
            kinds.add(extension)
            last = key
        return False


def list_files(path: str, most: int | None = None) -> TarList | None:
    """Return the list of a tar file's members; None if it is not local, is compressed, or no tar file.

    Args:
        path: of the tar file.
        most: members that are listed at most.
    """
    if scheme_of(path) or not os.path.isfile(path):
        return None
    found = TarList()
    stored: dict[str, Member] = {}
    links: list[tarfile.TarInfo] = []

    def add(member: Member) -> None:
        stored[os.path.normpath(member.name)] = member
        found.members.append(member)

    def is_linked(link: tarfile.TarInfo) -> bool:
        target = stored.get(target_of(link))
        if target is not None:
            add(Member(link.name, target.offset, target.size, target.stored))
        return target is not None

    try:
        with Archive.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every header
                if member.isreg():
                    offset = -1 if member.issparse() else member.offset_data
                    add(Member(member.name, offset, member.size, member.name))
                elif (member.issym() or member.islnk()) and not is_linked(member):
                    links.append(member)  # perhaps to a file that comes later
                if most is not None and len(found.members) + len(links) >= most:
                    found.is_whole = False
                    break
    except (tarfile.TarError, OSError, EOFError):
        if not found.members and not links:
            return None
        found.is_broken = True
        size = os.path.getsize(path)
        found.members = [member for member in found.members if member.offset + member.size <= size]
    found.links = [link.name for link in links if not is_linked(link)]
    return found
