"""JSON lines, CSV and TSV -> records, by hand; a line that is no record is one error."""

import gzip
import tracemalloc

import pytest
from data_files import DEEP, LINES, PACK, read, refusal, written
from sources import make_source

from finetune.data.formats.read_records import read_records


def test_jsonl(tmp_path):
    path = written(tmp_path / "f.jsonl", LINES)
    assert read(path) == [("f.jsonl:1", {"a": 1}), ("f.jsonl:4", {"a": "é"}), ("f.jsonl:5", {"a": [True, None]})]


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
def test_jsonl_broken_line(line, expected, tmp_path):
    """A broken line is one error, and the next line is read."""
    path = written(tmp_path / "f.jsonl", b'{"a": 0}\n' + line + b'\n{"a": 3}\n')
    first, second, third = read(path)
    assert (first, third) == (("f.jsonl:1", {"a": 0}), ("f.jsonl:3", {"a": 3}))
    assert second[0] == "f.jsonl:2"
    assert isinstance(second[1], dict) if expected is None else second[1] == expected


@pytest.mark.parametrize("packing", [*PACK])
def test_jsonl_line_too_long(packing, tmp_path, small_limit):
    """A line that is too long is passed over."""
    content = b'{"a": 1}\n' + b'{"a": "' + b"x" * 300_000 + b'"}\n{"a": 3}\n'
    path = written(tmp_path / f"f.jsonl{packing}", PACK[packing](content))
    assert [record for _, record in read(path)] == [{"a": 1}, "record too large", {"a": 3}]


def test_jsonl_line_at_limit(tmp_path, small_limit):
    line = '{"a": "' + "x" * (100_000 - 9) + '"}'
    assert len(line) == 100_000
    path = written(tmp_path / "f.jsonl", f"{line}\n{line[:-1]} }}\n")
    assert [got if isinstance(got, str) else len(got["a"]) for _, got in read(path)] == [99_991, "record too large"]


def test_jsonl_line_bomb(tmp_path):
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


def test_csv(tmp_path):
    path = written(tmp_path / "f.csv", '\ufeffa,b\r\n1,"x, ""y""\nz"\n\n,\n1,2,3\n1\n4,5\n')
    assert read(path) == [
        ("f.csv:2", {"a": "1", "b": 'x, "y"\nz'}),
        ("f.csv:5", {"a": "", "b": ""}),
        ("f.csv:6", "not CSV"),
        ("f.csv:7", "not CSV"),
        ("f.csv:8", {"a": "4", "b": "5"}),
    ]


def test_csv_broken_rows(tmp_path):
    path = written(tmp_path / "f.tsv", b'a\tb\n1\t\xff\n"x"y\t2\n3\t4\n5\t"never closed\n6\t7\n')
    assert read(path) == [
        ("f.tsv:2", "not UTF-8"),
        ("f.tsv:3", "not CSV"),
        ("f.tsv:4", {"a": "3", "b": "4"}),
        ("f.tsv", "not CSV"),
    ]


@pytest.mark.parametrize("stray", ['2,"stray\n', '2,"stray, and more\n'])
def test_csv_stray_quote(stray, tmp_path):
    """A quote that swallows lines makes an error of each of them."""
    path = written(tmp_path / "f.csv", f'a,b\n1,x\n{stray}3,x\n4,x\n5,"y" z\n6,x\n')
    assert read(path) == [
        ("f.csv:2", {"a": "1", "b": "x"}),
        *((f"f.csv:{line}", "not CSV") for line in (3, 4, 5, 6)),
        ("f.csv:7", {"a": "6", "b": "x"}),
    ]


def test_csv_unclosed_quote(tmp_path):
    """A quote that never closes says how much it hides."""
    lines = [f"{number},x\n" for number in range(98)]
    path = written(tmp_path / "f.csv", "".join(["a,b\n", *lines[:48], '48,"x\n', *lines[49:]]))
    message = refusal(read_records, make_source("auto", (path,)))
    assert message == (
        f"{path}: the file breaks off: not CSV: a quote opens in line 50 and never closes; "
        "48 records were read before, 51 % of the file was not read, from line 49 of 99 on\n"
        "  mend the file, or set `on_broken: keep` on this source to use what can be read"
    )


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends(end, tmp_path):
    rows = f'a,b{end}1,"x{end}y"{end}2,z{end}'
    assert read(written(tmp_path / "f.csv", rows)) == [
        ("f.csv:2", {"a": "1", "b": f"x{end}y"}),
        ("f.csv:4", {"a": "2", "b": "z"}),
    ]
    lines = f'{{"a": 1}}{end}{end}{{"a": 2}}{end}'
    assert read(written(tmp_path / "f.jsonl", lines)) == [("f.jsonl:1", {"a": 1}), ("f.jsonl:3", {"a": 2})]
    assert [record for _, record in read(written(tmp_path / "f.json", lines))] == [{"a": 1}, {"a": 2}]


def test_csv_bad_header(tmp_path):
    assert read(written(tmp_path / "f.csv", "a,a\n1,2\n")) == [("f.csv", "not CSV")]
    assert read(written(tmp_path / "g.csv", b"\xff\n1\n")) == [("g.csv", "not UTF-8")]


def test_csv_long_field(tmp_path):
    path = written(tmp_path / "f.csv", "a\n" + "x" * 500_000 + "\n")
    assert [len(record["a"]) for _, record in read(path)] == [500_000]
