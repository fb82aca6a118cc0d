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
from typing import TYPE_CHECKING

from finetune.data.dialogue import Image, RecordError, Slice
from finetune.data.images import decode_base64
from finetune.data.near import Names
from finetune.data.sources.names import IMAGE_SUFFIXES
from finetune.data.sources.parquet_pages import check_chunk
from finetune.data.sources.streams import MAX_VALUES, BrokenFileError
from finetune.data.sources.tables import check_schema
from modeling.errors import UserError
from modeling.files import open_regular

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
                for row, name in enumerate(self._read(file, group, column).to_pylist())
            }

    def find(self, name: str) -> Image | None:
        place = self._places.get(name)
        if place is None:
            return None
        try:
            value = self._group(place[0])[place[1]].as_py()
        except UnicodeDecodeError as error:
            raise RecordError("corrupt image", f"{name:.200} in {self.path}: {error}") from error
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
                self._latest = number, self._read(file, number, column)
        return self._latest[1]

    _latest: "tuple[int, pyarrow.ChunkedArray] | None" = None

    def _read(self, file: "pyarrow.parquet.ParquetFile", group: int, name: str) -> "pyarrow.ChunkedArray":
        """A column of a row group, whose pages account for what it takes in memory. Raises BrokenFileError."""
        metadata = file.metadata.row_group(group)
        columns = [metadata.column(number) for number in range(metadata.num_columns)]
        with open_mapped(self.path) as content:
            chunks = [
                check_chunk(content, column, nested=False)
                for column in columns
                if column.path_in_schema.split(".")[0] == name
            ]
        multiplied = metadata.num_rows * max((chunk.dictionary for chunk in chunks), default=0)
        if multiplied > 16 * sum(chunk.size for chunk in chunks) + 2**30:
            raise BrokenFileError("record too large", f"column {name}: {multiplied:,} bytes of a dictionary's values")
        return file.read_row_group(group, columns=[name])[name]

    @contextmanager
    def _file(self) -> Iterator["pyarrow.parquet.ParquetFile"]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                check_schema(file.schema_arrow)
                if file.metadata.num_rows > MAX_VALUES + 1000 * self.path.stat().st_size:
                    raise BrokenFileError("corrupt file", f"{file.metadata.num_rows:,} rows")
                yield file
        except BrokenFileError as error:
            raise UserError(f"{self.path}: a Parquet file that cannot be read: {error.detail}") from error
        except UserError:
            raise
        except Exception as error:  # a damaged file makes pyarrow raise errors of many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: a Parquet file that cannot be read: {reason:.300}") from error


_IDS = ("id", "image_id", "__index_level_0__")
_IMAGES = ("image", "base64")
