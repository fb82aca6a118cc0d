"""How large the columns of a Parquet file become, read from its footer and page headers before anything is decoded.

Both are thrift's compact protocol (FileMetaData and PageHeader in parquet.thrift). pyarrow reads the footer too, but
ends the process where its numbers do not fit each other, and does not show page headers. A column chunk is a row of
pages, each a header and its data.
"""

import mmap
from dataclasses import dataclass
from typing import Any

from finetune.data.io import streams
from finetune.data.io.streams import BrokenFileError

MAX_RATIO = 20
"""A page that is larger than a record may be so many times its compressed size: images and text in large pages are."""

MAX_NESTED = 2**24
"""Values of a nested column in one row group, unless their bytes account for them: all may be of one row."""

_BYTE_ARRAY = 6
_DICTIONARY_PAGE = 2


@dataclass(frozen=True)
class Column:
    """Where a column of one row group is."""

    path: tuple[str, ...]
    """Its name, and the names inside of it."""
    start: int
    stop: int
    values: int
    is_text: bool
    """Whether a dictionary holds texts, of any length."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Chunk:
    """What a column becomes in one row group."""

    dictionary: int
    """Bytes of its dictionary."""
    values: int
    """In its data pages."""
    size: int
    """Bytes of its data pages."""


def read_footer(content: mmap.mmap) -> list[tuple[int, list[Column]]]:
    """(rows, columns) of each row group. Raises BrokenFileError."""
    length = int.from_bytes(content[-8:-4], "little")
    if len(content) < 12 + length or content[-4:] != b"PAR1":
        raise BrokenFileError("corrupt file", "its last bytes are no footer of a Parquet file")
    try:
        footer, _ = _read_struct(content, len(content) - 8 - length)
        return [(group[3], [_column(chunk[3], len(content)) for chunk in group[1]]) for group in footer[4]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BrokenFileError("corrupt file", "a damaged footer") from error


def _column(fields: dict[int, Any], size: int) -> Column:
    start = min(place for place in (fields[9], fields.get(11, 0)) if place > 0)
    stop = start + fields[7]
    path = tuple(part.decode("utf-8", "replace") for part in fields[3])
    if not start <= stop <= size:
        detail = f"column {'.'.join(path)}: bytes {start:,} to {stop:,}, which are not there"
        raise BrokenFileError("corrupt file", detail)
    return Column(path, start, stop, fields[5], fields[1] == _BYTE_ARRAY)


def check_chunk(content: mmap.mmap, column: Column, *, nested: bool) -> Chunk:
    """Walk through the pages of a column chunk.

    Raises BrokenFileError: a page or the chunk would become larger than what is there accounts for.
    """
    position, most = column.start, streams.MAX_RECORD_BYTES
    dictionary = values = data = 0
    while position < column.stop and values < column.values:
        try:
            header, position = _read_struct(content, position)
        except LookupError as error:
            raise BrokenFileError("corrupt file", f"a damaged page header at byte {position:,}") from error
        size, packed = header.get(2, -1), header.get(3, -1)
        number = next((header[kind].get(1, -1) for kind in (5, 7, 8) if isinstance(header.get(kind), dict)), 0)
        if min(size, packed, number) < 0 or position + packed > column.stop:
            raise BrokenFileError("corrupt file", f"column {column.name}: a page of {packed:,} bytes at {position:,}")
        if size > most and (size > MAX_RATIO * packed or size > most * number):
            detail = f"column {column.name}: {number:,} values of {size:,} bytes in one page"
            raise BrokenFileError("record too large", detail)
        if header.get(1) == _DICTIONARY_PAGE:
            dictionary = size
        else:
            values, data = values + number, data + size
        position += packed
    length = column.stop - column.start
    if nested and values > max(MAX_NESTED, 64 * length):
        raise BrokenFileError("record too large", f"column {column.name}: {values:,} values in {length:,} bytes")
    return Chunk(dictionary, values, data)


def _read_struct(content: mmap.mmap, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """({field: value}, where it ends). Raises LookupError: it is none."""
    if depth > 16:
        raise KeyError(depth)
    fields: dict[int, Any] = {}
    last = 0
    while head := content[position]:
        position += 1
        if head >> 4:
            last += head >> 4
        else:
            last, position = _read_number(content, position)
        fields[last], position = _read_value(content, position, head & 15, depth)
    return fields, position + 1


def _read_value(content: mmap.mmap, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, position
    if kind == 3:  # a byte
        return content[position], position + 1
    if kind in (4, 5, 6):  # int16, int32, int64
        return _read_number(content, position)
    if kind == 7:  # double
        return None, position + 8
    if kind == 8:  # bytes
        size, position = _read_varint(content, position)
        return content[position : position + size], position + size
    if kind in (9, 10):  # a list, a set
        return _read_list(content, position, depth)
    if kind == 12:
        return _read_struct(content, position, depth + 1)
    raise KeyError(kind)


def _read_list(content: mmap.mmap, position: int, depth: int) -> tuple[list[Any], int]:
    head, position = content[position], position + 1
    count = head >> 4
    if count == 15:
        count, position = _read_varint(content, position)
    kind = 3 if head & 15 in (1, 2) else head & 15  # in a list, true and false are bytes
    values = []
    for _ in range(count):
        value, position = _read_value(content, position, kind, depth)
        values.append(value)
    return values, position


def _read_number(content: mmap.mmap, position: int) -> tuple[int, int]:
    number, position = _read_varint(content, position)
    return (number >> 1) ^ -(number & 1), position


def _read_varint(content: mmap.mmap, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise KeyError(position)
