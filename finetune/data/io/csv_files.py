"""CSV and TSV -> records. Rows that are none are counted line by line, so that a stray quote hides nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.io import streams
from finetune.data.io.streams import BrokenFileError, lost_after, open_text, read_lines, until_broken
from finetune.data.source import Record


def read_csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a header line; every value is text."""
    return until_broken(path, _csv_records(path, delimiter))


def _csv_records(path: Path, delimiter: str) -> Iterator[Record]:
    import csv

    csv.field_size_limit(streams.MAX_RECORD_BYTES)
    with open_text(path) as file:
        lines = _Lines(read_lines(file))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(rows)
        while True:
            start = lines.count + 1
            try:
                row = next(rows)
                found = _csv_record(header, row) if row else None
            except StopIteration:
                return
            except BrokenFileError:
                raise
            except RecordError as error:
                found = error
            except csv.Error as error:
                if lines.ended:
                    lost = lost_after(start - 1, lines.count, "line")
                    raise BrokenFileError(
                        "not CSV", f"a quote opens in line {start:,} and never closes", lost
                    ) from error
                found = RecordError("not CSV", str(error))
            if isinstance(found, RecordError) and lines.count > start:
                found = RecordError(found.reason, f"{found.detail}; lines {start:,} to {lines.count:,} are one row")
                yield from ((f"{path.name}:{line}", found) for line in range(start, lines.count + 1))
            elif found is not None:
                yield f"{path.name}:{start}", found


def _header(rows: Iterator[list[str]]) -> list[str]:
    """The names of the columns. Raises BrokenFileError: without them nothing of the file can be read."""
    import csv

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


class _Lines:
    """Lines as text, counted; one that is none raises RecordError, and the next can be asked for all the same."""

    def __init__(self, lines: Iterator[bytes | RecordError]):
        self._lines, self.count, self.ended = lines, 0, False

    def __iter__(self) -> "_Lines":
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


def _csv_record(header: list[str], row: list[str]) -> dict[str, Any] | RecordError:
    if len(row) != len(header):
        return RecordError("not CSV", f"expected {len(header)} fields, as in the header, got {len(row)}")
    return dict(zip(header, row, strict=True))
