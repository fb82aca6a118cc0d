"""Shards: every record is in exactly one of them, whatever the file and wherever it is cut."""

import gzip
import json
import pickle
from itertools import chain, groupby

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_files import shard, written
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data import shards
from finetune.data.conversation import RecordError
from finetune.data.io.source_files import DataFile
from finetune.data.shards import Shard, read_shard, shards_of, undivided


def ids(source, parts):
    return [[record_id for record_id, _ in read_shard(source, shard)] for shard in parts]


def contents(source, parts):
    """Every record of some shards, as JSON; an error as its reason."""
    records = [record for shard in parts for _, record in read_shard(source, shard)]
    return [one.reason if isinstance(one, RecordError) else json.dumps(one) for one in records]


@pytest.fixture
def small(monkeypatch):
    """Files are cut, and scanned several times, as if 64 bytes were many."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 64)
    monkeypatch.setattr(shards, "LEAST_BYTES", 32)
    monkeypatch.setattr(shards, "BLOCK", 2)


def lines(count):
    return "".join(json.dumps({"text": f"{number:04}"}) + "\n" for number in range(count))  # 17 bytes each


def test_a_small_file_is_one_shard(tmp_path):
    source = make_source("text", (written(tmp_path / "t.jsonl", lines(3)),))
    assert shards_of(source) == [Shard(DataFile(tmp_path / "t.jsonl"))]
    assert ids(source, shards_of(source)) == [["t.jsonl:1", "t.jsonl:2", "t.jsonl:3"]]


def test_jsonl_is_cut_into_byte_ranges_and_lines_belong_to_the_one_in_which_they_begin(tmp_path, small, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_SHARDS", 1)
    source = make_source("text", (written(tmp_path / "t.jsonl", lines(8)),))  # 136 bytes
    parts = shards_of(source)
    assert [(part.file.start, part.file.stop) for part in parts] == [(0, 68), (68, None)]
    assert ids(source, parts) == [
        ["t.jsonl:1", "t.jsonl:2", "t.jsonl:3", "t.jsonl:4"],
        ["t.jsonl@68:1", "t.jsonl@68:2", "t.jsonl@68:3", "t.jsonl@68:4"],
    ]


def test_a_range_that_begins_inside_a_line_begins_with_the_next_one(tmp_path):
    path = written(tmp_path / "t.jsonl", lines(4))
    first, second, third = (Shard(DataFile(path, "", start, stop)) for start, stop in ((0, 18), (18, 34), (34, None)))
    source = make_source("text", (path,))
    assert ids(source, [first, second, third]) == [
        ["t.jsonl:1", "t.jsonl:2"],
        [],
        ["t.jsonl@34:1", "t.jsonl@34:2"],
    ]


def test_few_parts_are_scanned_several_times_in_blocks_of_records(tmp_path, small):
    path = written(tmp_path / "t.json", json.dumps([{"text": str(number)} for number in range(7)]))  # 105 bytes
    source = make_source("text", (path,))
    assert ids(source, shards_of(source)) == [
        ["t.json#0", "t.json#1", "t.json#6"],
        ["t.json#2", "t.json#3"],
        ["t.json#4", "t.json#5"],
    ]
    assert ids(source, undivided(shards_of(source))) == [[f"t.json#{number}" for number in range(7)]]


def test_parquet_is_cut_between_row_groups_and_rows_keep_their_numbers(tmp_path, small, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_SHARDS", 1)
    path = tmp_path / "t.parquet"
    pa.parquet.write_table(pa.table({"text": list("abcdefg")}), path, row_group_size=2)
    source = make_source("text", (path,))
    parts = shards_of(source)
    assert len(parts) == 4  # one for each row group, all smaller than the footer
    assert ids(source, parts) == [
        ["t.parquet#0", "t.parquet#1"],
        ["t.parquet#2", "t.parquet#3"],
        ["t.parquet#4", "t.parquet#5"],
        ["t.parquet#6"],
    ]


def test_a_tar_is_a_shard(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.tar", shard([("1.txt", b"one"), ("2.txt", b"two")]))
    source = make_source("text", (tmp_path,), columns={"text": "txt"})
    assert ids(source, shards_of(source)) == [["a.tar/1", "a.tar/2"], ["b.tar/1", "b.tar/2"]]


def test_a_few_tars_are_few_shards_as_each_reads_all_headers(tmp_path, small):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.tar", shard([(f"{number}.txt", b"one") for number in range(6)]))
    source = make_source("text", (tmp_path,), columns={"text": "txt"})
    assert [[each.rpartition("/")[2] for each in one] for one in ids(source, shards_of(source))] == [
        ["0", "1", "4", "5"],
        ["2", "3"],
        ["0", "1", "4", "5"],
        ["2", "3"],
    ]


def test_a_limit_holds_over_all_shards(tmp_path, small):
    paths = [written(tmp_path / f"{name}.jsonl", lines(5)) for name in "ab"]
    source = make_source("text", tuple(paths), limit=7)
    parts = shards_of(source)
    assert len(parts) > 1
    found = ids(source, parts)
    assert sorted(chain.from_iterable(found)) == [f"a.jsonl:{n}" for n in range(1, 6)] + ["b.jsonl:1", "b.jsonl:2"]


def test_a_column_that_only_a_later_shard_has_is_no_mistake(tmp_path, small):
    path = written(tmp_path / "t.jsonl", lines(30) + '{"said": "x"}\n')
    source = make_source("text", (path,), columns={"text": "said"})
    assert contents(source, shards_of(source))[-1] == '{"text": "x"}'


def test_a_byte_order_mark_counts_to_the_first_range(tmp_path, monkeypatch):
    """Of 3 + 4 * 10 bytes, the line from byte 23 on begins in the second half, which begins at 21."""
    path = written(tmp_path / "t.jsonl", "\ufeff" + '{"a": 10}\n' * 4)
    monkeypatch.setattr(shards, "SHARD_BYTES", 21)
    parts = shards_of(make_source("text", (path,)))
    assert [(part.file.start, part.file.stop) for part in parts] == [(0, 21), (21, None)]
    assert ids(make_source("text", (path,)), parts) == [["t.jsonl:1", "t.jsonl:2"], ["t.jsonl@21:1", "t.jsonl@21:2"]]


PIECES = st.lists(
    st.sampled_from(['{"text": "a"}', '{"text": "' + "b" * 150 + '"}', "", "[]", "nonsense", "\r", '{"text": "c\\n"}']),
    max_size=40,
)


@given(PIECES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(0, 6))
def test_every_line_is_in_one_shard(tmp_path_factory, pieces, end, bom, multiple_of):
    folder = tmp_path_factory.mktemp("lines")
    text = ("\ufeff" if bom else "") + end.join(pieces)
    plain, packed = written(folder / "t.jsonl", text), folder / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    for path in (plain, packed):
        source = make_source("text", (path,))
        expected = contents(source, [Shard(DataFile(path))])
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(shards, "SHARD_BYTES", 64)
            patched.setattr(shards, "LEAST_BYTES", 32)
            parts = shards_of(source, multiple_of=multiple_of)
        assert not multiple_of or len(parts) % multiple_of == 0
        assert sorted(contents(source, parts)) == sorted(expected)
        assert contents(source, undivided(parts)) == expected
        assert pickle.loads(pickle.dumps(parts)) == parts
        named = list(chain.from_iterable(ids(source, parts)))
        assert len(set(named)) == len(named)


@pytest.mark.parametrize(
    ("parts", "ways"),
    [
        (1, [4]),
        (2, [4, 4]),
        (3, [4, 4, 4]),
        (4, [1, 1, 1, 1]),
        (5, [1, 1, 1, 1, 4]),
        (7, [1, 1, 1, 1, 2, 1, 1]),
        (14, [1] * 12 + [2, 2]),
    ],
)
def test_shards_of_a_stream_are_even_and_few_read_the_same(tmp_path, parts, ways):
    files = [written(tmp_path / f"{number}.json", "[]") for number in range(parts)]
    found = shards_of(make_source("text", files), multiple_of=4)
    assert [len(list(shards)) for _, shards in groupby(found, key=lambda shard: shard.file)] == ways
    assert [shard.which for shard in found] == [which for of in ways for which in range(of)]
