"""Parquet and Arrow files that are hostile or odd: records, counted rows, or one reason, in bounded memory."""

import datetime
import random
import struct
from contextlib import contextmanager
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import PNG, read, written
from sources import make_source

from finetune.data.conversation import RecordError
from finetune.data.formats.read_records import read_records
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import BrokenFileError
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.parquet_arrow import read_parquet
from modeling.errors import UserError

ROWS = [
    {"image": {"bytes": PNG, "path": f"{number}.png"}, "texts": [{"user": "é"}], "n": number} for number in range(40)
]


def test_parquet_images_as_bytes(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "f.parquet", row_group_size=7)
    assert read(tmp_path / "f.parquet") == [(f"f.parquet#{number}", row) for number, row in enumerate(ROWS)]


def test_parquet_damaged_page(tmp_path):
    """A damaged page gives the rows before it."""
    table = pa.table({"n": list(range(3000)), "text": [f"text {number}" for number in range(3000)]})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=1000, use_dictionary=False, compression="zstd")
    start = pq.ParquetFile(tmp_path / "f.parquet").metadata.row_group(1).column(0).data_page_offset
    content = bytearray((tmp_path / "f.parquet").read_bytes())
    content[start : start + 200] = b"\xff" * 200
    *records, last = read(written(tmp_path / "f.parquet", bytes(content)))
    assert last == ("f.parquet", "corrupt file")
    assert 900 < len(records) <= 1000
    assert records[-1][1]["n"] == len(records) - 1


def test_parquet_damaged_page_in_a_part_names_the_rows_of_the_file(tmp_path):
    """Other parts read what follows, so that only the rest of this one is lost."""
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"n": list(range(60))}), path, row_group_size=10, use_dictionary=False, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(BrokenFileError) as caught:
        list(read_parquet(path, start=2, stop=5))
    assert caught.value.lost == "rows 30 to 49 of 60 were not read"


def test_arrow_bad_value(tmp_path):
    """A value that Python cannot represent is an error of its row."""
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
def test_arrow_file_and_stream(new, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, new(file, table.schema) as out:
        out.write_table(table, max_chunksize=9)
    assert read(tmp_path / "f.arrow") == [(f"f.arrow#{number}", row) for number, row in enumerate(ROWS)]


MB = 2**20


def detail(path):
    *_, (_, error) = read_records(make_source("auto", (path,), on_broken="keep"))
    return str(error)


def write_arrow(path, batches, new=pa.ipc.new_file, **options):
    settings = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as file, new(file, batches[0].schema, options=settings) as out:
        for batch in batches:
            out.write_batch(batch)
    return path


def write_parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


@contextmanager
def memory():
    """What Arrow allocates meanwhile, at most."""
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        yield pool.max_memory
    finally:
        pa.set_memory_pool(before)


def offsets(*values, form="i"):
    return struct.pack(f"<{len(values)}{form}", *values)


WORDS = pa.array(["t" * 33, "u" * 44])


PAIRS = pa.array([[("k", 1)] * 33, [("l", 2)] * 44], pa.map_(pa.string(), pa.int8()))


LISTS = pa.array([["t"] * 33, ["u"] * 44])


DICTIONARY = pa.DictionaryArray.from_arrays(pa.array([77, 33], pa.int32()), pa.array([str(n) for n in range(100)]))


VIEW = struct.pack("<i4sii", 50, b"aaaa", 0, 0)


HOSTILE = {
    "beyond the data": (WORDS, offsets(0, 33, 77), offsets(0, 33, 2**31 - 1)),
    "beyond by one": (WORDS, offsets(0, 33, 77), offsets(0, 33, 78)),
    "negative": (WORDS.cast(pa.binary()), offsets(0, 33, 77), offsets(-(2**30), 33, 77)),
    "falling": (WORDS, offsets(0, 33, 77), offsets(0, 77, 33)),
    "large text": (WORDS.cast(pa.large_string()), offsets(0, 33, 77, form="q"), offsets(0, 2**60, 77, form="q")),
    "list": (LISTS, offsets(0, 33, 77), offsets(0, 33, 10**9)),
    "large list": (
        LISTS.cast(pa.large_list(pa.string())),
        offsets(0, 33, 77, form="q"),
        offsets(0, -(2**40), 77, form="q"),
    ),
    "list in a struct": (pa.StructArray.from_arrays([LISTS], ["y"]), offsets(0, 33, 77), offsets(0, 33, 10**9)),
    "map": (
        pa.array([[("k", 1)] * 33, [("l", 2)] * 44], pa.map_(pa.string(), pa.int8())),
        offsets(0, 33, 77),
        offsets(0, 99, 77),
    ),
    "dictionary index": (DICTIONARY, offsets(77, 33), offsets(77, 2**31 - 1)),
    "negative index": (DICTIONARY, offsets(77, 33), offsets(-77, 33)),
    "view beyond its buffer": (pa.array(["a" * 50], pa.string_view()), VIEW, VIEW[:12] + offsets(2**30)),
    "view of no buffer": (pa.array(["a" * 50], pa.string_view()), VIEW, VIEW[:8] + offsets(7, 0)),
    "more rows than numbers": (pa.array(range(77)), offsets(77, form="q"), offsets(10**6, form="q")),
    "more rows than texts": (pa.array(["t"] * 177), offsets(177, form="q"), offsets(10**6, form="q")),
    "fewer than no rows": (pa.array(["t"] * 177), offsets(177, form="q"), offsets(-177, form="q")),
}


def write_hostile(path, name, new=pa.ipc.new_file, before=()):
    array, right, wrong = HOSTILE[name]
    write_arrow(path, [*before, pa.record_batch({"x": array})], new)
    content = path.read_bytes()
    assert right in content
    path.write_bytes(content.replace(right, wrong))
    return path


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
@pytest.mark.parametrize("name", HOSTILE)
def test_arrow_offsets_outside(name, new, tmp_path):
    """An offset that leads outside the batch ends the file."""
    assert read(write_hostile(tmp_path / "f.arrow", name, new)) == [("f.arrow", "corrupt file")]


def test_arrow_damaged_batch(tmp_path):
    """The batches before the damage are kept."""
    before = [pa.record_batch({"x": pa.array([word])}) for word in ("one", "two")]
    path = write_hostile(tmp_path / "f.arrow", "falling", before=before)
    assert read(path) == [
        ("f.arrow#0", {"x": "one"}),
        ("f.arrow#1", {"x": "two"}),
        ("f.arrow", "corrupt file"),
    ]
    assert "2 records were read before, " in detail(path)
    assert " % of the file was not read, from byte " in detail(path)


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream], ids=["file", "stream"])
def test_arrow_cut(new, tmp_path):
    """Wherever it was cut; a stream may also end after a batch."""
    words = ["one", "two", "three"]
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": pa.array([word])}) for word in words], new)
    content = path.read_bytes()
    ends = {}
    for size in range(0, len(content), 8):
        path.write_bytes(content[:size])
        got = [record if isinstance(record, str) else record["x"] for _, record in read(path)]
        whole = [word for word in got if word in words]
        assert whole == words[: len(whole)]
        assert got[len(whole) :] in (["corrupt file"], [])
        ends.setdefault(len(whole), []).append(len(got) - len(whole))
    if new is pa.ipc.new_file:
        assert all(min(broken) == 1 for broken in ends.values())
    else:
        assert [broken.count(0) for broken in ends.values()][:3] == [1, 1, 1]


@pytest.mark.parametrize("rows", [10**6 + 2**20, 10**12, 2**62])
@pytest.mark.parametrize("kind", [pa.null(), pa.struct([]), pa.list_(pa.null(), 0)], ids=str)
def test_arrow_rows_of_nothing(rows, kind, tmp_path):
    children = [pa.nulls(0)] if pa.types.is_fixed_size_list(kind) else []
    array = pa.nulls(77) if kind == pa.null() else pa.Array.from_buffers(kind, 77, [None], 0, 0, children)
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": array})])
    path.write_bytes(path.read_bytes().replace(offsets(77, form="q"), offsets(rows, form="q")))
    assert path.stat().st_size < 1000
    assert read(path) == [("f.arrow", "corrupt file")]


def test_arrow_lists_of_nothing(tmp_path):
    """A row of two thousand million nulls, in a kilobyte."""
    bomb = pa.ListArray.from_arrays(pa.array([0, 2, 77, 77], pa.int32()), pa.nulls(77))
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": bomb})])
    content = path.read_bytes().replace(offsets(2, 77, 77), offsets(2, 2**31 - 1, 2**31 - 1))
    path.write_bytes(content.replace(offsets(77, form="q"), offsets(2**31 - 1, form="q")))
    assert path.stat().st_size < 2000
    assert read(path) == [
        ("f.arrow#0", {"x": [None, None]}),
        ("f.arrow#1", "record too large"),
        ("f.arrow#2", {"x": []}),
    ]


@pytest.fixture
def small(monkeypatch):
    """Sixteen times smaller limits, so that bombs are small too."""
    monkeypatch.setattr(byte_streams, "MAX_RECORD_BYTES", 4 * MB)


def shown(path):
    """Rows by the length of their first value."""
    return [got if isinstance(got, str) else len(next(iter(got.values()))) for _, got in read(path)]


@pytest.mark.parametrize("packing", ["zstd", "lz4"])
@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string(), pa.string_view()], ids=str)
def test_arrow_large_cell(packing, kind, tmp_path, small):
    cells = [["a"], ["x" * (32 * MB)]]
    batches = [pa.record_batch({"x": pa.array(cell).cast(kind)}) for cell in cells]
    path = write_arrow(tmp_path / "f.arrow", batches, compression=packing)
    del batches, cells
    assert path.stat().st_size < 200_000
    with memory() as most:
        assert read(path)[1:] == [("f.arrow", "record too large")]
        assert most() < 2 * MB
    plain = write_arrow(tmp_path / "g.arrow", [pa.record_batch({"x": pa.array(["a", "x" * (5 * MB), "b"])})])
    assert shown(plain) == [1, "record too large", 1]


@pytest.mark.parametrize("nested", [False, True])
def test_arrow_repeated_dictionary(nested, tmp_path, small):
    """A megabyte once in the file, and a hundred times in a row."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 100 + [1], pa.int32()), pa.array(["x" * MB, "y"]))
    if nested:
        array = pa.ListArray.from_arrays(pa.array([0, 100, 101], pa.int32()), words)
        path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": array})])
        assert read(path) == [("f.arrow#0", "record too large"), ("f.arrow#1", {"x": ["y"]})]
    else:
        path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": words})])
        assert shown(path) == [MB] * 100 + [1]


def test_arrow_repeated_view(tmp_path, small):
    view = struct.pack("<i4sii", MB, b"xxxx", 0, 0)
    buffers = [None, pa.py_buffer(view * 1000), pa.py_buffer(b"x" * MB)]
    views = pa.Array.from_buffers(pa.string_view(), 1000, buffers, 0)
    array = pa.ListArray.from_arrays(pa.array([0, 1, 1000], pa.int32()), views)
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": array})])
    assert [got if isinstance(got, str) else len(got["x"]) for _, got in read(path)] == [1, "record too large"]


@pytest.mark.parametrize("packing", ["zstd", "snappy", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_large_cell(packing, dictionary, tmp_path, small):
    table = {"x": ["a", "b", "x" * (40 * MB)], "n": [{"y": ["z"]}] * 3}
    path = write_parquet(
        tmp_path / "f.parquet", table, compression=packing, use_dictionary=dictionary, row_group_size=2
    )
    del table
    assert path.stat().st_size < 6 * MB
    with memory() as most:
        assert read(path) == [
            ("f.parquet#0", {"x": "a", "n": {"y": ["z"]}}),
            ("f.parquet#1", {"x": "b", "n": {"y": ["z"]}}),
            ("f.parquet", "record too large"),
        ]
        assert most() < 8 * MB
    assert "2 records were read before, 33 % of the file was not read, from row 2 of 3 on" in detail(path)


@pytest.mark.parametrize("nested", ["flat", "list", "struct", "list of structs"])
def test_parquet_repeated_dictionary(nested, tmp_path, monkeypatch):
    """A megabyte once in the file, in thirty-two rows, or a hundred times in each of them."""
    monkeypatch.setattr(byte_streams, "MAX_RECORD_BYTES", 2 * MB)
    cell = "x" * MB
    rows = {
        "flat": [cell] * 32,
        "list": [[cell] * 100] * 2 + [["y"]],
        "struct": [{"z": cell}] * 32,
        "list of structs": [[{"z": cell}] * 100] * 2 + [[{"z": "y"}]],
    }[nested]
    path = write_parquet(tmp_path / "f.parquet", {"x": rows}, compression="zstd", dictionary_pagesize_limit=8 * MB)
    assert path.stat().st_size < 50_000
    with memory() as most:
        got = [record for _, record in read(path)]
        assert most() < 20 * MB
    if nested.startswith("list"):
        assert got == ["record too large"] * 2 + [{"x": ["y"] if nested == "list" else [{"z": "y"}]}]
    else:
        assert [len(row["x"] if nested == "flat" else row["x"]["z"]) for row in got] == [MB] * 32


def test_parquet_lists_of_millions(tmp_path):
    values = pa.array([7], pa.int8()).take(pa.array([0] * 20_000_000, pa.int32()))
    array = pa.ListArray.from_arrays(pa.array([0, 20_000_000], pa.int32()), values)
    path = write_parquet(tmp_path / "f.parquet", {"x": array})
    del values, array
    assert path.stat().st_size < 50_000
    with memory() as most:
        assert read(path) == [("f.parquet", "record too large")]
        assert most() < MB


def test_parquet_images_in_large_pages(tmp_path, small):
    """Pages of more than a record, of which each value is less, as older writers made them."""
    images = [bytes([number]) * 10 + random_bytes(number) for number in range(20)]
    path = write_parquet(
        tmp_path / "f.parquet", {"x": images}, use_dictionary=False, data_page_size=64 * MB, compression="snappy"
    )
    assert [got["x"] for _, got in read(path)] == images


def random_bytes(seed):

    return random.Random(seed).randbytes(MB)


@pytest.mark.parametrize("size", [4, 60, 400])
def test_parquet_cut_or_changed(size, tmp_path):
    path = write_parquet(tmp_path / "f.parquet", {"x": ["text"] * 100})
    content = path.read_bytes()
    path.write_bytes(content[:-size])
    assert read(path) == [("f.parquet", "corrupt file")]


def test_table_with_equal_column_names(tmp_path):
    batch = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    assert read(write_arrow(tmp_path / "f.arrow", [batch])) == [("f.arrow", "not a table")]
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "f.parquet")
    assert read(tmp_path / "f.parquet") == [("f.parquet", "not a table")]


ZONED = pa.timestamp("us", "Nowhere/Atlantis")


ODD = [
    (pa.array([datetime.date(2024, 2, 29)]), datetime.date(2024, 2, 29)),
    (pa.array([Decimal("1.50")]), Decimal("1.50")),
    (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), [("a", 1)]),
    (pa.array([2**62], pa.timestamp("s")), "not a row"),
    (pa.array([0], pa.int64()).cast(ZONED), "not a row"),
    (pa.array([10**18], pa.date64()), "not a row"),
    (pa.array([None], pa.null()), None),
    (pa.array([1.5], pa.float16()), 1.5),
    (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), [1, 2]),
    (pa.array(["a"]).dictionary_encode(), "a"),
    (pa.array(["view that is long"], pa.string_view()), "view that is long"),
    (pa.array(['{"a": 1}'], pa.string()).cast(pa.json_()), '{"a": 1}'),
    (pa.array([b"\xff"]).view(pa.string()), "not a row"),
    (pa.array([[b"\xff"]]).cast(pa.list_(pa.binary())).view(pa.list_(pa.string())), "not a row"),
]


@pytest.mark.parametrize(("array", "value"), ODD, ids=lambda value: str(getattr(value, "type", ""))[:30])
def test_table_odd_types(array, value, tmp_path):
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": array})])
    expected = value if value == "not a row" else {"x": value}
    assert read(path) == [("f.arrow#0", expected)]


@pytest.mark.parametrize(
    "array",
    [
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
        pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["a"])),
        pa.array([["a"]], pa.list_view(pa.string())),
        pa.array([{"y": [["a"]]}], pa.struct({"y": pa.list_(pa.large_list_view(pa.string()))})),
    ],
    ids=lambda array: str(array.type)[:20],
)
def test_arrow_refused_types(array, tmp_path):
    """A type with which few bytes mean any number of values is refused."""
    path = write_arrow(tmp_path / "f.arrow", [pa.record_batch({"x": array})])
    assert read(path) == [("f.arrow", "unknown type")]
    assert "column x is of type " in detail(path)


def test_parquet_contradicting_footer(tmp_path):
    """pyarrow calls abort() where it is asked for a column with counts of levels that it does not have."""
    path = write_parquet(tmp_path / "f.parquet", {"x": [["a"]] * 3}, use_dictionary=False, compression="none")
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for at in range(start, start + 200):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert all(isinstance(record, dict | str) for _, record in read(path))


def test_parquet_encrypted(tmp_path):
    path = write_parquet(tmp_path / "f.parquet", {"x": ["a"]})
    content = path.read_bytes()
    path.write_bytes(content[:-4] + b"PARE")
    assert read(path) == [("f.parquet", "corrupt file")]


def test_damaged_table_is_a_user_error(tmp_path):
    path = write_hostile(tmp_path / "f.arrow", "falling")
    with pytest.raises(UserError, match=r"f\.arrow: the file breaks off: corrupt file: .*\n  mend the file, or set"):
        list(read_records(make_source("auto", (path,))))


@pytest.mark.parametrize("packing", ["zstd", "none"])
def test_parquet_bomb_as_image_root(packing, tmp_path, small):
    """A cell larger than a record, and a megabyte that a hundred rows repeat, in one row group."""
    cells = ["a" * MB] * 100 + ["b" * (5 * MB)] if packing == "none" else ["c" * (40 * MB)]
    path = write_parquet(
        tmp_path / "s.parquet",
        {"id": [str(number) for number in range(len(cells))], "image": cells},
        compression=packing,
        dictionary_pagesize_limit=8 * MB,
    )
    del cells
    root = ImageRoot(make_source("messages", (path,), image_root=(path,)))
    with memory() as most:
        if packing == "none":
            assert len(root.image("7").source) == MB * 3 // 4  # "aaaa" is base64
            with pytest.raises(RecordError, match="record too large"):
                root.image("100")
        else:
            with pytest.raises(UserError, match="cannot be read: record too large: column image: 1 values of "):
                root.image("0")
        assert most() < 70 * MB
