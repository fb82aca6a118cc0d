"""CSV, Parquet and Arrow -> records, a few rows in memory at a time, images as encoded bytes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.dialogue import RecordError
from finetune.data.sources import streams
from finetune.data.sources.source import Record
from finetune.data.sources.streams import open_text, read_lines, until_corrupt

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 16
"""Rows of a Parquet file read at once: each may hold images of some megabytes."""


def read_csv(path: Path, delimiter: str) -> Iterator[Record]:
    """Rows below a header line; every value is text."""
    import csv

    csv.field_size_limit(streams.MAX_RECORD_BYTES)
    return until_corrupt(path.name, _csv_records(path, delimiter), (csv.Error,))


def _csv_records(path: Path, delimiter: str) -> Iterator[Record]:
    import csv

    with open_text(path) as file:
        lines = _Lines(read_lines(file))
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = next(filter(None, rows), [])
        if len(set(header)) < len(header):
            raise RecordError("not CSV", f"the header names a column twice: {', '.join(header):.200}")
        while True:
            place = f"{path.name}:{lines.count + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except (csv.Error, RecordError) as error:
                yield place, error if isinstance(error, RecordError) else RecordError("not CSV", str(error))
                continue
            if row:
                yield place, _csv_record(header, row)


class _Lines:
    """Lines as text, counted; one that is none raises RecordError, and the next can be asked for all the same."""

    def __init__(self, lines: Iterator[bytes | RecordError]):
        self._lines, self.count = lines, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
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


def read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow

    return until_corrupt(path.name, number_rows(path.name, _parquet_batches(path)), (pyarrow.ArrowException,))


def _parquet_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        yield from file.iter_batches(BATCH_ROWS, use_threads=False)


def read_arrow(path: Path) -> Iterator[Record]:
    """Rows of an Arrow file, as the datasets library saves them."""
    import pyarrow

    return until_corrupt(path.name, number_rows(path.name, _arrow_batches(path)), (pyarrow.ArrowException,))


def _arrow_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            saved = pyarrow.ipc.open_file(file)
            yield from (saved.get_batch(number) for number in range(saved.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


def number_rows(name: str, batches: Iterable["pyarrow.RecordBatch | pyarrow.Table"]) -> Iterator[Record]:
    """Rows as Python values, numbered through. A value that Python cannot hold is an error of its row."""
    rows = (batch.slice(row, 1) for batch in batches for row in range(batch.num_rows))
    for number, row in enumerate(rows):
        try:
            yield f"{name}#{number}", row.to_pylist()[0]
        except (ValueError, OverflowError) as error:  # text that is not UTF-8; a date beyond the year 9999
            yield f"{name}#{number}", RecordError("not a row", str(error))
