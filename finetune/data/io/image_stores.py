"""Image stores: folders, zip and tar archives, MIMIC-IT's JSON of {id: base64}, Parquet files of ids and images.

Nothing is unpacked to the disk, and no size that an archive gives is trusted.
"""

import errno
import io
import json
import mmap
import os
import posixpath
import re
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.images import decode_base64
from finetune.data.io.byte_streams import BrokenFileError
from finetune.data.io.parquet_arrow import Checked, Parquet, open_parquet, python_rows, read_group
from finetune.data.io.paths import IMAGE_SUFFIXES, Names
from finetune.data.io.remote import open_local
from finetune.data.io.tars import read_members
from finetune.recipe.urls import shown, url_below
from modeling.errors import UserError


class Store(ABC):
    """A place where the images of a source are looked up; it is indexed at the first look-up."""

    def __init__(self, path: Path, inner: str = "."):
        self.path, self.inner = path, inner

    @abstractmethod
    def find(self, name: str) -> Image | None:
        """Return the image of that name, None if there is none. Raises RecordError: it is unusable, or outside."""

    def near(self, name: str) -> str | None:
        """Return the nearest name that exists, where it is cheap to find."""
        return None


class Folder(Store):
    """Files below a folder. Links may lead into it or into another of `roots`, and nowhere else."""

    def __init__(self, path: Path, roots: tuple[Path, ...] = ()):
        super().__init__(path.resolve())
        self._roots = (self.path, *roots)

    def find(self, name: str) -> Image | None:
        path = self.locate(name)
        try:
            return Image(path) if path.exists() else None
        except OSError as error:
            raise RecordError("not an image reference", f"{name:.200}: {error.strerror}") from error

    def locate(self, name: str) -> Path:
        """Return where a file is, or would be. Raises RecordError: outside the folder."""
        try:
            path = _resolved(self.path / name)
            outside = None if self._holds(path) else self._why_outside(name, path)
        except (UnicodeEncodeError, RuntimeError, OSError) as error:  # a lone surrogate; a loop of links
            raise RecordError("not an image reference", f"{name!r:.200}: {error}") from error
        if outside:
            raise RecordError("image outside the image root", outside)
        return path

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _why_outside(self, name: str, path: Path) -> str:
        """Return which link leads outside, if one does, and, if an image is there, the line that allows it."""
        where, folder = f"{name:.200} is not under {self.path}", path.parent
        steps = [self.path.joinpath(*Path(name).parts[:count]) for count in range(1, len(Path(name).parts) + 1)]
        targets = ((step, _resolved(step / "image").parent) for step in steps if ".." not in step.parts)
        link, target = next((each for each in targets if not self._holds(each[1])), (None, path))
        if link and link != target:
            folder = target if target.is_dir() else target.parent
            where = f"{name:.200}: {link} is a link to {target}, outside of {self.path}"
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            return where
        return f"{where}; `image_root: [{self.path}, {folder}]` allows it"


class RemoteFolder(Store):
    """Files below a remote folder. It is not listed: an image that is missing is found out when it is downloaded."""

    def find(self, name: str) -> Image:
        inside = posixpath.relpath(posixpath.join(self.path, name), self.path)
        if inside == "." or f"{inside}/".startswith("../"):
            raise RecordError("image outside the image root", f"{name:.200} is not under {shown(self.path)}")
        return Image(Remote(url_below(self.path, inside)))


def _resolved(path: Path) -> Path:
    """Return a path without links; a small file that holds a folder's path, as git writes on some disks, is a link."""
    path = path.resolve()
    file = path if path.exists() else next(outer for outer in path.parents if outer.exists())
    if file == path or not file.is_file() or file.stat().st_size > 1000:
        return path
    try:
        target = (file.parent / file.read_text(encoding="utf-8")).resolve()
        return target / path.relative_to(file) if target.is_dir() else path
    except ValueError:  # no text, or none that names a file
        return path


class Archive(Store):
    """Members of an archive, below the folder `inner` of it."""

    @property
    @abstractmethod
    def _members(self) -> Mapping[str, object]:
        """Name -> member, without names that lead out of the archive or up in it."""

    @abstractmethod
    def _open(self, path: str) -> Image | None: ...

    def find(self, name: str) -> Image | None:
        path = posixpath.normpath(posixpath.join(self.inner, name))
        if f"{path}/".startswith(("/", "../")) or not path.startswith(self._prefix):
            raise RecordError("image outside the image root", f"{name:.200} is not under {self.path / self.inner}")
        return self._open(path)

    def near(self, name: str) -> str | None:
        return self._names.near(name)

    @cached_property
    def _names(self) -> Names:
        inside = (name for name in self._members if name.startswith(self._prefix))
        return Names(name.removeprefix(self._prefix) for name in inside)

    @property
    def _prefix(self) -> str:
        return "" if self.inner == "." else f"{self.inner}/"


def _member_name(name: str) -> str | None:
    """Return a member's name without "./" and "//"; None for one that leads out of the archive, or up in it."""
    return None if name.startswith("/") or ".." in name.split("/") else posixpath.normpath(name)


class Zip(Archive):
    """A zip archive. Members are stored or deflated; encrypted ones, other methods and links are refused."""

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with _BoundedIndex(open_local(self.path).detach()) as file, zipfile.ZipFile(file) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except Exception as error:  # hostile archives make zipfile raise struct.error, OverflowError and more
            raise UserError(f"{self.path}: a zip archive that cannot be read: {error}") from error
        members = {name: info for info in infos if (name := _member_name(info.filename)) is not None}
        for info in infos:  # other ways to write a name: on Windows, and in UTF-8 without the flag that says so
            for name in (_member_name(info.filename.replace("\\", "/")), _member_name(_in_utf8(info))):
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
        """Return where a member's data begin: after its own header, whose length is not in the archive's index."""
        header = b""
        with open_local(self.path) as file:
            if 0 <= member.header_offset < os.fstat(file.fileno()).st_size:
                file.seek(member.header_offset)
                header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise RecordError("corrupt image", f"{member.filename[:200]!a} in {self.path}: its header is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return member.header_offset + 30 + name_length + extra_length


MAX_INDEX = 2**28
"""Bytes of a zip archive's index, about three million members: zipfile reads it whole."""


class _BoundedIndex(io.BufferedReader):
    """A zip archive of which zipfile can read no more than `MAX_INDEX` bytes at once, whatever the archive says."""

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
            found = [(_member_name(member.name), member.content) for member in read_members(self.path)]
        except BrokenFileError as error:
            raise UserError(f"{self.path}: a tar archive that cannot be read: {error.detail}") from error
        return {name: content for name, content in found if name is not None}

    def _open(self, path: str) -> Image | None:
        content = self._members.get(path)
        if isinstance(content, RecordError):
            raise content
        return None if content is None else Image(content)


class JsonImages(Store):
    """A MIMIC-IT file, {id: base64}, searched once for where each image lies."""

    @cached_property
    def _slices(self) -> dict[str, tuple[int, int]]:
        try:
            with open_local(self.path) as file:
                if not os.fstat(file.fileno()).st_size:
                    raise OSError(errno.EINVAL, "the file is empty", str(self.path))
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    return dict(self._scan(content))
        except OSError as error:
            detail = f"expected {{id: base64, ...}}, which cannot be read: {error.strerror}"
            raise UserError(f"{self.path}: {detail}") from error

    def _scan(self, content: mmap.mmap) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (id, (offset, length)) of each image."""
        opening = _OPENING.match(content)
        position = opening.end() if opening else 0
        entry = _ENTRY.match(content, position) if opening else None
        while entry is not None:
            try:
                name = json.loads(entry["id"])
            except ValueError as error:  # not UTF-8, or an escape that JSON does not have
                raise self._error(position) from error
            yield name, (entry.start("image"), entry.end("image") - entry.start("image"))
            position = entry.start("more")
            entry = _ENTRY.match(content, entry.end()) if entry["more"] else None
        if not _CLOSING.fullmatch(content, position):
            raise self._error(position)

    def _error(self, position: int) -> UserError:
        return UserError(f"{self.path}: expected {{id: base64, ...}}; that breaks off at byte {position}")

    def find(self, name: str) -> Image | None:
        found = self._slices.get(name)
        return Image(Slice(self.path, *found, "base64")) if found else None

    def near(self, name: str) -> str | None:
        return self._names.near(name)

    @cached_property
    def _names(self) -> Names:
        return Names(self._slices)


_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_ENTRY = re.compile(
    rb"""\s*(?P<id>"(?:[^"\\]++|\\.)*+")\s*:\s*"(?:data:image/[\w.+-]+;base64,)?(?P<image>[^"]*+)"\s*(?P<more>,|(?=\}))"""
)
_CLOSING = re.compile(rb"\s*\}\s*")


class ParquetImages(Store):
    """A Parquet file of ids and images; one row group of it is in memory at a time."""

    _latest: tuple[int, list[Checked]] | None = None
    """The row group that was read last, and its images."""

    @cached_property
    def _file(self) -> Parquet:
        try:
            return open_parquet(self.path)
        except BrokenFileError as error:
            raise self._error(error) from error

    @cached_property
    def _columns(self) -> tuple[str, str]:
        names = self._file.file.schema_arrow.names
        chosen = [next((name for name in names if name in known), None) for known in (_IDS, _IMAGES)]
        if None in chosen:
            raise UserError(
                f"{self.path}: expected a column of {' or '.join(_IDS)} and one of {' or '.join(_IMAGES)}, "
                f"got {', '.join(names)}"
            )
        return str(chosen[0]), str(chosen[1])

    @cached_property
    def _index(self) -> dict[str, tuple[int, int]]:
        """Return id -> (row group, row in it)."""
        (column, _), index = self._columns, {}
        for group in range(len(self._file.groups)):
            for number, row in enumerate(row for one in self._read(group, column) for row in python_rows(one)):
                if isinstance(row, RecordError):
                    raise self._error(row)
                index[str(row[column])] = group, number
        return index

    def find(self, name: str) -> Image | None:
        if name not in self._index:
            return None
        group, number = self._index[name]
        if self._latest is None or self._latest[0] != group:
            self._latest = group, self._read(group, self._columns[1])
        for one in self._latest[1]:
            if number < one.batch.num_rows:
                (row,) = python_rows(Checked(one.batch.slice(number, 1), one.valid))
                return self._image(name, row)
            number -= one.batch.num_rows
        return None

    def _image(self, name: str, row: dict[str, Any] | RecordError) -> Image:
        if isinstance(row, RecordError):
            raise RecordError("corrupt image", f"{name:.200} in {self.path}: {row}")
        value = row[self._columns[1]]
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, str):
            return Image(decode_base64(content))
        if not isinstance(content, bytes):
            raise RecordError("corrupt image", f"{name:.200} in {self.path}: no bytes")
        return Image(content)

    def _read(self, group: int, column: str) -> list[Checked]:
        try:
            return read_group(self._file, group, column)
        except BrokenFileError as error:
            raise self._error(error) from error

    def _error(self, error: RecordError) -> UserError:
        return UserError(f"{self.path}: a Parquet file that cannot be read: {error}")


_IDS = ("id", "image_id", "__index_level_0__")
_IMAGES = ("image", "base64")
