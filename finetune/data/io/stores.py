"""Where images lie: folders, and MIMIC-IT's files of {id: base64} or of ids and images. Nothing is unpacked."""

import errno
import json
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.data.conversation import Image, RecordError, Slice
from finetune.data.field_names import IMAGE_SUFFIXES
from finetune.data.images import decode_base64
from finetune.data.io.paths import Names
from finetune.data.io.streams import BrokenFileError
from finetune.data.io.tables import Checked, Parquet, open_parquet, python_rows, read_group
from modeling.errors import UserError
from modeling.files import open_regular


class Store(ABC):
    """One place where the images of a source are looked up; indexed when it is first asked."""

    def __init__(self, path: Path, inner: str = "."):
        self.path, self.inner = path, inner

    @abstractmethod
    def find(self, name: str) -> Image | None:
        """The image of that name, None if it is not there. Raises RecordError: it cannot be used, or is outside."""

    def near(self, name: str) -> str | None:
        """The nearest name that is there, where that is cheap to know."""
        return None


class Folder(Store):
    """Files below a folder. Links may lead into another one of `roots`, and nowhere else."""

    def __init__(self, path: Path, roots: tuple[Path, ...] = ()):
        super().__init__(path.resolve())
        self._roots = (self.path, *roots)

    def find(self, name: str) -> Image | None:
        path = self.place(name)
        try:
            return Image(path) if path.exists() else None
        except OSError as error:
            raise RecordError("not an image reference", f"{name:.200}: {error.strerror}") from error

    def place(self, name: str) -> Path:
        """Where a file is, or would be. Raises RecordError: outside of the folder."""
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
        """Which link leads out, if one does; and the line that allows it, if an image is there."""
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


def _resolved(path: Path) -> Path:
    """A path without links, also without one that is a file with its target in it, as git writes it on some disks."""
    path = path.resolve()
    file = path if path.exists() else next(outer for outer in path.parents if outer.exists())
    if file == path or not file.is_file() or file.stat().st_size > 1000:
        return path
    try:
        target = (file.parent / file.read_text(encoding="utf-8")).resolve()
        return target / path.relative_to(file) if target.is_dir() else path
    except ValueError:  # no text, or none that names a file
        return path


@contextmanager
def open_mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, without reading them all. Raises OSError: also for an empty one."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise OSError(errno.EINVAL, "the file is empty", str(path))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


class Json(Store):
    """A MIMIC-IT file, {id: base64}: scanned once for where each image lies."""

    @cached_property
    def _slices(self) -> dict[str, tuple[int, int]]:
        try:
            with open_mapped(self.path) as content:
                return dict(self._scan(content))
        except OSError as error:
            raise UserError(
                f"{self.path}: expected {{id: base64, ...}}, which cannot be read: {error.strerror}"
            ) from error

    def _scan(self, content: mmap.mmap) -> Iterator[tuple[str, tuple[int, int]]]:
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


class Table(Store):
    """A Parquet file of ids and images; one row group of it in memory at a time."""

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
    def _places(self) -> dict[str, tuple[int, int]]:
        """id -> (row group, row in it)"""
        (column, _), places = self._columns, {}
        for group in range(len(self._file.groups)):
            for number, row in enumerate(row for one in self._read(group, column) for row in python_rows(one)):
                if isinstance(row, RecordError):
                    raise self._error(row)
                places[str(row[column])] = group, number
        return places

    def find(self, name: str) -> Image | None:
        if name not in self._places:
            return None
        group, number = self._places[name]
        if self._latest is None or self._latest[0] != group:
            self._latest = group, self._read(group, self._columns[1])
        for one in self._latest[1]:
            if number < one.batch.num_rows:
                (row,) = python_rows(Checked(one.batch.slice(number, 1), one.sound))
                return self._image(name, row)
            number -= one.batch.num_rows
        return None

    _latest: tuple[int, list[Checked]] | None = None

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
