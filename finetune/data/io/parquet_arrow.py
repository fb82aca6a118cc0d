"""Parquet and Arrow files -> records, a few rows in memory at a time, images as encoded bytes.

Arrow trusts a file's offsets and would read outside the file, so every batch is validated in full before a value of it
is read.
"""

import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.conversation import RecordError
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import BrokenFileError, Record, lost_after, open_raw
from finetune.data.io.table_limits import MAX_RATIO, Column, check_batches, check_chunk, read_footer

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BATCH_ROWS = 16
"""Rows read at once, at least: each may hold images of some megabytes."""

BATCH_BYTES = 2**22
"""Bytes of small rows that are read, and made Python values, at once."""

_NOTHING = "nothing of the file was read"


@dataclass(frozen=True)
class Checked:
    """A batch whose offsets all lie inside it."""

    batch: "pyarrow.RecordBatch"
    valid: bool = True
    """Whether all its values are of their type; if not, some text is not UTF-8, and each row is validated alone."""


@dataclass(frozen=True)
class Parquet:
    """An open Parquet file."""

    content: mmap.mmap
    file: "pyarrow.parquet.ParquetFile"
    groups: list[tuple[int, list[Column]]]
    """(rows, columns) of each row group."""


def read_parquet(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of its row groups from `start` to before `stop`. Raises BrokenFileError."""
    opened = open_parquet(path)
    counts = [rows for rows, _ in opened.groups]
    groups = range(len(counts))[start:stop]
    yield from number_rows(path.name, _parquet_batches(opened, groups), first=sum(counts[:start]))


def _parquet_batches(opened: Parquet, groups: range) -> Iterator[Checked]:
    counts = [rows for rows, _ in opened.groups]
    done, end, total = sum(counts[: groups.start]), sum(counts[: groups.stop]), sum(counts)

    def lost() -> str:
        if (groups.start, end) == (0, total):
            return lost_after(done, total, "row")
        return f"rows {done:,} to {end - 1:,} of {total:,} were not read"

    try:
        for group in groups:
            for batch in _group_batches(opened, group):
                yield checked(batch)
                done += batch.num_rows
    except BrokenFileError as error:
        raise BrokenFileError(error.reason, error.detail, lost()) from error
    except Exception as error:  # a damaged file makes pyarrow raise errors of many kinds
        raise BrokenFileError("corrupt file", _first_line(error), lost()) from error


def group_bytes(path: Path) -> list[int]:
    """Return the compressed size of each row group, from the file's footer; one group if it cannot be read."""
    try:
        metadata = open_parquet(path).file.metadata
    except BrokenFileError:  # raised again where the file is read
        return [1]
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    sizes = [sum(group.column(column).total_compressed_size for column in range(group.num_columns)) for group in groups]
    return [max(size, 1) for size in sizes] or [1]


def open_parquet(path: Path) -> Parquet:
    """Open a Parquet file and check its footer and schema. Raises BrokenFileError."""
    import pyarrow.parquet

    content = _mapped(path)
    try:
        groups = read_footer(content)
        file = pyarrow.parquet.ParquetFile(pyarrow.py_buffer(content))
        check_schema(file.schema_arrow)
    except BrokenFileError as error:
        raise BrokenFileError(error.reason, error.detail, _NOTHING) from error
    except Exception as error:  # a damaged file makes pyarrow raise errors of many kinds
        raise BrokenFileError("corrupt file", _first_line(error), _NOTHING) from error
    rows = file.metadata.num_rows
    if rows > byte_streams.MAX_VALUES + 1000 * len(content):
        raise BrokenFileError("corrupt file", f"{rows:,} rows in {len(content):,} bytes", _NOTHING)
    return Parquet(content, file, groups)


def read_group(opened: Parquet, group: int, column: str) -> list[Checked]:
    """Return one column of one row group. Raises BrokenFileError, also where it would take too much memory."""
    found, size = [], 0
    try:
        for batch in _group_batches(opened, group, column):
            size += batch.nbytes
            if size > 4 * byte_streams.MAX_RECORD_BYTES + MAX_RATIO * len(opened.content):
                raise BrokenFileError("record too large", f"column {column}: over {size:,} bytes in a row group")
            found.append(checked(batch))
    except BrokenFileError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise errors of many kinds
        raise BrokenFileError("corrupt file", _first_line(error)) from error
    return found


def _group_batches(opened: Parquet, group: int, only: str | None = None) -> Iterator["pyarrow.RecordBatch"]:
    """Yield the batches of a row group, or of one of its columns, after its pages have been checked.

    Texts stay in their dictionary where writing each one out would take too much memory.
    """
    import pyarrow.parquet

    count, there = opened.groups[group]
    columns = [(number, column) for number, column in enumerate(there) if only in (None, column.path[0])]
    nested = [opened.file.schema.column(number).max_repetition_level > 0 for number, _ in columns]
    chunks = [check_chunk(opened.content, column, nested=n) for (_, column), n in zip(columns, nested, strict=True)]
    size = sum(chunk.size for chunk in chunks) // max(count, 1) + max((chunk.dictionary for chunk in chunks), default=0)
    rows = min(1024, max(BATCH_ROWS, BATCH_BYTES // max(size, 1)))
    compact = [
        column.name
        for (_, column), inner, chunk in zip(columns, nested, chunks, strict=True)
        if column.is_text and chunk.dictionary * (chunk.values if inner else rows) > byte_streams.MAX_RECORD_BYTES
    ]
    file, chosen = opened.file, None if only is None else [only]
    if compact:
        file = pyarrow.parquet.ParquetFile(pyarrow.py_buffer(opened.content), read_dictionary=compact)
    yield from file.iter_batches(rows, row_groups=[group], columns=chosen, use_threads=False)


def read_arrow(path: Path) -> Iterator[Record]:
    """Return the rows of an Arrow file, as the datasets library saves it, or stream. Reading raises BrokenFileError."""
    return number_rows(path.name, _arrow_batches(path))


def _arrow_batches(path: Path) -> Iterator[Checked]:
    """Yield batches. A file is read as the stream inside it, so that one that was cut gives its first batches."""
    import pyarrow

    content = _mapped(path)
    is_file = content[:6] == b"ARROW1"
    done = start = 8 if is_file else 0
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.py_buffer(content)[start:])
        check_schema(reader.schema)
        for end in check_batches(content, start):
            yield checked(reader.read_next_batch())
            done = end
        if is_file and content[-6:] != b"ARROW1":
            raise BrokenFileError("corrupt file", "its last bytes are missing", lost_after(1, 1))
    except BrokenFileError as error:
        raise BrokenFileError(error.reason, error.detail, lost_after(done, len(content))) from error
    except Exception as error:  # a damaged file makes pyarrow raise errors of many kinds
        raise BrokenFileError("corrupt file", _first_line(error), lost_after(done, len(content))) from error


def _mapped(path: Path) -> mmap.mmap:
    """Return the file's bytes, mapped as long as a value made of them lives. Raises BrokenFileError, UserError."""
    with open_raw(path) as opened:
        if not os.fstat(opened.fileno()).st_size:
            raise BrokenFileError("corrupt file", "the file is empty", _NOTHING)
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


def check_schema(schema: "pyarrow.Schema") -> None:
    """Raises BrokenFileError: two columns of one name, or a type that is not read."""
    names = schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BrokenFileError("not a table", f"two columns are named {twice:.200}")
    for field in schema:
        _check_type(field.name, field.type)


def _check_type(name: str, kind: Any) -> None:
    """Raises BrokenFileError: a type with which few bytes can mean any number of values, and that no dataset has."""
    import pyarrow

    types = pyarrow.types
    refused = (types.is_union, types.is_run_end_encoded, types.is_list_view, types.is_large_list_view)
    if any(test(kind) for test in refused):
        raise BrokenFileError("unknown type", f"column {name:.200} is of type {kind!s:.200}")
    if isinstance(kind, pyarrow.BaseExtensionType):
        _check_type(name, kind.storage_type)
    if types.is_dictionary(kind):
        _check_type(name, kind.value_type)
    for number in range(kind.num_fields):
        _check_type(name, kind.field(number).type)


def checked(batch: "pyarrow.RecordBatch") -> Checked:
    """Validate a batch. Raises BrokenFileError: an offset leads outside it."""
    fault = _fault(batch)
    if fault and not _OF_A_VALUE.search(fault):
        raise BrokenFileError("corrupt file", fault)
    if not fault and batch.num_rows > byte_streams.MAX_VALUES + 8 * batch.nbytes:
        raise BrokenFileError("corrupt file", f"{batch.num_rows:,} rows in {batch.nbytes:,} bytes")
    return Checked(batch, valid=not fault)


_OF_A_VALUE = re.compile("UTF8|not represent|not within|does not fit")
"""Arrow's words for a value that is not of its type, while all offsets are right."""


def _fault(batch: "pyarrow.RecordBatch") -> str | None:
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowException as error:
        return _first_line(error)
    return None


def number_rows(name: str, batches: Iterable[Checked], first: int = 0) -> Iterator[Record]:
    """Yield (name#number, row) for the rows of all batches, numbered from `first` on."""
    number = first
    for one in batches:
        rows, size = one.batch.num_rows, _python_bytes(one.batch) if one.valid else math.inf
        step = rows if size <= BATCH_BYTES else BATCH_ROWS
        for part in (one.batch.slice(start, step) for start in range(0, rows, max(step, 1))):
            for row in python_rows(Checked(part, one.valid)):
                yield f"{name}#{number}", row
                number += 1


def python_rows(one: Checked) -> Iterable[dict[str, Any] | RecordError]:
    """Return the rows of a batch; a RecordError for one that is too large, or that Python cannot represent."""
    if one.valid and _python_bytes(one.batch) <= min(2 * BATCH_BYTES, byte_streams.MAX_RECORD_BYTES):
        found = _to_python(one.batch)
        if isinstance(found, list):
            return found
    return (_python_row(one.batch.slice(row, 1), valid=one.valid) for row in range(one.batch.num_rows))


def _python_row(row: "pyarrow.RecordBatch", *, valid: bool) -> dict[str, Any] | RecordError:
    if not valid and (fault := _fault(row)):
        return RecordError("not a row", fault)
    if (size := _python_bytes(row)) > byte_streams.MAX_RECORD_BYTES:
        return RecordError("record too large", f"about {size:,} bytes")
    found = _to_python(row)
    return found if isinstance(found, RecordError) else found[0]


def _to_python(batch: "pyarrow.RecordBatch") -> list[dict[str, Any]] | RecordError:
    try:
        return batch.to_pylist()
    except Exception as error:  # a date after the year 9999, an unknown time zone, a type that Python lacks
        return RecordError("not a row", _first_line(error))


def _python_bytes(array: Any) -> int:
    """Return about how many bytes an array, or the columns of a batch, take as Python values."""
    import numpy as np
    import pyarrow.compute

    types, count = pyarrow.types, 8 * len(array)
    if isinstance(array, pyarrow.RecordBatch):
        return sum(map(_python_bytes, array.columns))
    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _python_bytes(array.storage)
    if types.is_struct(kind):
        return count + sum(_python_bytes(array.field(number)) for number in range(kind.num_fields))
    if types.is_fixed_size_list(kind):
        return count + _python_bytes(array.flatten())
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return count + _python_bytes(array.values.slice(start, stop - start))
    if types.is_dictionary(kind):
        text_types = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        if not any(test(kind.value_type) for test in text_types):
            return len(array) * _python_bytes(array.dictionary)
        sizes = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return count + (pyarrow.compute.sum(sizes).as_py() or 0)
    if types.is_string_view(kind) or types.is_binary_view(kind):  # many may show the same bytes
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::4][array.offset :][: len(array)]
        return count + int(lengths.sum(dtype=np.int64))
    return count + array.nbytes


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0][:300]
