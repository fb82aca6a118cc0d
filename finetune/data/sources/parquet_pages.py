"""How large the columns of a Parquet file become, read from the headers of their pages before anything is decoded.

A column chunk is a row of pages, each a header (thrift's compact protocol, PageHeader in parquet.thrift) and its data.
"""

from dataclasses import dataclass
from typing import Any

from finetune.data.sources import streams
from finetune.data.sources.streams import BrokenFileError

MAX_RATIO = 20
"""A page that is larger than a record may be so many times its compressed size: images and text in large pages are."""

MAX_NESTED = 2**24
"""Values of a nested column in one row group, unless their bytes account for them: all may be of one row."""

_DICTIONARY_PAGE = 2


@dataclass(frozen=True)
class Chunk:
    """What a column becomes in one row group."""

    dictionary: int
    """Bytes of its dictionary."""
    values: int
    """In its data pages."""
    size: int
    """Bytes of its data pages."""


def check_chunk(content: Any, column: Any, *, nested: bool) -> Chunk:
    """Walk through the pages of a column chunk. `content`: the mapped file; `column`: pyarrow's ColumnChunkMetaData.

    Raises BrokenFileError: a page or the chunk would become larger than what is there accounts for.
    """
    name, position = column.path_in_schema, _start(column)
    dictionary = values = data = 0
    end = position + column.total_compressed_size
    if not 0 <= position <= end <= len(content):
        raise BrokenFileError("corrupt file", f"column {name}: bytes {position:,} to {end:,}, which are not there")
    while position < end and values < column.num_values:
        header, position = _read_struct(content, position)
        size, packed = header.get(2, -1), header.get(3, -1)
        number = next((header[kind][1] for kind in (5, 7, 8) if isinstance(header.get(kind), dict)), 0)
        if min(size, packed, number) < 0 or position + packed > end:
            raise BrokenFileError("corrupt file", f"column {name}: a page of {packed:,} bytes at byte {position:,}")
        most = streams.MAX_RECORD_BYTES
        if size > most and (size > MAX_RATIO * packed or size > most * number):
            raise BrokenFileError("record too large", f"column {name}: {number:,} values of {size:,} bytes in one page")
        if header[1] == _DICTIONARY_PAGE:
            dictionary = size
        else:
            values, data = values + number, data + size
        position += packed
    if nested and values > max(MAX_NESTED, 64 * column.total_compressed_size):
        raise BrokenFileError("record too large", f"column {name}: {values:,} values in {end - _start(column):,} bytes")
    return Chunk(dictionary, values, data)


def _start(column: Any) -> int:
    first = column.dictionary_page_offset if column.has_dictionary_page else None
    return min(first, column.data_page_offset) if first else column.data_page_offset


def _read_struct(content: Any, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """({field: number or inner struct}, where it ends). Raises BrokenFileError."""
    if depth > 8:
        raise BrokenFileError("corrupt file", f"a damaged page header at byte {position:,}")
    fields: dict[int, Any] = {1: 0}
    last = 0
    try:
        while head := content[position]:
            position += 1
            if head >> 4:
                last += head >> 4
            else:
                last, position = _read_number(content, position)
            fields[last], position = _read_value(content, position, head & 15, depth)
    except (IndexError, KeyError) as error:
        raise BrokenFileError("corrupt file", f"a damaged page header at byte {position:,}") from error
    return fields, position + 1


def _read_value(content: Any, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return None, position
    if kind == 3:  # a byte
        return None, position + 1
    if kind in (4, 5, 6):  # int16, int32, int64
        return _read_number(content, position)
    if kind == 7:  # double
        return None, position + 8
    if kind == 8:  # bytes
        size, position = _read_varint(content, position)
        return None, position + size
    if kind == 12:
        return _read_struct(content, position, depth + 1)
    raise KeyError(kind)  # no page header holds lists, sets or maps


def _read_number(content: Any, position: int) -> tuple[int, int]:
    number, position = _read_varint(content, position)
    return (number >> 1) ^ -(number & 1), position


def _read_varint(content: Any, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise KeyError(position)
