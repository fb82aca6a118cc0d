"""Where images lie: folders, zip and tar archives, MIMIC-IT's files of {id: base64}. Nothing is unpacked."""

import json
import mmap
import posixpath
import re
import stat
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.data.dialogue import Image, RecordError, Slice
from finetune.data.images import decode_base64
from finetune.data.sources.files import locate
from finetune.data.sources.shards import COMPRESSED_TARS, read_members
from finetune.data.sources.streams import BrokenFileError
from modeling.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


class Store(ABC):
    """One place where the images of a source are looked up; indexed when it is first asked."""

    def __init__(self, path: Path, inner: str = "."):
        self.path, self.inner = path, inner

    @abstractmethod
    def find(self, name: str) -> Image | None:
        """The image of that name, None if it is not there. Raises RecordError: it cannot be used, or is outside."""


def open_store(path: Path) -> Store:
    """The store a path leads to. Raises UserError: nothing is there, or nothing that images can be looked up in."""
    found, inner = locate(path)
    if found.is_dir():
        return Folder(found.resolve())
    name = found.name.lower()
    if name.endswith(COMPRESSED_TARS):
        raise UserError(
            f"{found}: a compressed tar archive has to be read from its start for every image; "
            "unpack it, or make a plain .tar or a .zip of it"
        )
    kind = _KINDS.get(found.suffix.lower())
    if kind is None:
        raise UserError(f"{found}: expected a folder of images, or a file that ends in {', '.join(_KINDS)}")
    if inner != "." and not issubclass(kind, _Archive):
        raise UserError(f"{path}: {found.name} holds no folders")
    return kind(found, inner)


class Folder(Store):
    """Files below a folder."""

    def find(self, name: str) -> Image | None:
        path = self.place(name)
        try:
            return Image(path) if path.exists() else None
        except OSError as error:
            raise RecordError("not an image reference", f"{name:.200}: {error.strerror}") from error

    def place(self, name: str) -> Path:
        """Where a file is, or would be. Raises RecordError: outside of the folder."""
        try:
            path = (self.path / name).resolve()
        except (UnicodeEncodeError, RuntimeError, OSError) as error:  # a lone surrogate; a loop of links
            raise RecordError("not an image reference", f"{name!r:.200}: {error}") from error
        if not path.is_relative_to(self.path):
            raise RecordError("image outside the image root", f"{name:.200} is not under {self.path}")
        return path


class _Archive(Store):
    """Members of an archive, below the folder `inner` of it."""

    def find(self, name: str) -> Image | None:
        path = posixpath.normpath(posixpath.join(self.inner, name))
        allowed = "" if self.inner == "." else f"{self.inner}/"
        if f"{path}/".startswith(("/", "../")) or not path.startswith(allowed):
            raise RecordError("image outside the image root", f"{name:.200} is not under {self.path / self.inner}")
        return self._open(path)

    @abstractmethod
    def _open(self, path: str) -> Image | None: ...


class Zip(_Archive):
    """A zip archive. Members are stored or deflated; encrypted ones, other methods and links are refused."""

    @cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                return {posixpath.normpath(info.filename): info for info in archive.infolist() if not info.is_dir()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(f"{self.path}: a zip archive that cannot be read: {error}") from error

    def _open(self, path: str) -> Image | None:
        member = self._members.get(path)
        if member is None:
            return None
        if stat.S_ISLNK(member.external_attr >> 16):
            raise RecordError("not a file", f"{path:.200} is a link in {self.path}")
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
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise RecordError("corrupt image", f"{member.filename:.200} in {self.path}: its header is damaged")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        return member.header_offset + 30 + name_length + extra_length


class Tar(_Archive):
    """A plain tar archive; links are refused."""

    @cached_property
    def _members(self) -> dict[str, Slice | bytes | RecordError]:
        try:
            return {posixpath.normpath(member.name): member.content for member in read_members(self.path)}
        except BrokenFileError as error:
            raise UserError(f"{self.path}: a tar archive that cannot be read: {error.detail}") from error

    def _open(self, path: str) -> Image | None:
        content = self._members.get(path)
        if isinstance(content, RecordError):
            raise content
        return None if content is None else Image(content)


class Json(Store):
    """A MIMIC-IT file, {id: base64}: scanned once for where each image lies."""

    @cached_property
    def _slices(self) -> dict[str, tuple[int, int]]:
        with self.path.open("rb") as file:
            try:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise self._error(0) from error
            with content:
                return dict(self._scan(content))

    def _scan(self, content: mmap.mmap) -> Iterator[tuple[str, tuple[int, int]]]:
        opening = _OPENING.match(content)
        position = opening.end() if opening else 0
        entry = _ENTRY.match(content, position) if opening else None
        while entry is not None:
            yield json.loads(entry["id"]), (entry.start("image"), entry.end("image") - entry.start("image"))
            position = entry.start("more")
            entry = _ENTRY.match(content, entry.end()) if entry["more"] else None
        if not _CLOSING.fullmatch(content, position):
            raise self._error(position)

    def _error(self, position: int) -> UserError:
        return UserError(f"{self.path}: expected {{id: base64, ...}}; that breaks off at byte {position}")

    def find(self, name: str) -> Image | None:
        found = self._slices.get(name)
        return Image(Slice(self.path, *found, "base64")) if found else None


_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_ENTRY = re.compile(
    rb"""\s*(?P<id>"(?:[^"\\]++|\\.)*+")\s*:\s*"(?:data:image/[\w.+-]+;base64,)?(?P<image>[^"]*+)"\s*(?P<more>,|(?=\}))"""
)
_CLOSING = re.compile(rb"\s*\}\s*")


class Parquet(Store):
    """A table of ids and images; one row group of it in memory at a time."""

    @cached_property
    def _columns(self) -> tuple[str, str]:
        with self._file() as file:
            names = file.schema_arrow.names
        chosen = [next((name for name in names if name in known), None) for known in (_IDS, _IMAGES)]
        if None in chosen:
            raise UserError(
                f"{self.path}: expected a column of {' or '.join(_IDS)} and one of {' or '.join(_IMAGES)}, "
                f"got {', '.join(names)}"
            )
        return str(chosen[0]), str(chosen[1])

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """id -> (row group, row in it)"""
        column, _ = self._columns
        with self._file() as file:
            return {
                str(name): (group, row)
                for group in range(file.num_row_groups)
                for row, name in enumerate(file.read_row_group(group, columns=[column])[column].to_pylist())
            }

    def find(self, name: str) -> Image | None:
        place = self._places.get(name)
        if place is None:
            return None
        value = self._group(place[0])[place[1]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, str):
            return Image(decode_base64(content))
        if not isinstance(content, bytes):
            raise RecordError("corrupt image", f"{name:.200} in {self.path}: no bytes")
        return Image(content)

    def _group(self, number: int) -> "pyarrow.ChunkedArray":
        if self._latest is None or self._latest[0] != number:
            _, column = self._columns
            with self._file() as file:
                self._latest = number, file.read_row_group(number, columns=[column])[column]
        return self._latest[1]

    _latest: "tuple[int, pyarrow.ChunkedArray] | None" = None

    @contextmanager
    def _file(self) -> Iterator["pyarrow.parquet.ParquetFile"]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: a Parquet file that cannot be read: {error}") from error


_IDS = ("id", "image_id", "__index_level_0__")
_IMAGES = ("image", "base64")

_KINDS: dict[str, type[Store]] = {".zip": Zip, ".tar": Tar, ".json": Json, ".parquet": Parquet}
