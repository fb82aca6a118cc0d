"""Parquet and Arrow -> records, a few rows in memory at a time, images as encoded bytes."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.dialogue import RecordError
from finetune.data.sources.source import Record
from finetune.data.sources.streams import BrokenFileError, open_file, until_broken

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 16
"""Rows of a Parquet file read at once: each may hold images of some megabytes."""


def read_parquet(path: Path) -> Iterator[Record]:
    return until_broken(path, number_rows(path.name, _parquet_batches(path)))


def _parquet_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow.parquet

    with open_file(path) as opened, pyarrow.parquet.ParquetFile(opened, buffer_size=2**20) as file:
        yield from file.iter_batches(BATCH_ROWS, use_threads=False)


def read_arrow(path: Path) -> Iterator[Record]:
    """Rows of an Arrow file, as the datasets library saves them."""
    return until_broken(path, number_rows(path.name, _arrow_batches(path)))


def _arrow_batches(path: Path) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    open_file(path).close()
    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            saved = pyarrow.ipc.open_file(file)
            yield from (saved.get_batch(number) for number in range(saved.num_record_batches))
        else:
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)


def number_rows(name: str, batches: Iterable["pyarrow.RecordBatch | pyarrow.Table"]) -> Iterator[Record]:
    """Rows as Python values, numbered through. A value that Python cannot hold is an error of its row."""
    import pyarrow

    try:
        rows = (batch.slice(row, 1) for batch in batches for row in range(batch.num_rows))
        for number, row in enumerate(rows):
            try:
                yield f"{name}#{number}", row.to_pylist()[0]
            except (ValueError, OverflowError) as error:  # text that is not UTF-8; a date beyond the year 9999
                yield f"{name}#{number}", RecordError("not a row", str(error))
    except (pyarrow.ArrowException, OSError) as error:
        raise BrokenFileError("corrupt file", str(error)) from error
