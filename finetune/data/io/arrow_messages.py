"""How large the batches of an Arrow file become, read from its messages before anything is decoded.

A stream of messages: each FFFFFFFF, int32 length of its metadata, metadata (a flatbuffer, Message in Arrow's format),
and a body of as many bytes as the metadata say. A file is the same after "ARROW1" and two bytes, and ends in a footer.
A compressed buffer of a body begins with its decompressed size, int64, -1 where it is not compressed after all.
"""

import mmap
import struct
from collections.abc import Iterator

from finetune.data.io import streams
from finetune.data.io.streams import BrokenFileError

_DICTIONARY, _BATCH = 2, 3
_MAX_METADATA = 2**24


def check_batches(content: mmap.mmap, start: int) -> Iterator[int]:
    """Go through a file's messages up to each batch in turn; give where the next one begins.

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
        if max(decoded, dictionaries) > 2 * streams.MAX_RECORD_BYTES:
            what = "record batch" if kind == _BATCH else "dictionary"
            raise BrokenFileError(
                "record too large",
                f"a compressed {what} of {decoded:,} bytes at byte {position:,}; "
                f"expected at most {2 * streams.MAX_RECORD_BYTES:,}: write the file in smaller batches",
            )
        if kind == _BATCH:
            yield body + body_length
        position = body + body_length


def _sizes(content: mmap.mmap, start: int, body: int) -> tuple[int, int, int]:
    """(kind, bytes of the body, bytes that its compressed buffers become)."""
    message = _Flat(content[start:body], 0).follow()
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
        if length >= 8 and batch.place(3):
            decoded += max(0, *struct.unpack_from("<q", content, body + offset))
    return kind, body_length, decoded


class _Flat:
    """A table of a flatbuffer. Raises struct.error or IndexError outside of it."""

    def __init__(self, data: bytes, at: int):
        self._data, self._at = data, at

    def _read(self, form: str, at: int) -> int:
        if at < 0:
            raise IndexError(at)
        return struct.unpack_from(f"<{form}", self._data, at)[0]

    def follow(self, at: int | None = None) -> "_Flat":
        at = self._at if at is None else at
        return _Flat(self._data, at + self._read("I", at))

    def place(self, field: int) -> int:
        """Where a field is; 0 if it is not there."""
        fields = self._at - self._read("i", self._at)
        entry = 4 + 2 * field
        offset = self._read("H", fields + entry) if entry < self._read("H", fields) else 0
        return self._at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        place = self.place(field)
        return self._read(form, place) if place else 0

    def table(self, field: int) -> "_Flat":
        place = self.place(field)
        if not place:
            raise IndexError(field)
        return self.follow(place)

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """A list of pairs of int64."""
        place = self.place(field)
        start = place + self._read("I", place) if place else 0
        for number in range(self._read("I", start) if place else 0):
            at = start + 4 + 16 * number
            yield self._read("q", at), self._read("q", at + 8)
