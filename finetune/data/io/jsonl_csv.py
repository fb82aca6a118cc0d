"""Files of lines -> records: JSON lines, CSV and TSV. A line that is no record is counted, and reading goes on."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import BrokenFileError, Record, lost_after, open_text, read_lines, skip_to_line

MAX_DEPTH = 100
"""Lists and objects inside each other; no dataset comes near it, and Python fails at about a thousand."""


def read_json_lines(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[Record]:
    """Yield the JSON object of each line that begins from byte `start` to before `stop`; pass over blank lines.

    Records are named by their line: train.jsonl:17, or train.jsonl@33554432:17 for the 17th line that begins at or
    after byte 33,554,432. Raises BrokenFileError.
    """
    name = f"{path.name}@{start}" if start else path.name
    with open_text(path) as file:
        if start:
            skip_to_line(file, start)
        length = None if stop is None else stop - file.tell()  # a byte order mark has been read
        for number, line in enumerate(read_lines(file, length), start=1):
            if isinstance(line, RecordError):
                yield f"{name}:{number}", line
            elif line.strip():
                yield f"{name}:{number}", as_record(parse_json(line))


def as_record(value: object) -> dict[str, Any] | RecordError:
    """Return a JSON object as it is, and a RecordError for any other value."""
    if isinstance(value, dict | RecordError):
        return value
    return RecordError("not an object", f"expected a JSON object, got {type(value).__name__}")


def parse_json(content: bytes) -> object | RecordError:
    """Return the value of a JSON text, or a RecordError: not UTF-8, not JSON, too deep, or too many values."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
        if fault := too_many_values(text):
            return fault
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RecordError("not JSON", str(error))
    return too_deep(value, text, 0, len(text)) or value


def too_many_values(text: str, start: int = 0) -> RecordError | None:
    """Return an error if the JSON value at `start` holds more values than a record may; none of them is made."""
    most = byte_streams.MAX_VALUES
    if len(text) - start <= most or sum(text.count(sign, start) for sign in ",[{") <= most:
        return None
    count = depth = 0
    while count <= most:
        found = _UP_TO_SIGN.match(text, start)
        if not found:
            return None
        start = found.end()
        sign = text[start - 1]
        depth += (sign in "[{") - (sign in "]}")
        count += sign in ",[{"
        if depth <= 0:
            return None
    return RecordError("record too large", f"over {most:,} values")


_UP_TO_SIGN = re.compile(r'(?:[^",\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+[,\[\]{}]', re.DOTALL)
"""The text up to the next comma or bracket outside a string."""


def too_deep(value: object, text: str, start: int, end: int) -> RecordError | None:
    """Return an error if a value, written at `text[start:end]`, nests lists and objects more than `MAX_DEPTH` deep."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    deep = any(isinstance(inner, dict | list) for inner in level)
    return RecordError("not JSON", f"nested over {MAX_DEPTH} deep") if deep else None


def read_csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Yield the rows below a header line; every value is text. Raises BrokenFileError.

    Lines that are no row are errors one by one, so that a stray quote hides none of them.
    """
    csv.field_size_limit(byte_streams.MAX_RECORD_BYTES)
    with open_text(path) as file:
        lines = _DecodedLines(read_lines(file))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _csv_header(rows)
        while True:
            start = lines.count + 1
            found: dict[str, Any] | RecordError
            try:
                row = next(rows)
                if not row:
                    continue
                if len(row) == len(header):
                    found = dict(zip(header, row, strict=True))
                else:
                    detail = f"expected {len(header)} fields, as in the header, got {len(row)}"
                    found = RecordError("not CSV", detail)
            except StopIteration:
                return
            except BrokenFileError:
                raise
            except RecordError as error:
                found = error
            except csv.Error as error:
                if lines.ended:
                    lost = lost_after(start - 1, lines.count, "line")
                    detail = f"a quote opens in line {start:,} and never closes"
                    raise BrokenFileError("not CSV", detail, lost) from error
                found = RecordError("not CSV", str(error))
            if isinstance(found, RecordError) and lines.count > start:
                found = RecordError(found.reason, f"{found.detail}; lines {start:,} to {lines.count:,} are one row")
                yield from ((f"{path.name}:{line}", found) for line in range(start, lines.count + 1))
            else:
                yield f"{path.name}:{start}", found


def _csv_header(rows: Iterator[list[str]]) -> list[str]:
    """Return the names of the columns. Raises BrokenFileError: without them no row can be read."""
    nothing = "nothing of the file was read"
    try:
        header = next(filter(None, rows), [])
    except BrokenFileError:
        raise
    except (csv.Error, RecordError) as error:
        reason, detail = (error.reason, error.detail) if isinstance(error, RecordError) else ("not CSV", str(error))
        raise BrokenFileError(reason, f"in the header: {detail}", nothing) from error
    if len(set(header)) < len(header):
        raise BrokenFileError("not CSV", f"the header names a column twice: {', '.join(header):.200}", nothing)
    return header


class _DecodedLines:
    """Lines as text, counted. One that cannot be decoded raises RecordError, and the next one can still be read."""

    def __init__(self, lines: Iterator[bytes | RecordError]):
        self._lines, self.count, self.ended = lines, 0, False

    def __iter__(self) -> "_DecodedLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.count += 1
        if isinstance(line, RecordError):
            raise line
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise RecordError("not UTF-8", f"{error.reason} at byte {error.start} of a line") from error
