"""Every kind of file -> records, by hand; and what is broken -> what can be read of it, then the reason."""

import base64
import gzip
import io
import json
import math
import os
import random
import socket
import tarfile
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import Image, RecordError, Slice
from finetune.data.images import encoded
from finetune.data.io import streams
from finetune.data.io.files import READERS, files_of, fingerprint, read_header, read_items, read_pairs, read_records
from finetune.data.io.image_roots import ImageRoot
from finetune.data.records import taken, to_dialogue
from finetune.data.stats import SourceStats
from modeling.errors import UserError

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")


def written(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(*paths, **settings):
    """Records as they are, errors by their reason."""
    source = make_source("auto", paths, **{"on_broken": "keep", **settings})
    return [(place, got.reason if isinstance(got, RecordError) else got) for place, got in read_records(source)]


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert not isinstance(caught.value, RecordError)
    return str(caught.value)


LINES = '{"a": 1}\n\n  \n{"a": "é"}\r\n{"a": [true, null]}'
TWO = [("f.json#0", {"a": 1}), ("f.json#1", {"b": [{}, "x"]})]


def test_json_lines(tmp_path):
    path = written(tmp_path / "f.jsonl", LINES)
    assert read(path) == [("f.jsonl:1", {"a": 1}), ("f.jsonl:4", {"a": "é"}), ("f.jsonl:5", {"a": [True, None]})]


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
def test_compressed_files_give_what_plain_ones_give(suffix, packing, tmp_path):
    content = {".csv": "a,b\n1,2\n", ".tsv": "a\tb\n1\t2\n", ".json": '[{"a": 1}]'}.get(suffix, LINES)
    plain = read(written(tmp_path / f"f{suffix}", content))
    packed = read(written(tmp_path / f"f{suffix}{packing}", PACK[packing](content.encode())))
    assert plain
    assert [record for _, record in packed] == [record for _, record in plain]
    assert {place.split(":")[0].split("#")[0] for place, _ in packed} == {f"f{suffix}{packing}"}


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"b": [{}, "x"]}]',
        '{"meta": {"data": [7]}, "data": [{"a": 1}, {"b": [{}, "x"]}], "after": 1}',
        '{"test": [{"c": 1}], "train": [{"a": 1}, {"b": [{}, "x"]}]}',
        '\ufeff[{"a": 1}, {"b": [{}, "x"]}]',
    ],
)
def test_json_with_its_list_somewhere(text, tmp_path):
    assert read(written(tmp_path / "f.json", text)) == TWO


def test_json_lines_in_a_json_file(tmp_path):
    path = written(tmp_path / "f.json", '{"data": [{"a": 1}]}\n{"data": []}\n{"data": \n')
    assert read(path) == [("f.json:1", {"data": [{"a": 1}]}), ("f.json:2", {"data": []}), ("f.json:3", "not JSON")]


def test_one_json_object_is_one_record(tmp_path):
    path = written(tmp_path / "f.json", '{"messages": [{"role": "user"}],\n "data": "no list"}\n')
    assert read(path) == [("f.json#0", {"messages": [{"role": "user"}], "data": "no list"})]


def test_empty_files_hold_no_records(tmp_path):
    for name, content in (
        ("a.json", "[]"),
        ("b.json", '{"data": []}'),
        ("c.jsonl", ""),
        ("d.csv", ""),
        ("e.csv", "a,b\n"),
    ):
        assert read(written(tmp_path / name, content)) == []


DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[1]", "not an object"),
        (b'"text"', "not an object"),
        (b"\0\0\0", "not JSON"),
        (b'{"a": "\0"}', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + DEEP + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": 1}{"a": 2}', "not JSON"),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": "\\ud800"}', {"a": "\ud800"}),
        (b'\xef\xbb\xbf{"a": 2}', {"a": 2}),
        (b'{"a": ' + b"[[]," * 60 + b"1" + b"]" * 60 + b"}", None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_broken_line_is_told_and_the_next_is_read(line, expected, tmp_path):
    path = written(tmp_path / "f.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 3}\n')
    first, second, third = read(path)
    assert (first, third) == (("f.jsonl:1", {"a": 0}), ("f.jsonl:3", {"a": 3}))
    assert second[0] == "f.jsonl:2"
    assert isinstance(second[1], dict) if expected is None else second[1] == expected


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b', {"a":', "not JSON"),
        (b', {"a": tru}]', "not JSON"),
        (b', {"a": "\xff"}]', "not UTF-8"),
        (b', {"a": "\xc3', "not UTF-8"),
        (b', {"a": "\0"}]', "not JSON"),
        (b", {'a': 1}]", "not JSON"),
        (b" {}]", "not JSON"),
        (b",]", "not JSON"),
        (b"}", "not JSON"),
        (b"] trailing", "not JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_broken_list_gives_its_good_records_first(tail, reason, tmp_path):
    path = written(tmp_path / "f.json", b'[{"a": 0}, 7, {"a": 2}' + tail)
    assert read(path) == [
        ("f.json#0", {"a": 0}),
        ("f.json#1", "not an object"),
        ("f.json#2", {"a": 2}),
        ("f.json", reason),
    ]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (DEEP, "not JSON"),
        (b'{"a": ' + b'{"b": ' * 150 + b"1" + b"}" * 150 + b"}", "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'"text"', "not an object"),
    ],
    ids=["deep", "a little deep", "a number of 5,000 digits", "text"],
)
def test_an_item_of_a_list_that_is_no_record_is_counted_and_the_next_is_read(item, reason, tmp_path):
    path = written(tmp_path / "f.json", b'[{"a": 0}, ' + item + b', {"a": 2}]')
    assert read(path) == [("f.json#0", {"a": 0}), ("f.json#1", reason), ("f.json#2", {"a": 2})]


def test_json_nan_is_read_as_python_writes_it(tmp_path):
    """In a list as in lines, also where a window of the reader ends."""
    values = [math.inf, -math.inf, 1e999, math.nan, 0.5] * 5000
    as_list = read(written(tmp_path / "f.json", json.dumps([{"a": value} for value in values])))
    as_lines = read(written(tmp_path / "f.jsonl", "\n".join(json.dumps({"a": value}) for value in values)))
    assert [repr(record["a"]) for _, record in as_list] == ["inf", "-inf", "inf", "nan", "0.5"] * 5000
    assert [repr(record) for _, record in as_lines] == [repr(record) for _, record in as_list]
    assert read(written(tmp_path / "g.json", '[{"a": 1e999}]')) == [("g.json#0", {"a": math.inf})]


def test_harmless_oddities_of_json(tmp_path):
    path = written(tmp_path / "f.json", '[{"a": 1, "a": 2}, {"a": "\\ud800"}, {"a": 1e5, "b": -0.5}]')
    places = [record for _, record in read(path)]
    assert places[0] == {"a": 2}
    assert isinstance(places[1]["a"], str)
    assert places[2] == {"a": 1e5, "b": -0.5}
    assert type(places[2]["a"]) is float


def test_utf_16_is_named(tmp_path):
    for name, content in (("f.jsonl", '{"a": 1}'), ("f.json", "[]"), ("f.csv", "a\n1\n")):
        for encoding in ("utf-16", "utf-16-be"):
            mark = b"" if encoding == "utf-16" else b"\xfe\xff"
            path = written(tmp_path / name, mark + content.encode(encoding))
            [(place, error)] = read_records(make_source("auto", (path,), on_broken="keep"))
            assert (place, error.reason) == (name, "not UTF-8")
            assert "UTF-16" in error.detail


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 100_000)


@pytest.mark.parametrize("packing", [*PACK])
def test_a_line_that_is_too_long_is_passed_over(packing, tmp_path, small_limit):
    content = b'{"a": 1}\n' + b'{"a": "' + b"x" * 300_000 + b'"}\n{"a": 3}\n'
    path = written(tmp_path / f"f.jsonl{packing}", PACK[packing](content))
    assert [record for _, record in read(path)] == [{"a": 1}, "record too large", {"a": 3}]


def test_a_line_of_just_the_limit_is_read(tmp_path, small_limit):
    line = '{"a": "' + "x" * (100_000 - 9) + '"}'
    assert len(line) == 100_000
    path = written(tmp_path / "f.jsonl", f"{line}\n{line[:-1]} }}\n")
    assert [got if isinstance(got, str) else len(got["a"]) for _, got in read(path)] == [99_991, "record too large"]


@pytest.mark.parametrize(
    "large", [{"a": ["x" * 1000] * 300}, {"a": "x" * 300_000}, {"a": "\\]}" * 50_000}, {"a": {"[" * 300_000: 1}}]
)
def test_json_item_that_is_too_large_is_passed_over(large, tmp_path, small_limit):
    path = written(tmp_path / "f.json", json.dumps([{"a": 1}, large, {"a": 3}]))
    assert read(path) == [("f.json#0", {"a": 1}), ("f.json#1", "record too large"), ("f.json#2", {"a": 3})]


def test_json_item_of_half_a_megabyte_among_small_ones(tmp_path):
    items = [{"a": 1}, {"a": "ü" * 250_000}, {"a": ["x", {}] * 50_000}, {"a": 4}]
    path = written(tmp_path / "f.json", json.dumps(items, ensure_ascii=False))
    assert [record for _, record in read(path)] == items


@pytest.mark.parametrize("empty", ["[]", "{}", "0", '["]"]', "[[[[[]]]]]"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_bomb_of_empty_lists_is_never_made(empty, suffix, tmp_path, monkeypatch):
    """Empty lists take thirty times their text in Python."""
    monkeypatch.setattr(streams, "MAX_VALUES", 20_000)
    bomb = '{"a": [' + ",".join([empty] * 30_000) + "]}"
    lines = ['{"a": 0}', bomb, '{"a": [[[[], {"b": "]"}]]]}']
    path = written(tmp_path / f"f.{suffix}", f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines))
    tracemalloc.start()
    got = [record for _, record in read(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == [{"a": 0}, "record too large", {"a": [[[[], {"b": "]"}]]]}]
    assert peak < 3e6


def test_a_record_may_hold_many_commas_in_its_text(tmp_path):
    record = {"a": ", " * 1_100_000}
    assert read(written(tmp_path / "f.json", json.dumps([record]))) == [("f.json#0", record)]
    assert read(written(tmp_path / "f.jsonl", json.dumps(record))) == [("f.jsonl:1", record)]


def test_a_long_list_of_small_items_is_not_too_large(tmp_path, small_limit):
    path = written(
        tmp_path / "f.json", json.dumps({"other": [{"b": "y" * 50}] * 5000, "data": [{"a": "x" * 50}] * 5000})
    )
    assert len([record for _, record in read(path) if record == {"a": "x" * 50}]) == 5000


def test_a_line_bomb_is_read_in_little_memory(tmp_path):
    """300 MB on one line, in some hundred kilobytes of gzip."""
    block = b"0" * 2**20
    with gzip.open(tmp_path / "f.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(block)
        file.write(b'\n{"a": 1}\n')
    tracemalloc.start()
    got = read(tmp_path / "f.jsonl.gz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == [("f.jsonl.gz:1", "record too large"), ("f.jsonl.gz:2", {"a": 1})]
    assert peak < 250e6


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_off(suffix, packing, tmp_path):
    words = [random.Random(number).randbytes(30).hex() for number in range(10_000)]
    content = {
        ".jsonl": "".join(f'{{"a": "{word}"}}\n' for word in words),
        ".json": json.dumps([{"a": word} for word in words]),
        ".csv": "a\n" + "\n".join(words),
    }[suffix]
    packed = PACK[packing](content.encode())
    *records, (place, last) = read(written(tmp_path / f"f{suffix}{packing}", packed[: len(packed) * 2 // 3]))
    assert (place, last) == (f"f{suffix}{packing}", "corrupt file")
    assert 3000 < len(records) < 7000
    assert [record["a"] for _, record in records] == words[: len(records)]


@pytest.mark.parametrize(
    "name",
    [
        f"f{suffix}"
        for suffix in (".jsonl.gz", ".json.zst", ".csv.gz", ".parquet", ".arrow", ".tar", ".tgz", ".tar.zst")
    ],
)
@pytest.mark.parametrize(
    "content", [b"neither this nor that" * 100, b"\x1f\x8b\x08\0\0\0", b"PAR1PAR1", b"ARROW1\0\0", b"\xff" * 700]
)
def test_a_file_of_another_kind_is_corrupt(name, content, tmp_path):
    assert read(written(tmp_path / name, content)) == [(name, "corrupt file")]


@pytest.mark.parametrize("name", ["f.parquet", "f.arrow", "f.tar"])
def test_an_empty_file_that_should_not_be(name, tmp_path):
    assert read(written(tmp_path / name, b"")) == [(name, "corrupt file")]


def test_csv(tmp_path):
    path = written(tmp_path / "f.csv", '\ufeffa,b\r\n1,"x, ""y""\nz"\n\n,\n1,2,3\n1\n4,5\n')
    assert read(path) == [
        ("f.csv:2", {"a": "1", "b": 'x, "y"\nz'}),
        ("f.csv:5", {"a": "", "b": ""}),
        ("f.csv:6", "not CSV"),
        ("f.csv:7", "not CSV"),
        ("f.csv:8", {"a": "4", "b": "5"}),
    ]


def test_csv_with_broken_rows(tmp_path):
    path = written(tmp_path / "f.tsv", b'a\tb\n1\t\xff\n"x"y\t2\n3\t4\n5\t"never closed\n6\t7\n')
    assert read(path) == [
        ("f.tsv:2", "not UTF-8"),
        ("f.tsv:3", "not CSV"),
        ("f.tsv:4", {"a": "3", "b": "4"}),
        ("f.tsv", "not CSV"),
    ]


@pytest.mark.parametrize("stray", ['2,"stray\n', '2,"stray, and more\n'])
def test_csv_quote_that_swallows_lines_counts_each_of_them(stray, tmp_path):
    path = written(tmp_path / "f.csv", f'a,b\n1,x\n{stray}3,x\n4,x\n5,"y" z\n6,x\n')
    assert read(path) == [
        ("f.csv:2", {"a": "1", "b": "x"}),
        *((f"f.csv:{line}", "not CSV") for line in (3, 4, 5, 6)),
        ("f.csv:7", {"a": "6", "b": "x"}),
    ]


def test_csv_quote_that_never_closes_says_how_much_it_hides(tmp_path):
    lines = [f"{number},x\n" for number in range(98)]
    path = written(tmp_path / "f.csv", "".join(["a,b\n", *lines[:48], '48,"x\n', *lines[49:]]))
    message = refusal(read_records, make_source("auto", (path,)))
    assert message == (
        f"{path}: the file breaks off: not CSV: a quote opens in line 50 and never closes; "
        "48 records were read before, 51 % of the file was not read, from line 49 of 99 on\n"
        "  mend the file, or set `on_broken: keep` on this source to use what can be read"
    )


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends_of_every_kind(end, tmp_path):
    rows = f'a,b{end}1,"x{end}y"{end}2,z{end}'
    assert read(written(tmp_path / "f.csv", rows)) == [
        ("f.csv:2", {"a": "1", "b": f"x{end}y"}),
        ("f.csv:4", {"a": "2", "b": "z"}),
    ]
    lines = f'{{"a": 1}}{end}{end}{{"a": 2}}{end}'
    assert read(written(tmp_path / "f.jsonl", lines)) == [("f.jsonl:1", {"a": 1}), ("f.jsonl:3", {"a": 2})]
    assert [record for _, record in read(written(tmp_path / "f.json", lines))] == [{"a": 1}, {"a": 2}]


def test_csv_header_that_is_no_use(tmp_path):
    assert read(written(tmp_path / "f.csv", "a,a\n1,2\n")) == [("f.csv", "not CSV")]
    assert read(written(tmp_path / "g.csv", b"\xff\n1\n")) == [("g.csv", "not UTF-8")]


def test_a_long_csv_field(tmp_path):
    path = written(tmp_path / "f.csv", "a\n" + "x" * 500_000 + "\n")
    assert [len(record["a"]) for _, record in read(path)] == [500_000]


ROWS = [
    {"image": {"bytes": PNG, "path": f"{number}.png"}, "texts": [{"user": "é"}], "n": number} for number in range(40)
]


def test_parquet_with_images_as_bytes(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet", row_group_size=7)
    assert read(tmp_path / "f.parquet") == [(f"f.parquet#{number}", row) for number, row in enumerate(ROWS)]


def test_a_parquet_page_that_is_damaged_gives_the_rows_before_it(tmp_path):
    table = pa.table({"n": list(range(3000)), "text": [f"text {number}" for number in range(3000)]})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=1000, use_dictionary=False, compression="zstd")
    start = pq.ParquetFile(tmp_path / "f.parquet").metadata.row_group(1).column(0).data_page_offset
    content = bytearray((tmp_path / "f.parquet").read_bytes())
    content[start : start + 200] = b"\xff" * 200
    *records, last = read(written(tmp_path / "f.parquet", bytes(content)))
    assert last == ("f.parquet", "corrupt file")
    assert 900 < len(records) <= 1000
    assert records[-1][1]["n"] == len(records) - 1


def test_a_value_that_python_cannot_hold_is_an_error_of_its_row(tmp_path):
    text = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    with (
        pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as out,
    ):
        out.write_batch(pa.record_batch({"text": text}))
    assert read(tmp_path / "f.arrow") == [
        ("f.arrow#0", {"text": "good"}),
        ("f.arrow#1", "not a row"),
        ("f.arrow#2", {"text": "fine"}),
    ]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_of_both_kinds(new, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, new(file, table.schema) as out:
        out.write_table(table, max_chunksize=9)
    assert read(tmp_path / "f.arrow") == [(f"f.arrow#{number}", row) for number, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def images_dataset():
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "inner": {"image": datasets.Image()},
            "text": datasets.Value("string"),
        }
    )
    image = {"bytes": PNG, "path": None}
    rows = [{"images": [image, image], "inner": {"image": image}, "text": f"text {number}"} for number in range(20)]
    return datasets.Dataset.from_list(rows, features=features), rows


def test_a_folder_that_datasets_saved(images_dataset, tmp_path):
    import datasets

    dataset, rows = images_dataset
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    assert [record for _, record in read(tmp_path / "one")] == rows
    datasets.DatasetDict({"train": dataset, "test": dataset.select([3, 1])}).save_to_disk(tmp_path / "dict")
    assert [record for _, record in read(tmp_path / "dict", split="test")] == [rows[3], rows[1]]
    message = refusal(read_records, make_source("auto", (tmp_path / "dict",), split="val"))
    assert "expected split test or train, got 'val'" in message


@pytest.mark.parametrize("stream", [False, True])
def test_a_local_folder_as_a_hub_id(stream, images_dataset, tmp_path):
    dataset, rows = images_dataset
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "data" / "train-00000.parquet")
    source = make_source("auto", hub=str(folder), stream=stream)
    assert list(read_records(source)) == [(f"{folder}#{number}", row) for number, row in enumerate(rows)]
    for wrong in ({"split": "nope"}, {"subset": "nope"}):
        assert "nope" in refusal(read_records, make_source("auto", hub=str(folder), stream=stream, **wrong))
    assert len(fingerprint(source)) == 64


def test_hub_mistakes_say_what_to_do(images_dataset, tmp_path):
    images_dataset[0].save_to_disk(tmp_path / "saved")
    assert "as a path" in refusal(read_records, make_source("auto", hub=str(tmp_path / "saved")))
    (tmp_path / "empty").mkdir()
    assert "expected a dataset's name" in refusal(read_records, make_source("auto", hub=str(tmp_path / "empty")))
    written(tmp_path / "bad" / "train.parquet", b"nothing")
    assert str(tmp_path / "bad") in refusal(read_records, make_source("auto", hub=str(tmp_path / "bad")))


def shard(members, mode="w", format=tarfile.PAX_FORMAT):
    """A tar archive of (name, content); a TarInfo is taken as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as archive:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                archive.addfile(name)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


SAMPLES = [
    ("a/000.jpg", PNG),
    ("a/000.txt", "été".encode()),
    ("a/001.json", b'{"question": "Who?", "n": [1]}'),
    ("a/001.seg.PNG", PNG + b"\0"),
    ("long" * 60 + "/ü.webp", PNG),
]


def test_webdataset_shard_with_images_where_they_lie(tmp_path):
    path = written(tmp_path / "s.tar", shard(SAMPLES))
    records = read(path)
    assert [place for place, _ in records] == ["s.tar/a/000", "s.tar/a/001", "s.tar/" + "long" * 60 + "/ü"]
    (_, first), (_, second), (_, third) = records
    assert first == {"__key__": "a/000", "jpg": first["jpg"], "txt": "été"}
    assert second == {"__key__": "a/001", "question": "Who?", "n": [1], "image": second["image"]}
    assert isinstance(first["jpg"], Slice)
    assert [encoded(Image(image)) for image in (first["jpg"], second["image"], third["webp"])] == [
        PNG,
        PNG + b"\0",
        PNG,
    ]


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar.zst"])
def test_webdataset_shard_that_is_compressed(name, tmp_path):
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    path = written(tmp_path / name, pack(shard(SAMPLES)))
    (place, first), (_, second), (_, third) = read(path)
    assert place == f"{name}/a/000"
    assert first == {"__key__": "a/000", "jpg": PNG, "txt": "été"}
    assert second == {"__key__": "a/001", "question": "Who?", "n": [1], "image": PNG + b"\0"}
    assert third["webp"] == PNG


def link(name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, None


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([link("k.jpg", "/etc/hostname")], ("k", "not a file")),
        ([link("k.jpg", "0.txt", tarfile.LNKTYPE)], ("k", "not a file")),
        ([("k.jpg", b"1"), ("k.jpg", b"2")], ("k", "not a sample")),
        ([("README", b"1")], ("README", "not a sample")),
        ([(".DS_Store", b"1")], (".DS_Store", "not a sample")),
        ([("k.json", b"[1]")], ("k", "not an object")),
        ([("k.json", b"{")], ("k", "not JSON")),
        ([("k.txt", b"\xff")], ("k", "not UTF-8")),
    ],
)
def test_webdataset_samples_that_are_none(name, members, expected, tmp_path):
    content = shard([("0.txt", b"before"), *members, ("1.txt", b"after")])
    path = written(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    before, refused, after = read(path)
    assert (before, after) == (
        (f"{name}/0", {"__key__": "0", "txt": "before"}),
        (f"{name}/1", {"__key__": "1", "txt": "after"}),
    )
    assert refused == (f"{name}/{expected[0]}", expected[1])


def header(name, size=None, kind=b"0", data=b""):
    """A member of a tar archive whose header may say anything about its size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        block[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True) if size < 0 else b"%011o\0" % size
        block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:512]))
    return bytes(block) + data + b"\0" * (-len(data) % 512)


TAR_BOMBS = {
    "size -1": header("b.txt", -1),
    "size that leads back": header("b.txt", -1024),
    "size beyond the end": header("b.txt", 8 * 2**30 - 1),
    "long name of -1 bytes": header("././@LongLink", -1, b"L"),
    "long name of a gigabyte": header("././@LongLink", 2**30, b"L"),
    "pax header of -1 bytes": header("p", -1, b"x"),
    "pax header that is none": header("p", kind=b"x", data=b"no record"),
    "pax length of many digits": header("p", kind=b"x", data=b"9" * 5000 + b" a=b\n"),
    "pax size of -1": header("p", kind=b"x", data=b"11 size=-1\n") + header("b.txt", data=b"b"),
    "pax size that is no number": header("p", kind=b"x", data=b"13 size=ab.c\n") + header("b.txt", data=b"b"),
    "pax sparse map": header("p", kind=b"x", data=b"23 GNU.sparse.map=a,b,c\n") + header("b.txt", data=b"b"),
    "pax sparse 1.0": header("p", kind=b"x", data=b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
    + header("b.txt", data=b"zz\n"),
    "chain of pax headers": header("p", kind=b"x", data=b"6 a=b\n") * 2000,
    "chain of long names": header("././@LongLink", kind=b"L", data=b"name\0") * 2000,
    "global pax headers": header("p", kind=b"g", data=b"6 a=b\n") * 2000,
}


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tar.zst"])
@pytest.mark.parametrize("bomb", TAR_BOMBS)
def test_tar_headers_that_are_hostile_end_the_archive(bomb, name, tmp_path):
    start = header("0.txt", data=b"zero") + header("a.txt", data=b"a")
    pack = {"s.tar": bytes, "s.tar.gz": gzip.compress, "s.tar.zst": zstandard.compress}[name]
    path = written(tmp_path / name, pack(start + TAR_BOMBS[bomb] + b"\0" * 2048))
    *records, last = read(path)
    assert records[0] == (f"{name}/0", {"__key__": "0", "txt": "zero"})
    if last != (name, "corrupt file"):
        assert bomb in ("pax size that is no number", "pax sparse map", "global pax headers")
        assert all(isinstance(record, dict) or record in ("not a file", "not UTF-8") for _, record in (*records, last))


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tar.zst"])
@pytest.mark.parametrize("damage", ["cut in data", "cut in header", "header", "garbage after it"])
def test_a_damaged_shard_gives_its_first_samples(name, damage, tmp_path):
    content = bytearray(shard([(f"{number}.txt", bytes([65 + number]) * 700) for number in range(4)]))
    assert len(content) >= 4 * 1536 + 1024
    if damage == "header":
        content[2 * 1536 : 2 * 1536 + 512] = b"?" * 512
    elif damage == "garbage after it":
        content[2 * 1536 :] = b"?" * 100
    else:
        del content[2 * 1536 + (200 if damage == "cut in header" else 900) :]
    pack = {"s.tar": bytes, "s.tar.gz": gzip.compress, "s.tar.zst": zstandard.compress}[name]
    records = read(written(tmp_path / name, pack(bytes(content))))
    texts = [record if isinstance(record, str) else record["txt"][0] for _, record in records]
    assert texts == ["A", "corrupt file"]  # B may have had more files


def test_folders_patterns_and_order(tmp_path):
    for name in (
        "b.jsonl",
        "a.csv.gz",
        "sub/c.parquet",
        ".hidden.jsonl",
        ".git/x.json",
        "notes.md",
        "photo.jpg",
        "B.JSON",
    ):
        written(tmp_path / name, b"")
    found = [str(path.relative_to(tmp_path)) for path in files_of(make_source("auto", (tmp_path,)))]
    assert found == ["B.JSON", "a.csv.gz", "b.jsonl", "sub/c.parquet"]
    files = files_of(make_source("auto", (tmp_path / "b.jsonl", tmp_path / "*.csv*", tmp_path / "su?")))
    assert files == [tmp_path / "b.jsonl", tmp_path / "a.csv.gz", tmp_path / "sub" / "c.parquet"]
    written(tmp_path / "odd[1].jsonl", b"")
    assert files_of(make_source("auto", (tmp_path / "odd[1].jsonl",))) == [tmp_path / "odd[1].jsonl"]


def test_paths_that_lead_nowhere(tmp_path):
    written(tmp_path / "dialogues.jsonl", b"")
    written(tmp_path / "notes" / "a.md", b"")
    missing = refusal(files_of, make_source("auto", (tmp_path / "dialogue.jsonl",)))
    assert missing == f"{tmp_path}/dialogue.jsonl: nothing is there; did you mean dialogues.jsonl?"
    assert "x*.jsonl: nothing is there" in refusal(files_of, make_source("auto", (tmp_path / "x*.jsonl",)))
    assert "none is no folder" in refusal(files_of, make_source("auto", (tmp_path / "none" / "a.jsonl",)))
    assert "no data file below it" in refusal(files_of, make_source("auto", (tmp_path / "notes",)))
    unknown = refusal(read_records, make_source("auto", (tmp_path / "notes" / "a.md",)))
    assert "a.md: expected a file that ends in .json, .json.gz, .json.zst, .jsonl" in unknown


def test_an_unknown_suffix_is_told_before_the_first_record(tmp_path):
    good, bad = written(tmp_path / "a.jsonl", '{"a": 1}'), written(tmp_path / "b.xlsx", b"")
    with pytest.raises(UserError, match=r"b\.xlsx"):
        next(iter(read_records(make_source("auto", (good, bad)))))


def test_columns_are_renamed(tmp_path):
    path = written(tmp_path / "f.jsonl", '{"q": 1, "x": 2}\n[]\n{"x": 3, "question": 4}\n')
    assert read(path, columns={"question": "q", "again": "q"}) == [
        ("f.jsonl:1", {"question": 1, "again": 1, "x": 2}),
        ("f.jsonl:2", "not an object"),
        ("f.jsonl:3", {"x": 3, "question": 4}),
    ]
    assert read(path, columns={"x": "q", "q": "x"})[0] == ("f.jsonl:1", {"x": 1, "q": 2})
    message = refusal(read_records, make_source("auto", (path,), columns={"answer": "a"}))
    assert message.endswith("columns: no record has a; the first has q, x")


def test_json_breaks_off_and_says_how_much_is_lost(tmp_path):
    path = written(tmp_path / "sub" / "f.json", "[" + '{"a": 10}, ' * 20 + "tru, " + '{"a": 1}, ' * 17 + "{}]")
    assert path.stat().st_size == 399
    message = refusal(read_records, make_source("auto", (tmp_path,)))
    assert message == (
        f"{path}: the file breaks off: not JSON: Expecting value at byte 221; 20 records were read before, "
        "45 % of the file was not read, from byte 221 of 399 on\n"
        "  mend the file, or set `on_broken: keep` on this source to use what can be read"
    )
    *records, (place, error) = read_records(make_source("auto", (tmp_path,), on_broken="keep"))
    assert (len(records), place, error.file) == (20, "sub/f.json", str(path))
    assert str(error) == message.splitlines()[0].removeprefix(f"{path}: the file breaks off: ")


@pytest.mark.parametrize(
    ("name", "content", "lost"),
    [
        ("f.json", b'[{"a": 1}, {"a": ', "1 record was read before, the file ends early, after byte 17"),
        ("f.json", b"", "0 records were read before, the file ends early, after byte 0"),
        (
            "f.json",
            b'{"a": 1} {"a": 2}',
            "1 record was read before, 47 % of the file was not read, from byte 9 of 17 on",
        ),
        ("f.json.gz", gzip.compress(b'[{"a": 1}, tru]'), "at byte 11 of the unpacked text; 1 record was read before"),
        (
            "f.jsonl.gz",
            gzip.compress(b'{"a": 1}\n')[:-4],
            "1 record was read before, the file ends early, after byte 25",
        ),
        ("f.csv.zst", zstandard.compress(b"a\n1\n")[:-2], "0 records were read before, the file ends early, after"),
        ("f.jsonl", b"\xff\xfe{\0}\0", "nothing of the file was read"),
    ],
)
def test_a_file_breaks_off_and_says_how_much_is_lost(name, content, lost, tmp_path):
    path = written(tmp_path / name, content)
    message = refusal(read_records, make_source("auto", (path,)))
    assert message.startswith(f"{path}: the file breaks off: ")
    assert lost in message


def test_a_broken_file_among_others_keeps_the_others(tmp_path):
    written(tmp_path / "a.jsonl", '{"a": 1}')
    written(tmp_path / "b.json", '[{"a": 2}, ')
    written(tmp_path / "c.jsonl", '{"a": 3}')
    assert read(tmp_path) == [
        ("a.jsonl:1", {"a": 1}),
        ("b.json#0", {"a": 2}),
        ("b.json", "not JSON"),
        ("c.jsonl:1", {"a": 3}),
    ]


def test_a_file_that_breaks_off_after_the_limit_is_not_read_so_far(tmp_path):
    stats = SourceStats("x")
    path = written(tmp_path / "f.json", '[{"text": "a"}, {"text": "b"}, tru')
    assert len(list(taken(make_source("text", (path,), limit=2), stats))) == 2
    assert (stats.read, stats.limited, stats.broken) == (2, True, [])
    stats = SourceStats("x")
    assert len(list(taken(make_source("text", (path,), on_broken="keep"), stats))) == 2
    assert (stats.read, stats.limited) == (2, False)
    assert stats.loss == (
        f"{path} breaks off: not JSON: Expecting value at byte 31; 2 records were read before, 8.8 % of the file "
        "was not read, from byte 31 of 34 on"
    )


def test_names_that_are_not_utf8_are_counted_and_can_be_written(tmp_path):
    """A file's name, a member's and a key's: as escapes, in places and details alike."""
    folder = tmp_path / "caf\udce9"
    written(folder / "d\udce9.jsonl", '{"text": "good"}\n{"\\ud800": 1}\n["\\udfff"]\n')
    written(folder / "s\udce9.tar", shard([("k\udce9.text", b"text"), ("\udce9", b"")], format=tarfile.GNU_FORMAT))
    written(folder / "z\udce9.json", '[{"text": "last"}, tru')
    source = make_source("text", (folder,), on_broken="keep")
    stats, root, kept = SourceStats(source.name), ImageRoot(source), []
    for place, record in taken(source, stats):
        try:
            to_dialogue(place, record, root)
            kept.append(place)
        except RecordError as error:
            stats.reject(place, error)
    stats.kept = len(kept)
    assert kept == ["d\\udce9.jsonl:1", "s\\udce9.tar/k\\udce9", "z\\udce9.json#0"]
    assert stats.rejected == {"missing field": 1, "not an object": 1, "not a sample": 1}
    assert r"got keys ['\ud800']" in stats.first_rejected["missing field"]
    assert stats.first_rejected["not a sample"].startswith("s\\udce9.tar/\\udce9: ")
    assert stats.broken[0].startswith(f"{tmp_path}/caf\\udce9/z\\udce9.json breaks off: ")
    assert json.dumps(stats.to_json(), ensure_ascii=False).encode()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device"])
@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "csv.zst", "tar", "tgz", "parquet", "arrow"])
def test_fifo_and_other_things_that_are_no_files(kind, suffix, tmp_path):
    path = tmp_path / f"d.{suffix}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    message = f"{path}: expected a file, found {kind}"
    reader = READERS[f".{suffix}"]
    assert refusal(reader, path, "train") == message


VQA = '{"info": {"n": 1}, "data_type": "mscoco", "rate": 0.5, "questions": [{"id": 1}, 2, {"id": 3}], "late": 7}'


@pytest.mark.parametrize("packing", [*PACK])
def test_items_pairs_and_headers(packing, tmp_path):
    path = written(tmp_path / f"f.json{packing}", PACK[packing](VQA.encode()))
    name = f"f.json{packing}"
    assert list(read_items(path, "questions")) == [
        (f"{name}#0", {"id": 1}),
        (f"{name}#1", 2),
        (f"{name}#2", {"id": 3}),
    ]
    assert list(read_pairs(path, "info")) == [(f"{name}/n", "n", 1)]
    assert [key for _, key, _ in read_pairs(path, "")] == ["info", "data_type", "rate", "questions", "late"]
    assert [read_header(path, key) for key in ("data_type", "rate", "late", "info", "n")] == [
        "mscoco",
        0.5,
        7,
        None,
        None,
    ]


def test_items_and_pairs_of_a_file_that_is_otherwise(tmp_path):
    path = written(tmp_path / "f.json", VQA)
    for got in (
        list(read_items(path, "data")),
        list(read_items(path, "info")),
        list(read_items(path, "")),
    ):
        assert [(place, error.reason) for place, error in got] == [("f.json", "no records")]
    [(place, key, error)] = read_pairs(path, "questions")
    assert (place, key, error.reason) == ("f.json", "", "no records")
    assert error.detail.startswith("expected an object at questions")
    broken = written(tmp_path / "g.json", '{"data": {"x": 1, "y": 2, "z')
    assert [(key, getattr(value, "reason", value)) for _, key, value in read_pairs(broken, "data")] == [
        ("x", 1),
        ("y", 2),
        ("", "not JSON"),
    ]


def test_a_header_is_read_without_the_rest(tmp_path):
    path = written(tmp_path / "f.json", '{"a": 1, "data": [' + " " * 200_000 + "broken")
    assert read_header(path, "a") == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(
    st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=5), max_size=5),
    st.sampled_from([None, 1]),
)
def test_what_json_writes_is_read_as_json_reads_it(tmp_path_factory, records, indent):
    folder = tmp_path_factory.mktemp("json")
    as_list = written(folder / "f.json", json.dumps(records, indent=indent))
    as_lines = written(folder / "f.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    assert [record for _, record in read(as_list)] == records
    assert [record for _, record in read(as_lines)] == records


@given(
    st.binary(max_size=200),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "jsonl.gz", "json.zst", "parquet", "arrow", "tar", "tgz"]),
)
def test_any_bytes_give_records_or_reasons(tmp_path_factory, content, suffix):
    path = written(tmp_path_factory.mktemp("any") / f"f.{suffix}", content)
    for place, record in read_records(make_source("auto", (path,), on_broken="keep")):
        assert place.startswith(path.name)
        assert isinstance(record, dict | RecordError)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_one_changed_byte_of_a_shard_loses_nothing_in_silence(tmp_path_factory, position, value):
    content = bytearray(shard([(f"{number}.txt", b"text") for number in range(6)]))
    position %= 6 * 1024
    content[position] = value
    records = read(written(tmp_path_factory.mktemp("shard") / "s.tar", bytes(content)))
    assert len(records) == 6 or isinstance(records[-1][1], str) or any(isinstance(got, str) for _, got in records)


def test_fingerprint_is_of_the_content(tmp_path):
    def of(*paths, **settings):
        return fingerprint(make_source("auto", paths, **settings))

    first, second = written(tmp_path / "a.jsonl", "{}"), written(tmp_path / "sub" / "b.jsonl", "{}")
    assert len(of(first)) == 64
    assert of(first) == of(second)
    assert of(first) != of(first, second)
    assert of(first) != of(written(tmp_path / "c.jsonl", "{} "))
    archive = written(tmp_path / "images.zip", b"PK")
    with_archive = of(first, image_root=(archive,))
    assert with_archive != of(first) == of(first, image_root=(tmp_path,))
    written(archive, b"PKPK")
    assert with_archive != of(first, image_root=(archive,))
    assert of(first, image_root=(archive,)) == of(first, image_root=(archive / "inner",))


def test_fingerprint_of_a_local_hub_folder_changes_with_its_files(tmp_path):
    written(tmp_path / "set" / "train.jsonl", '{"a": 1}')
    before = fingerprint(make_source("auto", hub=str(tmp_path / "set")))
    written(tmp_path / "set" / "train.jsonl", '{"a": 2}')
    changed = fingerprint(make_source("auto", hub=str(tmp_path / "set")))
    (tmp_path / "set" / "train.jsonl").rename(tmp_path / "set" / "test.jsonl")
    assert len({before, changed, fingerprint(make_source("auto", hub=str(tmp_path / "set")))}) == 3


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_small_compressed_list_that_breaks_off(packing, tmp_path):
    words = [random.Random(number).randbytes(30).hex() for number in range(3)]
    packed = PACK[packing](json.dumps([{"a": word} for word in words]).encode())
    got = read(written(tmp_path / f"f.json{packing}", packed[:-12]))
    assert got[-1] == (f"f.json{packing}", "corrupt file")
    assert len(got) > (packing == ".gz")


def test_fingerprint_remembers_what_it_has_read(tmp_path, monkeypatch):
    path, cache = written(tmp_path / "a.jsonl", "{}"), tmp_path / "cache" / "digests.json"
    os.utime(path, ns=(0, time.time_ns() - 10**10))
    source = make_source("auto", (path,), on_broken="keep")
    plain = fingerprint(source)
    assert fingerprint(source, cache) == plain
    kept = json.loads(cache.read_text())
    assert list(kept) == [str(path.resolve())]
    size, changed, digest = kept[str(path.resolve())]
    assert digest == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of {}
    cache.write_text(json.dumps({str(path.resolve()): [size, changed, "0" * 64]}))
    assert fingerprint(source, cache) != plain  # so the file was not read
    os.utime(path, ns=(0, time.time_ns() - 2 * 10**10))
    assert fingerprint(source, cache) == plain
    for broken in ("", "[]", "{", '{"x": 1}', json.dumps({str(path.resolve()): "x"})):
        cache.write_text(broken)
        assert fingerprint(source, cache) == plain


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path):
    path, cache = written(tmp_path / "a.jsonl", "{}"), tmp_path / "digests.json"
    fingerprint(make_source("auto", (path,), on_broken="keep"), cache)
    assert json.loads(cache.read_text()) == {}
