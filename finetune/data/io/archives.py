"""Zip and tar archives in which images lie. Nothing is unpacked, and what an archive says of itself is not believed."""

import io
import os
import posixpath
import stat
import struct
import zipfile
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from finetune.data.conversation import Image, RecordError, Slice
from finetune.data.io.paths import Names
from finetune.data.io.shards import read_members
from finetune.data.io.stores import Store
from finetune.data.io.streams import BrokenFileError
from modeling.errors import UserError
from modeling.files import open_regular


class Archive(Store):
    """Members of an archive, below the folder `inner` of it."""

    @property
    @abstractmethod
    def _members(self) -> Mapping[str, object]:
        """Name -> member; a name that leads out of the archive, or up in it, is none."""

    def find(self, name: str) -> Image | None:
        path = posixpath.normpath(posixpath.join(self.inner, name))
        if f"{path}/".startswith(("/", "../")) or not path.startswith(self._prefix):
            raise RecordError("image outside the image root", f"{name:.200} is not under {self.path / self.inner}")
        return self._open(path)

    @abstractmethod
    def _open(self, path: str) -> Image | None: ...

    def near(self, name: str) -> str | None:
        return self._names.near(name)

    @cached_property
    def _names(self) -> Names:
        inside = (name for name in self._members if name.startswith(self._prefix))
        return Names(name.removeprefix(self._prefix) for name in inside)

    @property
    def _prefix(self) -> str:
        return "" if self.inner == "." else f"{self.inner}/"


def _inside(name: str) -> str | None:
    """A member's name without "./" and "//"; None for one that leads out of the archive, or up in it."""
    return None if name.startswith("/") or ".." in name.split("/") else posixpath.normpath(name)


class Zip(Archive):
    """A zip archive. Members are stored or deflated; encrypted ones, other methods and links are refused."""

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with _Index(open_regular(self.path)) as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except Exception as error:  # hostile archives make zipfile raise struct.error, OverflowError and more
            raise UserError(f"{self.path}: a zip archive that cannot be read: {error}") from error
        members = {name: info for info in infos if (name := _inside(info.filename)) is not None}
        for info in infos:  # other ways to write a name: on Windows, and in UTF-8 without the mark that says so
            for name in (_inside(info.filename.replace("\\", "/")), _inside(_in_utf8(info))):
                if name is not None:
                    members.setdefault(name, info)
        return members

    def _open(self, path: str) -> Image | None:
        member = self._members.get(path)
        if member is None:
            return None
        if stat.S_ISLNK(member.external_attr >> 16):
            raise RecordError("not a file", f"{path[:200]!a} is a link in {self.path}")
        if member.flag_bits & 1:
            raise RecordError("encrypted image", f"{path:.200} in {self.path}")
        codings: dict[int, Literal["raw", "deflate"]] = {zipfile.ZIP_STORED: "raw", zipfile.ZIP_DEFLATED: "deflate"}
        coding = codings.get(member.compress_type)
        if coding is None:
            detail = f"{path:.200} in {self.path}: expected stored or deflated, got method {member.compress_type}"
            raise RecordError("unknown compression", detail)
        return Image(Slice(self.path, self._offset(member), member.compress_size, coding))

    def _offset(self, member: zipfile.ZipInfo) -> int:
        """Where a member's data begin: after its own header, whose length the archive's index does not tell."""
        header = b""
        with open_regular(self.path) as file:
            if 0 <= member.header_offset < os.fstat(file.fileno()).st_size:
                file.seek(member.header_offset)
                header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise RecordError("corrupt image", f"{member.filename[:200]!a} in {self.path}: its header is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return member.header_offset + 30 + name_length + extra_length


MAX_INDEX = 2**28
"""Bytes of a zip archive's index, about three million members: it is read whole."""


class _Index(io.BufferedReader):
    """A zip archive as zipfile reads its index: not whole, whatever the archive says of the index's size."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(file.detach())

    def read(self, size: int | None = -1) -> bytes:
        asked = size if size is not None and size >= 0 else os.fstat(self.fileno()).st_size - self.tell()
        if asked > MAX_INDEX:
            raise zipfile.BadZipFile(f"an index of {asked:,} bytes")
        return super().read(size)


def _in_utf8(info: zipfile.ZipInfo) -> str:
    try:
        return info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


class Tar(Archive):
    """A plain tar archive; links are refused."""

    @cached_property
    def _members(self) -> dict[str, Slice | bytes | RecordError]:
        try:
            found = [(_inside(member.name), member.content) for member in read_members(self.path)]
        except BrokenFileError as error:
            raise UserError(f"{self.path}: a tar archive that cannot be read: {error.detail}") from error
        return {name: content for name, content in found if name is not None}

    def _open(self, path: str) -> Image | None:
        content = self._members.get(path)
        if isinstance(content, RecordError):
            raise content
        return None if content is None else Image(content)
