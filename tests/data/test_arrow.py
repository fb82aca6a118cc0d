"""Arrow files: rows by number, columns as they were written, whole or not there."""

import pickle
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from finetune.data.arrow import ArrowFile, to_batches, write_arrow

SCHEMA = pa.schema(
    {
        "number": pa.int32(),
        "key": pa.list_(pa.uint64()),
        "name": pa.string(),
        "flag": pa.bool_(),
        "digest": pa.binary(2),
    }
)
ROWS = [
    {"number": 1, "key": [2**64 - 1, 2**64 - 2], "name": "one", "flag": True, "digest": b"1a"},
    {"number": 2, "key": [], "name": "two", "flag": False, "digest": b"2\0"},
    {"number": 3, "key": [7], "name": "é", "flag": True, "digest": b"3c"},
]


@pytest.fixture(params=[[3], [1, 2], [0, 2, 0, 1]])
def rows(request, tmp_path):
    """The three rows, in batches of several sizes."""
    bounds = np.cumsum([0, *request.param])
    batches = [pa.RecordBatch.from_pylist(ROWS[start:stop], SCHEMA) for start, stop in pairwise(bounds)]
    write_arrow(tmp_path / "rows.arrow", SCHEMA, batches, meaning="three")
    return ArrowFile(tmp_path / "rows.arrow")


def test_rows_are_found_by_number_whatever_batch_they_are_in(rows):
    assert len(rows) == 3
    assert [rows.row(number) for number in range(3)] == ROWS
    assert [rows.text("name", number) for number in range(3)] == ["one", "two", "é"]
    assert [rows.cell("key", number).tolist() for number in range(3)] == [[2**64 - 1, 2**64 - 2], [], [7]]
    assert rows.cell("key", 0).dtype == np.uint64
    assert rows.schema.metadata == {b"meaning": b"three"}


def test_columns_keep_their_type_and_their_last_bit(rows):
    assert rows.lengths("key").tolist() == [2, 0, 1]
    assert rows.values("number").tolist() == [1, 2, 3]
    assert rows.values("number").dtype == np.int32
    assert rows.values("key").tolist() == [2**64 - 1, 2**64 - 2, 7]
    assert rows.values("key").dtype == np.uint64
    assert rows.values("flag").tolist() == [True, False, True]
    assert rows.values("digest").tolist() == [b"1a", b"2\0", b"3c"]


@pytest.mark.parametrize("number", [-1, 3])
def test_a_row_that_is_not_there_is_an_index_error(number, rows):
    for get in (rows.row, lambda number: rows.text("name", number), lambda number: rows.cell("key", number)):
        with pytest.raises(IndexError):
            get(number)


def test_a_file_without_rows_has_columns_without_values(tmp_path):
    write_arrow(tmp_path / "none.arrow", SCHEMA, to_batches([], SCHEMA))
    rows = ArrowFile(tmp_path / "none.arrow")
    assert len(rows) == 0
    assert (rows.lengths("key").dtype, rows.lengths("key").tolist()) == (np.int64, [])
    assert (rows.values("key").dtype, rows.values("key").tolist()) == (np.uint64, [])
    assert rows.values("digest").tolist() == []
    with pytest.raises(IndexError):
        rows.row(0)


def test_a_file_is_whole_or_not_there(tmp_path):
    def batches():
        yield from to_batches(ROWS[:1], SCHEMA)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_arrow(tmp_path / "rows.arrow", SCHEMA, batches())
    assert not (tmp_path / "rows.arrow").exists()
    write_arrow(tmp_path / "rows.arrow", SCHEMA, to_batches(ROWS, SCHEMA))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]
    assert len(ArrowFile(tmp_path / "rows.arrow")) == 3


def test_rows_go_to_another_process_by_their_path(rows):
    sent = pickle.dumps(rows)
    assert len(sent) < 500
    assert pickle.loads(sent).row(2) == ROWS[2]
