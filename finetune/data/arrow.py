"""Write Arrow files atomically, and read their rows by number, memory-mapped."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling.atomic_files import partial_of, put_in_place
from modeling.errors import UserError


class DamagedError(UserError):
    """A file of a prepared set is damaged: cut short, empty, or overwritten."""

    def __init__(self, path: Path, what: object):
        self.path, self.what = path, what
        super().__init__(f"{path}: damaged ({what}); delete {path.parent} and give the same command again")

    def __reduce__(self) -> tuple[type["DamagedError"], tuple[Path, str]]:
        return DamagedError, (self.path, str(self.what))


def write_arrow(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], **metadata: str) -> None:
    """Write an Arrow file atomically: after a power cut, either the whole file exists or none."""
    with arrow_writer(path, schema, **metadata) as write:
        for batch in batches:
            write(batch)


@contextmanager
def arrow_writer(path: Path, schema: pa.Schema, **metadata: str) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Return a function that adds a batch to an Arrow file; the file appears, whole, when all are written."""
    partial = partial_of(path)
    with pa.OSFile(os.fsencode(partial), "wb") as file, pa.ipc.new_file(file, schema.with_metadata(metadata)) as writer:
        yield writer.write_batch
    put_in_place(partial, path)


def to_batches(rows: list[dict[str, Any]], schema: pa.Schema) -> list[pa.RecordBatch]:
    return [pa.RecordBatch.from_pylist(rows, schema)] if rows else []


class ArrowFile:
    """A memory-mapped Arrow file, whose rows are read by number. Raises DamagedError: it is no Arrow file.

    Call `validate` first on a file that may be damaged: reading through a wrong offset crashes the process.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
            self.schema = reader.schema
            self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except FileNotFoundError as error:
            raise DamagedError(path, "it is not there") from error
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(path, error) from error
        self.bounds = np.cumsum([0, *(batch.num_rows for batch in self.batches)])
        self._cells: dict[str, list[tuple[np.ndarray, pa.Array]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowFile, (self.path,)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def validate(self, schema: pa.Schema) -> "ArrowFile":
        """Return itself. Raises DamagedError: other columns, or an offset or a text that leads out of its buffer."""
        if not self.schema.equals(schema):
            raise DamagedError(self.path, "other columns than were written")
        for batch in self.batches:
            try:
                batch.validate(full=True)
            except pa.ArrowException as error:
                raise DamagedError(self.path, error) from error
            if any(column.null_count for column in batch.columns if not pa.types.is_fixed_size_binary(column.type)):
                raise DamagedError(self.path, "a value that is missing")
        return self

    def row(self, number: int) -> dict[str, Any]:
        batch, within = self._find(number)
        return self.batches[batch].slice(within, 1).to_pylist()[0]

    def text(self, column: str, number: int) -> str:
        batch, within = self._find(number)
        return self.batches[batch].column(column)[within].as_py()

    def cell(self, column: str, number: int) -> np.ndarray:
        """Return one cell of a list column, without a copy where its type allows."""
        batch, within = self._find(number)
        offsets, values = self._lists(column)[batch]
        start, stop = offsets[within], offsets[within + 1]
        return values.slice(start, stop - start).to_numpy(zero_copy_only=False)

    def lengths(self, column: str) -> np.ndarray:
        """Return the number of values in each cell of a list column: int64 [rows]."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets, _ in self._lists(column))])

    def values(self, column: str) -> np.ndarray:
        """Return a whole column; for a list column, the values of all cells, concatenated."""
        kind = self.schema.field(column).type
        if pa.types.is_list(kind):
            arrays, kind = [values for _, values in self._lists(column)], kind.value_type
        else:
            arrays = [batch.column(column) for batch in self.batches]
        return pa.chunked_array(arrays, kind).to_numpy()

    def _find(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = int(np.searchsorted(self.bounds, number, side="right")) - 1
        return batch, int(number - self.bounds[batch])

    def _lists(self, column: str) -> list[tuple[np.ndarray, pa.Array]]:
        """Return (offsets, values) of each batch."""
        if column not in self._cells:
            arrays = [batch.column(column) for batch in self.batches]
            self._cells[column] = [(array.offsets.to_numpy(), array.values) for array in arrays]
        return self._cells[column]
