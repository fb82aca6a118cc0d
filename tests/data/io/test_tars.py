"""webdataset shards -> records, by hand; damaged and hostile archives."""

import gzip
import tarfile

import pytest
import zstandard
from data_files import PNG, read, shard, written
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import images
from finetune.data.conversation import Image, Slice
from finetune.data.images import encoded
from finetune.data.io import byte_streams

SAMPLES = [
    ("a/000.jpg", PNG),
    ("a/000.txt", "été".encode()),
    ("a/001.json", b'{"question": "Who?", "n": [1]}'),
    ("a/001.seg.PNG", PNG + b"\0"),
    ("long" * 60 + "/ü.webp", PNG),
]


def test_shard_images_in_place(tmp_path):
    """The images of a plain shard are read where they lie."""
    path = written(tmp_path / "s.tar", shard(SAMPLES))
    records = read(path)
    assert [record_id for record_id, _ in records] == ["s.tar/a/000", "s.tar/a/001", "s.tar/" + "long" * 60 + "/ü"]
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
def test_shard_compressed(name, tmp_path):
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    path = written(tmp_path / name, pack(shard(SAMPLES)))
    (record_id, first), (_, second), (_, third) = read(path)
    assert record_id == f"{name}/a/000"
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
def test_shard_bad_samples(name, members, expected, tmp_path):
    content = shard([("0.txt", b"before"), *members, ("1.txt", b"after")])
    path = written(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    before, refused, after = read(path)
    assert (before, after) == (
        (f"{name}/0", {"__key__": "0", "txt": "before"}),
        (f"{name}/1", {"__key__": "1", "txt": "after"}),
    )
    assert refused == (f"{name}/{expected[0]}", expected[1])


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_shard_huge_text_costs_its_sample(name, tmp_path, monkeypatch):
    """Even if it is larger than any image may be."""
    monkeypatch.setattr(byte_streams, "MAX_RECORD_BYTES", 10)
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    content = shard([("0.txt", b"before"), ("k.json", b" " * 30), ("1.txt", b"after")])
    path = written(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert [one[1] for one in read(path)] == [
        {"__key__": "0", "txt": "before"},
        "record too large",
        {"__key__": "1", "txt": "after"},
    ]


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
def test_tar_hostile_headers(bomb, name, tmp_path):
    """A hostile header ends the archive, or is an error of its member."""
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
def test_shard_damaged(name, damage, tmp_path):
    """A damaged shard gives the samples before the damage."""
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


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_shard_one_changed_byte(tmp_path_factory, position, value):
    """One changed byte never loses a sample without an error."""
    content = bytearray(shard([(f"{number}.txt", b"text") for number in range(6)]))
    position %= 6 * 1024
    content[position] = value
    records = read(written(tmp_path_factory.mktemp("shard") / "s.tar", bytes(content)))
    assert len(records) == 6 or isinstance(records[-1][1], str) or any(isinstance(got, str) for _, got in records)
