"""Read bytes and lines of plain, gzip or zstd files in bounded memory; for a broken file, report the loss."""

import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from finetune.data.conversation import RecordError
from finetune.data.io.remote import open_local
from modeling.errors import UserError

MAX_RECORD_BYTES = 64 * 2**20
"""Largest size in bytes of one line, one item of a JSON file, or one row of a table."""

MAX_VALUES = 2**20
"""Largest number of lists and numbers in one record: empty lists take thirty times their file size in memory."""

COMPRESSIONS = (".gz", ".zst")

Record = tuple[str, dict[str, Any] | RecordError]
"""(record id, record). An id is "file:line" or similar; a record that cannot be read is an error, to be counted."""

OnBroken = Literal["stop", "keep"]
"""A source's `on_broken`: end with an error at a file that breaks off, or keep the records before."""

Read = TypeVar("Read")


class BrokenFileError(RecordError):
    """A file that cannot be read on. It takes the place of all records that are lost."""

    def __init__(self, reason: str, detail: str, lost: str = "what follows was not read", file: str = ""):
        super().__init__(reason, detail)
        self.lost, self.file = lost, file
        """How much of the file was not read; its name."""


def lost_after(done: int, total: int, unit: str = "byte") -> str:
    """Return how much is lost of a file that can be read up to `done`.

    >>> lost_after(3000, 4000)
    '25 % of the file was not read, from byte 3,000 of 4,000 on'
    >>> lost_after(4000, 4000)
    'the file ends early, after byte 4,000'
    """
    if done >= total:
        return f"the file ends early, after {unit} {total:,}"
    share = (total - done) / total * 100
    return f"{share:.{0 if share > 10 else 1}f} % of the file was not read, from {unit} {done:,} of {total:,} on"


def open_file(path: Path) -> io.BufferedReader:
    """Open a file, decompressed as its suffix says. Reading raises BrokenFileError where it cannot be read on.

    Raises UserError as `open_raw`.
    """
    raw, at_once = open_raw(path), 2**20
    unpacked, suffix = raw, path.suffix.lower()
    if suffix in (".gz", ".tgz"):
        import gzip

        unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    elif suffix == ".zst":
        import pyarrow

        unpacked = cast(BinaryIO, pyarrow.input_stream(raw, compression="zstd"))
        at_once = 2**13  # all that is lost where the file breaks off
    return io.BufferedReader(_CheckedReader(path, raw, unpacked, at_once), 2**16)


def open_raw(path: Path) -> BinaryIO:
    """Open a file's bytes as they are.

    Raises UserError: no file, no permission, a pipe or a device; for a remote one, as `open_local`.
    """
    try:
        return open_local(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


class _CheckedReader(io.RawIOBase):
    """A file's content, unpacked. An error in reading it becomes BrokenFileError and says where it occurred."""

    def __init__(self, path: Path, raw: BinaryIO, unpacked: BinaryIO, at_once: int):
        self._raw, self._unpacked, self._at_once, self._size = raw, unpacked, at_once, path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._unpacked is self._raw

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            piece = self._unpacked.read1(min(len(buffer), self._at_once))  # type: ignore[attr-defined]
        except (OSError, EOFError, ValueError, zlib.error) as error:
            lost = lost_after(min(self._raw.tell(), self._size), self._size)
            raise BrokenFileError("corrupt file", str(error) or type(error).__name__, lost) from error
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_text(path: Path) -> io.BufferedReader:
    """Open UTF-8 text after its byte order mark. Raises BrokenFileError: the mark is one of UTF-16."""
    file = open_file(path)
    start = file.peek(3)[:3]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        detail = "a byte order mark of UTF-16; expected UTF-8"
        raise BrokenFileError("not UTF-8", detail, "nothing of the file was read")
    if start == b"\xef\xbb\xbf":
        file.read(3)
    return file


def skip_to_line(file: io.BufferedReader, start: int) -> None:
    """Go to the first line that begins at byte `start` or later."""
    file.seek(start - 1)
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        pass


def read_lines(file: io.BufferedReader, length: int | None = None) -> Iterator[bytes | RecordError]:
    """Yield lines, ended by \\n, \\r\\n or \\r; a RecordError for one of more than `MAX_RECORD_BYTES`.

    With `length`, no line that ends with \\n begins after so many bytes.
    """
    left: float = math.inf if length is None else length
    while left > 0 and (line := file.readline(MAX_RECORD_BYTES + 1)):
        left -= len(line)
        if len(line) <= MAX_RECORD_BYTES or line.endswith(b"\n"):
            if line.find(b"\r", 0, -2) < 0:
                yield line
            else:
                yield from _LINES.findall(line)
            continue
        size = 0
        while line:
            size += len(line)
            line = b"" if line.endswith(b"\n") else file.readline(2**20)
            left -= len(line)
        yield RecordError("record too large", f"a line of {size:,} bytes, over {MAX_RECORD_BYTES:,}")


_LINES = re.compile(rb"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")


def until_broken(
    path: Path | str, records: Iterable[tuple[str, Read]], on_broken: OnBroken = "keep"
) -> Iterator[tuple[str, Read | BrokenFileError]]:
    """Yield a file's records as far as it can be read, then the error that ends it, with what was read and is lost.

    With `on_broken="stop"`, raises UserError instead of yielding that error.
    """
    count = 0
    try:
        for record_id, record in records:
            yield record_id, record
            count += 1
    except BrokenFileError as error:
        read = f"{count:,} record{'s were' if count != 1 else ' was'} read before"
        broken = BrokenFileError(error.reason, f"{error.detail}; {read}, {error.lost}", file=str(path))
        if on_broken == "stop":
            raise UserError(
                f"{path}: the file breaks off: {broken}\n"
                "  mend the file, or set `on_broken: keep` on this source to use what can be read"
            ) from error
        yield path.name if isinstance(path, Path) else path, broken
