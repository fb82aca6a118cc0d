"""The image files that a prepared set was made of: as they were, changed, or missing.

What tells is the content: a file that was only touched, copied or restored with another time of change is the same, and
the time that it has now is kept. Archives and data files are not looked at again: their content names the set.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from finetune.data.arrow import ArrowFile, DamagedError, write_arrow
from modeling.files import open_regular

FILES = "files.arrow"
FILE_SCHEMA = pa.schema(
    {"path": pa.binary(), "size": pa.int64(), "mtime_ns": pa.int64(), "digest": pa.binary(32)},
)
"""The files in which images were looked for, broken and missing ones, too, which may have been mended since (size and
mtime_ns are -1 of a missing one); and images/*.bin, by paths relative to the set. digest: SHA-256; null of archives."""

File = tuple[str, int, int]
"""Path, size, time of change: as long as they are the same, a file is."""


def file_now(path: Path | str) -> File:
    """The file as it is now; size and time are -1 where it is missing or cannot be reached."""
    try:
        status = Path(path).stat()
    except OSError:
        return str(path), -1, -1
    return str(path), status.st_size, status.st_mtime_ns


def file_digest(path: Path) -> bytes | None:
    """SHA-256 of a file; None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


@dataclass(frozen=True)
class Changes:
    """How the files differ from what they were."""

    missing: Sequence[Path]
    """Were there, and are not."""
    changed: Sequence[str]
    """A line for each: "a.png: has other content"."""
    there: Sequence[Path]
    """Where some are missing, all that are there."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed)

    def missing_folder(self, roots: Iterable[Path]) -> Path | None:
        """The folder of which all files are missing: one of `roots`, or the common one; None where some are there."""
        if len(self.missing) < 2:
            return None
        common = Path(os.path.commonpath([path.parent for path in self.missing]))
        for folder in (*roots, common):
            if common.is_relative_to(folder) and not any(path.is_relative_to(folder) for path in self.there):
                return folder
        return None


def find_changes(folder: Path) -> Changes:
    """Compare the files of a prepared set with what they were. Raises DamagedError."""
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
        with suppress(OSError):  # in a folder of others, they are compared by content each time
            _write_times(files, touched)
    paths = (folder / os.fsdecode(name) for name in names) if missing else ()
    return Changes(missing, changed, [path for path in paths if path.exists()])


def _write_times(files: ArrowFile, touched: Mapping[int, int]) -> None:
    times = files.values("mtime_ns").copy()
    times[list(touched)] = list(touched.values())
    table = pa.Table.from_batches(files.batches, FILE_SCHEMA)
    column = FILE_SCHEMA.get_field_index("mtime_ns")
    write_arrow(files.path, FILE_SCHEMA, table.set_column(column, "mtime_ns", pa.array(times)).to_batches())
