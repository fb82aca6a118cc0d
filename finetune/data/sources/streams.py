"""Files -> bytes and lines: plain, gzip and zstd alike, in bounded memory, every failure a RecordError."""

import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from finetune.data.dialogue import RecordError
from modeling.files import open_regular

MAX_RECORD_BYTES = 64 * 2**20
"""Of one line, or one item of a JSON file: what is larger is no dialogue."""

COMPRESSIONS = (".gz", ".zst")

Read = TypeVar("Read")


def open_file(path: Path) -> BinaryIO:
    """A file's bytes, decompressed as its suffix says. Raises OSError, also for a pipe or a device."""
    file = open_regular(path)
    if path.suffix.lower() in (".gz", ".tgz"):
        import gzip

        file.close()
        return cast(BinaryIO, gzip.open(path))
    if path.suffix.lower() == ".zst":
        import pyarrow

        file.close()
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return file


def open_text(path: Path) -> io.BufferedReader:
    """UTF-8 text, its byte order mark skipped. Raises RecordError: another mark says that it is UTF-16."""
    file = cast(io.BufferedReader, open_file(path))
    start = file.peek(3)[:3]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise RecordError("not UTF-8", "a byte order mark of UTF-16; expected UTF-8")
    if start == b"\xef\xbb\xbf":
        file.read(3)
    return file


def read_lines(file: io.BufferedReader) -> Iterator[bytes | RecordError]:
    """Lines; one of over `MAX_RECORD_BYTES` is passed over in pieces, and a RecordError stands for it."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) <= MAX_RECORD_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(2**20)
        yield RecordError("record too large", f"a line of over {MAX_RECORD_BYTES:,} bytes")


def until_corrupt(
    place: str, records: Iterable[tuple[str, Read]], errors: tuple[type[Exception], ...] = ()
) -> Iterator[tuple[str, Read | RecordError]]:
    """The records of a file as far as it can be read, then what was wrong with it; `errors` are its parser's own."""
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *errors)
    try:
        yield from records
    except RecordError as error:
        yield place, RecordError(error.reason, f"{error.detail}; nothing after that was read")
    except broken as error:
        yield place, RecordError("corrupt file", f"{error or type(error).__name__}; nothing after that was read")
