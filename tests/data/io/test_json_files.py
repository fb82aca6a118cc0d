"""JSON files -> records and values, by hand; what is too large, too deep or broken."""

import json
import math
import tracemalloc

import pytest
from data_files import DEEP, PACK, read, written
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.io import byte_streams
from finetune.data.io.json_files import read_header, read_items, read_pairs

TWO = [("f.json#0", {"a": 1}), ("f.json#1", {"b": [{}, "x"]})]


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"b": [{}, "x"]}]',
        '{"meta": {"data": [7]}, "data": [{"a": 1}, {"b": [{}, "x"]}], "after": 1}',
        '{"test": [{"c": 1}], "train": [{"a": 1}, {"b": [{}, "x"]}]}',
        '\ufeff[{"a": 1}, {"b": [{}, "x"]}]',
    ],
)
def test_json_list_anywhere(text, tmp_path):
    """The list of records is found at the top, under a known key, or under the split's name."""
    assert read(written(tmp_path / "f.json", text)) == TWO


def test_json_holds_lines(tmp_path):
    path = written(tmp_path / "f.json", '{"data": [{"a": 1}]}\n{"data": []}\n{"data": \n')
    assert read(path) == [("f.json:1", {"data": [{"a": 1}]}), ("f.json:2", {"data": []}), ("f.json:3", "not JSON")]


def test_json_one_object(tmp_path):
    """One object is one record."""
    path = written(tmp_path / "f.json", '{"messages": [{"role": "user"}],\n "data": "no list"}\n')
    assert read(path) == [("f.json#0", {"messages": [{"role": "user"}], "data": "no list"})]


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
def test_json_broken_list(tail, reason, tmp_path):
    """A broken list gives the records before the damage."""
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
def test_json_bad_item(item, reason, tmp_path):
    """An item that is no record is one error, and the next item is read."""
    path = written(tmp_path / "f.json", b'[{"a": 0}, ' + item + b', {"a": 2}]')
    assert read(path) == [("f.json#0", {"a": 0}), ("f.json#1", reason), ("f.json#2", {"a": 2})]


def test_json_nan(tmp_path):
    """In a list as in lines, also where a window of the reader ends."""
    values = [math.inf, -math.inf, 1e999, math.nan, 0.5] * 5000
    as_list = read(written(tmp_path / "f.json", json.dumps([{"a": value} for value in values])))
    as_lines = read(written(tmp_path / "f.jsonl", "\n".join(json.dumps({"a": value}) for value in values)))
    assert [repr(record["a"]) for _, record in as_list] == ["inf", "-inf", "inf", "nan", "0.5"] * 5000
    assert [repr(record) for _, record in as_lines] == [repr(record) for _, record in as_list]
    assert read(written(tmp_path / "g.json", '[{"a": 1e999}]')) == [("g.json#0", {"a": math.inf})]


def test_json_oddities(tmp_path):
    path = written(tmp_path / "f.json", '[{"a": 1, "a": 2}, {"a": "\\ud800"}, {"a": 1e5, "b": -0.5}]')
    records = [record for _, record in read(path)]
    assert records[0] == {"a": 2}
    assert isinstance(records[1]["a"], str)
    assert records[2] == {"a": 1e5, "b": -0.5}
    assert type(records[2]["a"]) is float


@pytest.mark.parametrize(
    "large", [{"a": ["x" * 1000] * 300}, {"a": "x" * 300_000}, {"a": "\\]}" * 50_000}, {"a": {"[" * 300_000: 1}}]
)
def test_json_item_too_large(large, tmp_path, small_limit):
    """An item that is too large is passed over."""
    path = written(tmp_path / "f.json", json.dumps([{"a": 1}, large, {"a": 3}]))
    assert read(path) == [("f.json#0", {"a": 1}), ("f.json#1", "record too large"), ("f.json#2", {"a": 3})]


def test_json_large_item_among_small_ones(tmp_path):
    items = [{"a": 1}, {"a": "ü" * 250_000}, {"a": ["x", {}] * 50_000}, {"a": 4}]
    path = written(tmp_path / "f.json", json.dumps(items, ensure_ascii=False))
    assert [record for _, record in read(path)] == items


@pytest.mark.parametrize("empty", ["[]", "{}", "0", '["]"]', "[[[[[]]]]]"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_bomb_of_empty_lists(empty, suffix, tmp_path, monkeypatch):
    """Empty lists take thirty times their text in Python."""
    monkeypatch.setattr(byte_streams, "MAX_VALUES", 20_000)
    bomb = '{"a": [' + ",".join([empty] * 30_000) + "]}"
    lines = ['{"a": 0}', bomb, '{"a": [[[[], {"b": "]"}]]]}']
    path = written(tmp_path / f"f.{suffix}", f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines))
    tracemalloc.start()
    got = [record for _, record in read(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == [{"a": 0}, "record too large", {"a": [[[[], {"b": "]"}]]]}]
    assert peak < 3e6


def test_json_many_commas(tmp_path):
    """A record may have many commas in its text."""
    record = {"a": ", " * 1_100_000}
    assert read(written(tmp_path / "f.json", json.dumps([record]))) == [("f.json#0", record)]
    assert read(written(tmp_path / "f.jsonl", json.dumps(record))) == [("f.jsonl:1", record)]


def test_json_long_list(tmp_path, small_limit):
    """A long list of small items is not too large."""
    path = written(
        tmp_path / "f.json", json.dumps({"other": [{"b": "y" * 50}] * 5000, "data": [{"a": "x" * 50}] * 5000})
    )
    assert len([record for _, record in read(path) if record == {"a": "x" * 50}]) == 5000


VQA = '{"info": {"n": 1}, "data_type": "mscoco", "rate": 0.5, "questions": [{"id": 1}, 2, {"id": 3}], "late": 7}'


@pytest.mark.parametrize("packing", [*PACK])
def test_json_items_pairs_headers(packing, tmp_path):
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


def test_json_items_of_another_shape(tmp_path):
    path = written(tmp_path / "f.json", VQA)
    for got in (
        list(read_items(path, "data")),
        list(read_items(path, "info")),
        list(read_items(path, "")),
    ):
        assert [(record_id, error.reason) for record_id, error in got] == [("f.json", "no records")]
    [(record_id, key, error)] = read_pairs(path, "questions")
    assert (record_id, key, error.reason) == ("f.json", "", "no records")
    assert error.detail.startswith("expected an object at questions")
    broken = written(tmp_path / "g.json", '{"data": {"x": 1, "y": 2, "z')
    assert [(key, getattr(value, "reason", value)) for _, key, value in read_pairs(broken, "data")] == [
        ("x", 1),
        ("y", 2),
        ("", "not JSON"),
    ]


def test_json_header_stops_early(tmp_path):
    """A header is read without the rest of the file."""
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
def test_json_roundtrip(tmp_path_factory, records, indent):
    """What json writes is read as json reads it."""
    folder = tmp_path_factory.mktemp("json")
    as_list = written(folder / "f.json", json.dumps(records, indent=indent))
    as_lines = written(folder / "f.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    assert [record for _, record in read(as_list)] == records
    assert [record for _, record in read(as_lines)] == records
