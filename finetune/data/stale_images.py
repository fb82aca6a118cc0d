"""Detect whether the image files of a prepared set are unchanged, changed, or missing.

The content decides: a file that only has another modification time (touched, copied, restored) counts as unchanged, and
its new time is stored. Archives and data files are not checked here: the name of the set holds a hash of their content.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from finetune.data.arrow import ArrowFile, DamagedError, write_arrow
from modeling.atomic_files import open_regular

FILES = "files.arrow"
FILE_SCHEMA = pa.schema(
    {"path": pa.binary(), "size": pa.int64(), "mtime_ns": pa.int64(), "digest": pa.binary(32)},
)
"""The files in which images were looked up, and images/*.bin (by paths relative to the set). Broken and missing files
are listed too, since they may be repaired later; a missing file has size and mtime_ns -1. digest: SHA-256; null for
archives."""

File = tuple[str, int, int]
"""(path, size, modification time): a file counts as unchanged while these are equal."""


def file_now(path: Path | str) -> File:
    """Return a file's current size and time; both are -1 where it is missing or cannot be reached."""
    try:
        status = Path(path).stat()
    except OSError:
        return str(path), -1, -1
    return str(path), status.st_size, status.st_mtime_ns


def file_digest(path: Path) -> bytes | None:
    """Return the SHA-256 of a file, or None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


@dataclass(frozen=True)
class Changes:
    """How the image files differ from those that the set was made from."""

    missing: Sequence[Path]
    """Files that existed then, and do not exist now."""
    changed: Sequence[str]
    """One line per changed file: "a.png: has other content"."""
    there: Sequence[Path]
    """If files are missing: all the others."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed)

    def missing_folder(self, roots: Iterable[Path]) -> Path | None:
        """Return the folder whose files are all missing: one of `roots`, or the common one; None if some exist."""
        if len(self.missing) < 2:
            return None
        common = Path(os.path.commonpath([path.parent for path in self.missing]))
        for folder in (*roots, common):
            if common.is_relative_to(folder) and not any(path.is_relative_to(folder) for path in self.there):
                return folder
        return None


def find_changes(folder: Path) -> Changes:
    """Compare the files of a prepared set with their state when it was made. Raises DamagedError."""
    files = ArrowFile(folder / FILES).validate(FILE_SCHEMA)
    names, sizes, times, digests = (files.values(column) for column in FILE_SCHEMA.names)
    missing: list[Path] = []
    changed: list[str] = []
    touched: dict[int, int] = {}
    for row, (name, size, time, content) in enumerate(zip(names, sizes, times, digests, strict=True)):
        if b"\0" in name:
            raise DamagedError(files.path, "a name that no file has")
        path = folder / os.fsdecode(name)
        _, size_now, time_now = file_now(path)
        if (size_now, time_now) == (size, time):
            continue
        own = not Path(os.fsdecode(name)).is_absolute()
        if own and (size_now != size or file_digest(path) != content):
            raise DamagedError(path, "other content than was written")
        if size_now < 0:
            missing.append(path)
        elif size < 0:
            changed.append(f"{path}: was missing, and is there now")
        elif size_now != size:
            changed.append(f"{path}: had {size:,} bytes, has {size_now:,}")
        elif content is not None and file_digest(path) != content:
            changed.append(f"{path}: has other content")
        else:
            touched[row] = time_now
    if touched:
        with suppress(OSError):  # a read-only folder: the content is then compared each time
            times = times.copy()
            times[list(touched)] = list(touched.values())
            table = pa.Table.from_batches(files.batches, FILE_SCHEMA)
            table = table.set_column(FILE_SCHEMA.get_field_index("mtime_ns"), "mtime_ns", pa.array(times))
            write_arrow(files.path, FILE_SCHEMA, table.to_batches())
    paths = (folder / os.fsdecode(name) for name in names) if missing else ()
    return Changes(missing, changed, [path for path in paths if path.exists()])
