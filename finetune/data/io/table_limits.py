"""Compute the decoded size of a Parquet or Arrow file from its headers, before anything is decoded.

A small hostile file can decode to any amount of memory; these functions refuse it before pyarrow reads it.

Parquet: a footer (FileMetaData) lists row groups; a column of a row group is a row of pages, each a header (PageHeader)
and its data. Both are structs of thrift's compact protocol (parquet.thrift). pyarrow reads the footer too, but ends the
process where its numbers contradict each other, and does not show page headers.

Arrow: a stream of messages, each FFFFFFFF, int32 length of its metadata, metadata (a flatbuffer, Message in Arrow's
format), and a body whose length the metadata give. A file is such a stream after "ARROW1" and two bytes, then a footer.
A compressed buffer of a body begins with its decompressed size, int64, -1 where it is not compressed.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import BrokenFileError

MAX_RATIO = 20
"""A page larger than a record may be at most so many times its compressed size; those of images and texts are."""

MAX_NESTED = 2**24
"""Values of a nested column in one row group, unless its bytes explain more: all of them may belong to one row."""

_BYTE_ARRAY = 6
_DICTIONARY_PAGE = 2


@dataclass(frozen=True)
class Column:
    """Position of one row group's column in a Parquet file."""

    path: tuple[str, ...]
    """Its name, and the names of the fields inside it that lead to it."""
    start: int
    stop: int
    values: int
    is_text: bool
    """Whether its dictionary holds texts, of any length."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Chunk:
    """The decoded size of a column in one row group."""

    dictionary: int
    """Bytes of its dictionary."""
    values: int
    """Values in its data pages."""
    size: int
    """Bytes of its data pages."""


def read_footer(content: mmap.mmap) -> list[tuple[int, list[Column]]]:
    """Return (rows, columns) of each row group of a Parquet file. Raises BrokenFileError."""
    length = int.from_bytes(content[-8:-4], "little")
    if len(content) < 12 + length or content[-4:] != b"PAR1":
        raise BrokenFileError("corrupt file", "its last bytes are no footer of a Parquet file")
    try:
        footer, _ = _read_struct(content, len(content) - 8 - length)
        return [(group[3], [_column(chunk[3], len(content)) for chunk in group[1]]) for group in footer[4]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise BrokenFileError("corrupt file", "a damaged footer") from error


def _column(fields: dict[int, Any], size: int) -> Column:
    start = min(position for position in (fields[9], fields.get(11, 0)) if position > 0)
    stop = start + fields[7]
    path = tuple(part.decode("utf-8", "replace") for part in fields[3])
    if not start <= stop <= size:
        detail = f"column {'.'.join(path)}: bytes {start:,} to {stop:,}, which are not there"
        raise BrokenFileError("corrupt file", detail)
    return Column(path, start, stop, fields[5], fields[1] == _BYTE_ARRAY)


def check_chunk(content: mmap.mmap, column: Column, *, nested: bool) -> Chunk:
    """Go through the page headers of a column in one row group, and return its decoded size.

    Raises BrokenFileError: a page or the column becomes larger than its bytes in the file explain.
    """
    position, most = column.start, byte_streams.MAX_RECORD_BYTES
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
    """Return ({field: value}, end) of the thrift struct at a position. Raises LookupError: there is none."""
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


_DICTIONARY, _BATCH = 2, 3
_MAX_METADATA = 2**24


def check_batches(content: mmap.mmap, start: int) -> Iterator[int]:
    """Check the messages of an Arrow stream up to each record batch in turn, and yield where that batch ends.

    Raises BrokenFileError.
    """
    position, dictionaries = start, 0
    while True:
        marked = content[position : position + 4] == b"\xff\xff\xff\xff"  # as Arrow writes since 2019
        head = content[position + 4 * marked : position + 4 * marked + 4]
        if len(head) < 4 or head == b"\0\0\0\0":
            return
        length = int.from_bytes(head, "little", signed=True)
        body = position + 4 * marked + 4 + length
        if not 0 < length <= _MAX_METADATA or body > len(content):
            raise BrokenFileError("corrupt file", f"a message of {length:,} bytes at byte {position:,}")
        try:
            kind, body_length, decoded = _sizes(content, body - length, body)
        except (struct.error, IndexError) as error:
            raise BrokenFileError("corrupt file", f"a damaged message at byte {position:,}") from error
        dictionaries += decoded if kind == _DICTIONARY else 0
        if max(decoded, dictionaries) > 2 * byte_streams.MAX_RECORD_BYTES:
            what = "record batch" if kind == _BATCH else "dictionary"
            raise BrokenFileError(
                "record too large",
                f"a compressed {what} of {decoded:,} bytes at byte {position:,}; "
                f"expected at most {2 * byte_streams.MAX_RECORD_BYTES:,}: write the file in smaller batches",
            )
        if kind == _BATCH:
            yield body + body_length
        position = body + body_length


def _sizes(content: mmap.mmap, start: int, body: int) -> tuple[int, int, int]:
    """Return (kind of a message, bytes of its body, bytes of its compressed buffers when decoded)."""
    message = _FlatTable(content[start:body], 0).follow()
    kind = message.number(1, "B")
    body_length = message.number(3, "q")
    if not 0 <= body_length <= len(content) - body:
        raise BrokenFileError("corrupt file", f"a message of {body_length:,} bytes, which the file does not have")
    if kind not in (_DICTIONARY, _BATCH):
        return kind, body_length, 0
    batch = message.table(2)
    if kind == _DICTIONARY:
        batch = batch.table(1)
    decoded = 0
    for offset, length in batch.pairs(2):
        if offset < 0 or length < 0 or offset + length > body_length:
            raise BrokenFileError("corrupt file", f"a buffer at byte {body + offset:,}, outside of its batch")
        if length >= 8 and batch.offset(3):
            decoded += max(0, *struct.unpack_from("<q", content, body + offset))
    return kind, body_length, decoded


class _FlatTable:
    """A table of a flatbuffer. Its methods raise struct.error or IndexError outside the buffer."""

    def __init__(self, data: bytes, at: int):
        self._data, self._at = data, at

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise IndexError(at)
        return struct.unpack_from(f"<{form}", self._data, at)[0]

    def follow(self, at: int | None = None) -> "_FlatTable":
        at = self._at if at is None else at
        return _FlatTable(self._data, at + self._read("I", at))

    def offset(self, field: int) -> int:
        """Return where a field lies; 0 if the table does not have it."""
        fields = self._at - self._read("i", self._at)
        entry = 4 + 2 * field
        offset = self._read("H", fields + entry) if entry < self._read("H", fields) else 0
        return self._at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        offset = self.offset(field)
        return self._read(form, offset) if offset else 0

    def table(self, field: int) -> "_FlatTable":
        offset = self.offset(field)
        if not offset:
            raise IndexError(field)
        return self.follow(offset)

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yield the pairs of a list of int64 pairs."""
        offset = self.offset(field)
        start = offset + self._read("I", offset) if offset else 0
        for number in range(self._read("I", start) if offset else 0):
            at = start + 4 + 16 * number
            yield self._read("q", at), self._read("q", at + 8)
