"""Files -> bytes and lines: plain, gzip and zstd alike, in bounded memory; where a file breaks off, what is lost."""

import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from finetune.data.conversation import RecordError
from finetune.data.source import Source
from modeling.errors import UserError
from modeling.files import open_regular

MAX_RECORD_BYTES = 64 * 2**20
"""Of one line, one item of a JSON file, or one row of a table: what is larger is no dialogue."""

MAX_VALUES = 2**20
"""Of one record: lists and numbers in it; a file of empty lists takes thirty times its size in memory."""

COMPRESSIONS = (".gz", ".zst")

Read = TypeVar("Read")


class BrokenFileError(RecordError):
    """A file that cannot be read on; it stands in the place of all records that are lost."""

    def __init__(self, reason: str, detail: str, lost: str = "what follows was not read", file: str = ""):
        super().__init__(reason, detail)
        self.lost, self.file = lost, file
        """How much of the file was not read; its name."""


def lost_after(done: int, total: int, unit: str = "byte") -> str:
    """How much of a file is lost that can be read only so far.

    (3000, 4000) -> 25 % of the file was not read, from byte 3,000 of 4,000 on
    (4000, 4000) -> the file ends early, after byte 4,000
    """
    if done >= total:
        return f"the file ends early, after {unit} {total:,}"
    share = (total - done) / total * 100
    return f"{share:.{0 if share > 10 else 1}f} % of the file was not read, from {unit} {done:,} of {total:,} on"


def open_file(path: Path) -> io.BufferedReader:
    """A file's bytes, decompressed as its suffix says. Reading it raises BrokenFileError where it cannot be read on.

    Raises UserError as `open_raw`.
    """
    raw = open_raw(path)
    suffix = path.suffix.lower()
    if suffix in (".gz", ".tgz"):
        import gzip

        return _Watched.over(path, raw, cast(BinaryIO, gzip.GzipFile(fileobj=raw)))
    if suffix == ".zst":
        import pyarrow

        unpacked = cast(BinaryIO, pyarrow.input_stream(raw, compression="zstd"))
        return _Watched.over(path, raw, unpacked, at_once=2**13)  # what is lost where the file breaks off
    return _Watched.over(path, raw, raw)


def open_raw(path: Path) -> BinaryIO:
    """A file's bytes as they are. Raises UserError: nothing is there, it may not be read, it is a pipe or a device."""
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


class _Watched(io.RawIOBase):
    """What a file holds, unpacked; an error in reading it becomes BrokenFileError, with the place where it was met."""

    def __init__(self, path: Path, raw: BinaryIO, unpacked: BinaryIO, at_once: int):
        self._raw, self._unpacked, self._at_once, self._size = raw, unpacked, at_once, path.stat().st_size

    @classmethod
    def over(cls, path: Path, raw: BinaryIO, unpacked: BinaryIO, at_once: int = 2**20) -> io.BufferedReader:
        return io.BufferedReader(cls(path, raw, unpacked, at_once), 2**16)

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
    """UTF-8 text, its byte order mark skipped. Raises BrokenFileError: another mark says that it is UTF-16."""
    file = open_file(path)
    start = file.peek(3)[:3]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise BrokenFileError(
            "not UTF-8", "a byte order mark of UTF-16; expected UTF-8", "nothing of the file was read"
        )
    if start == b"\xef\xbb\xbf":
        file.read(3)
    return file


def read_lines(file: io.BufferedReader) -> Iterator[bytes | RecordError]:
    """Lines, ended by any of \\n, \\r\\n and \\r; a RecordError stands for one of over `MAX_RECORD_BYTES`."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) <= MAX_RECORD_BYTES or line.endswith(b"\n"):
            if line.find(b"\r", 0, -2) < 0:
                yield line
            else:
                yield from _PIECES.findall(line)
            continue
        size = 0
        while line:
            size += len(line)
            line = b"" if line.endswith(b"\n") else file.readline(2**20)
        yield RecordError("record too large", f"a line of {size:,} bytes, over {MAX_RECORD_BYTES:,}")


_PIECES = re.compile(rb"[^\r\n]*+(?:\r\n|\r|\n)|[^\r\n]++")


def until_broken(path: Path | str, records: Iterable[tuple[str, Read]]) -> Iterator[tuple[str, Read | BrokenFileError]]:
    """The records of a file as far as it can be read, then what was wrong, with how much was read and is lost."""
    count = 0
    try:
        for place, record in records:
            yield place, record
            count += 1
    except BrokenFileError as error:
        read = f"{count:,} record{'s were' if count != 1 else ' was'} read before"
        place = path.name if isinstance(path, Path) else path
        yield place, BrokenFileError(error.reason, f"{error.detail}; {read}, {error.lost}", file=str(path))


def stop_if_broken(
    source: Source, records: Iterable[tuple[str, Read | RecordError]]
) -> Iterator[tuple[str, Read | RecordError]]:
    """The records of a source. Raises UserError at a file that breaks off, unless the source says `on_broken: keep`."""
    for place, record in records:
        if isinstance(record, BrokenFileError) and source.on_broken == "stop":
            raise UserError(
                f"{record.file}: the file breaks off: {record}\n"
                "  mend the file, or set `on_broken: keep` on this source to use what can be read"
            )
        yield place, record
