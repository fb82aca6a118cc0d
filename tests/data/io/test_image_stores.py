"""Archives, JSON and Parquet files of images: what is found in them, and nothing outside; damaged and hostile ones."""

import base64
import os
import stat
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import (
    ARCHIVES,
    CAT,
    DOG,
    ENCODED,
    FILES,
    IDS,
    at_most,
    mistake,
    refusal,
    root_of,
    tarred,
    write_json_store,
    zipped,
)

from finetune.data.conversation import RecordError, Slice
from finetune.data.images import encoded, open_image
from modeling.errors import UserError


@pytest.mark.parametrize("name", [*ARCHIVES])
def test_archive_images_equal_files(name, folder, tmp_path):
    """Images in an archive equal the files, pixel for pixel."""
    plain, packed = root_of(folder), root_of(ARCHIVES[name](tmp_path / name))
    for reference, content in FILES.items():
        image = packed.image(reference)
        assert isinstance(image.source, Slice)
        assert image == packed.image(f"./{reference}") == packed.image(f"x/../{reference}")
        assert encoded(image) == content == encoded(plain.image(reference))
        pixels, expected = (np.asarray(open_image(each.image(reference))) for each in (packed, plain))
        assert pixels.std() > 10
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("name", [*ARCHIVES])
def test_folder_inside_archive(name, tmp_path):
    root = root_of(ARCHIVES[name](tmp_path / name) / "sub")
    assert encoded(root.image("dög.jpg")) == DOG
    assert refusal(root.image, "../cat.png") == "image outside the image root"
    assert refusal(root.image, "cat.png") == "missing image"


def test_link_in_archive_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    for name in ("soft.png", "hard.png"):
        assert refusal(root_of(tmp_path / "a.tar").image, name) == "not a file"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("soft.png")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/hostname")
    assert refusal(root_of(tmp_path / "a.zip").image, "soft.png") == "not a file"


@pytest.mark.parametrize(("indent", "ascii_only"), [(None, True), (2, False)])
def test_json_store(indent, ascii_only, tmp_path):
    root = root_of(write_json_store(tmp_path / "DC.json", indent, ascii_only))
    for name, content in IDS.items():
        if name:
            image = root.image(name) if "\\" not in name else root._stores[0].find(name)
            assert isinstance(image.source, Slice)
            assert encoded(image) == content
    assert refusal(root.image, "DC_2") == "missing image"


def test_json_store_escapes(tmp_path):
    escaped = ENCODED[:40] + "\\n" + ENCODED[40:].replace("/", "\\/")
    assert "\\/" in escaped
    path = tmp_path / "a.json"
    text = f'\ufeff {{ "a" : "{escaped}" ,\n"b":"data:image/png;base64,{ENCODED}"}}\n'
    path.write_text(text, encoding="utf-8")
    assert [encoded(root_of(path).image(name)) for name in "ab"] == [CAT, CAT]
    path.write_text("{}")
    assert refusal(root_of(path).image, "a") == "missing image"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"a": "x"',
        '{"a": {}}',
        '{"a": null}',
        '{"a": ["x"]}',
        '{"\\q": "x"}',
        '{"\n": "x"}',
        '{"a":' * 50000,
        '{"a": "x",}',
        '{"a": "x"} {}',
        '{"a": "x" "b": "y"}',
        '{"a',
        "{",
        '{"a": 1}',
    ],
    ids=lambda text: text[:12],
)
def test_json_store_damaged(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "expected {id: base64, ...}" in mistake(root_of(path).image, "a")


@pytest.mark.parametrize(
    ("names", "wrap"),
    [
        (("id", "image"), lambda content: content),
        (("id", "base64"), lambda content: base64.b64encode(content).decode()),
        (("image_id", "image"), lambda content: {"bytes": content, "path": None}),
        (("base64", "__index_level_0__"), None),
    ],
)
def test_parquet_store(names, wrap, tmp_path):
    columns = (
        {names[0]: [*IDS], names[1]: [wrap(content) for content in IDS.values()]}
        if wrap
        else {
            "base64": [base64.b64encode(content).decode() for content in IDS.values()],
            "__index_level_0__": [*IDS],
        }
    )
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    root = root_of(tmp_path / "a.parquet")
    assert [encoded(root.image(name)) for name in ("../x", "DC_1", "../x")] == [CAT, CAT, CAT]
    assert encoded(root._stores[0].find("")) == DOG
    assert refusal(root.image, "DC_2") == "missing image"


def test_parquet_store_bomb(tmp_path):
    """A thousand times the same two megabytes: a file of two megabytes, two gigabytes in memory."""
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(2 * 10**6)]))
    table = pa.table({"id": [str(number) for number in range(1000)], "image": large})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    message = mistake(root_of(tmp_path / "a.parquet").image, "7")
    assert message.startswith(f"{tmp_path}/a.parquet: a Parquet file that cannot be read: ")
    assert "\n" not in message


def test_parquet_store_ids_not_utf8(tmp_path):
    ids = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"id": ids, "image": [CAT]}), tmp_path / "a.parquet")
    message = mistake(root_of(tmp_path / "a.parquet").image, "7")
    assert "a Parquet file that cannot be read: not a row: In column 0: Invalid: Invalid UTF8" in message


def test_parquet_store_without_columns(tmp_path):
    pq.write_table(pa.table({"name": ["a"], "image": [None]}), tmp_path / "a.parquet")
    message = mistake(root_of(tmp_path / "a.parquet").image, "a")
    assert message.endswith(
        "expected a column of id or image_id or __index_level_0__ and one of image or base64, got name, image"
    )
    pq.write_table(pa.table({"id": ["a"], "image": pa.array([None], pa.binary())}), tmp_path / "b.parquet")
    assert refusal(root_of(tmp_path / "b.parquet").image, "a") == "corrupt image"


def test_zip_unsupported_members(tmp_path):
    zipped(tmp_path / "a.zip", method=zipfile.ZIP_LZMA)
    assert refusal(root_of(tmp_path / "a.zip").image, "cat.png") == "unknown compression"
    content = bytearray(zipped(tmp_path / "b.zip", {"cat.png": CAT}).read_bytes())
    flags = content.rindex(b"PK\1\2") + 8
    content[flags] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    assert refusal(root_of(tmp_path / "b.zip").image, "cat.png") == "encrypted image"


def rewritten(path, *changes):
    """A zip archive of cat.png whose index says something else: (place in its entry, format, value)."""
    content = bytearray(zipped(path, {"cat.png": CAT}, method=zipfile.ZIP_STORED).read_bytes())
    for place, kind, value in changes:
        struct.pack_into(f"<{kind}", content, content.rindex(b"PK\1\2") + place, value)
    path.write_bytes(content)
    return root_of(path)


def test_zip_false_index(tmp_path):
    path = tmp_path / "a.zip"
    assert encoded(rewritten(path).image("cat.png")) == CAT
    for offset in (7, 10**6, 2**32 - 2):
        assert refusal(rewritten(path, (42, "I", offset)).image, "cat.png") == "corrupt image"
    assert refusal(encoded, rewritten(path, (20, "I", 10**5)).image("cat.png")) == "corrupt image"
    for size in (10**9, 2**32 - 2):
        assert refusal(encoded, rewritten(path, (20, "I", size)).image("cat.png")) == "image too large"
    whole = rewritten(path, (24, "I", 2**32 - 2)).image("cat.png")  # unpacked size: nobody relies on it
    assert encoded(whole) == CAT
    assert "a zip archive that cannot be read" in mistake(rewritten(path, (0, "I", 0)).image, "cat.png")


def test_zip_false_zip64_sizes(tmp_path):
    content = zipped(tmp_path / "a.zip", {"cat.png": CAT}, method=zipfile.ZIP_STORED).read_bytes()
    start, at = content.index(b"PK\1\2"), content.rindex(b"PK\1\2")
    entry, end = content[at : content.rindex(b"PK\5\6")], content[content.rindex(b"PK\5\6") :]
    for sizes, expected in (((2**62, 2**62, 0), "image too large"), ((9, 9, 2**62), "corrupt image")):
        extra = struct.pack("<HHQQQ", 1, 24, *sizes)
        lying = bytearray(entry + extra)
        struct.pack_into("<II", lying, 20, 2**32 - 1, 2**32 - 1)
        struct.pack_into("<H", lying, 30, len(extra))
        struct.pack_into("<I", lying, 42, 2**32 - 1)
        ending = bytearray(end)
        struct.pack_into("<I", ending, 12, at - start + len(lying))
        (tmp_path / "b.zip").write_bytes(content[:at] + lying + ending)
        assert refusal(lambda: encoded(root_of(tmp_path / "b.zip").image("cat.png"))) == expected


def test_zip_huge_index(tmp_path):
    path = tmp_path / "a.zip"
    with path.open("wb") as file:
        file.truncate(3 * 10**9)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 29 * 10**8, 0, 0))
    with at_most(10**7):
        assert "an index of 2,900,000,000 bytes" in mistake(root_of(path).image, "cat.png")


def test_zip_overlapping_or_repeated_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (CAT, DOG):
            archive.writestr("same.png", content)
        archive.writestr("other.png", CAT)
        archive.filelist[2].header_offset = archive.filelist[1].header_offset  # both names, one place
        archive.filelist[2].compress_size = archive.filelist[1].compress_size
    root = root_of(tmp_path / "a.zip")
    assert encoded(root.image("same.png")) == encoded(root.image("other.png")) == DOG  # as unzip: the last one


ODD_NAMES = {
    "../out.png": DOG,
    "/abs.png": DOG,
    "sub/../cat.png": DOG,  # must not take the place of cat.png
    "cat.png": CAT,
    "./here//dot.png": CAT,
    "win\\dows.png": CAT,
    "..\\up.png": DOG,
    "folder/": b"",
}


@pytest.mark.parametrize("name", [*ARCHIVES])
def test_archive_odd_names(name, tmp_path):
    root = root_of(ARCHIVES[name](tmp_path / name, ODD_NAMES))
    assert encoded(root.image("cat.png")) == encoded(root.image("here/dot.png")) == CAT
    assert encoded(root.image("win\\dows.png")) == CAT
    if name.endswith(".zip"):  # only there do Windows' tools write backslashes for slashes
        assert encoded(root.image("win/dows.png")) == CAT
    for reference in ("out.png", "abs.png", "up.png", "etc/abs.png"):
        assert refusal(root.image, reference) == "missing image"
    for reference in ("../out.png", "/abs.png"):
        assert refusal(root.image, reference) == "image outside the image root"


def test_zip_names_utf8_without_flag(tmp_path):
    content = zipped(tmp_path / "a.zip", {"d\u00f6g.jpg": DOG}, method=zipfile.ZIP_STORED).read_bytes()
    unmarked = bytearray(content)
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.rindex(signature) + place
        unmarked[at + 1] &= ~8
    (tmp_path / "b.zip").write_bytes(unmarked)
    assert encoded(root_of(tmp_path / "b.zip").image("d\u00f6g.jpg")) == DOG
    marked = bytearray(content)
    marked[content.rindex(b"\xc3\xb6")] = 0xFF
    (tmp_path / "c.zip").write_bytes(marked)
    assert "a zip archive that cannot be read: 'utf-8' codec" in mistake(root_of(tmp_path / "c.zip").image, "a.png")


def tar_header(name, size, kind=b"0"):
    """A header as hostile as one likes: `size` are its 12 bytes."""
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + size + b"00000000000\0")
    head += b"        " + kind
    head += bytes(512 - len(head))
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def octal(number):
    return b"%011o\0" % number


def pax(text):
    return tar_header(b"x", octal(len(text)), b"x") + text.ljust(-len(text) % 512 + len(text), b"\0")


HOSTILE_TARS = {
    "negative": tar_header(b"a.png", b"\xff" * 11 + b"\xf0"),
    "minus one": tar_header(b"a.png", b"\xff" * 12),
    "no number": tar_header(b"a.png", b"zzzzzzzzzzz\0"),
    "beyond the end": tar_header(b"a.png", octal(10**6)),
    "huge": tar_header(b"a.png", b"\x80\0\0\0" + b"\x7f" * 8),
    "pax chain": pax(b"20 comment=aaaaaaaaa\n") * 3000,
    "pax without a length": pax(b"comment=a\n" + bytes(20)),
    "pax with a negative size": pax(b"11 size=-7\n") + tar_header(b"a.png", octal(7)) + bytes(512),
    "pax with words for a size": pax(b"12 size=abc\n") + tar_header(b"a.png", octal(7)) + bytes(512),
    "long names": tar_header(b"L", octal(512), b"L") * 2 + bytes(512),
    "long name of gigabytes": tar_header(b"L", b"\x80\0\0\0" + b"\0\0\0\x7f" + b"\xff" * 4, b"L"),
    "sparse": tar_header(b"a.png", octal(512), b"S") + b"zz" * 256,
    "pax sparse": pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n21 GNU.sparse.name=a\n")
    + tar_header(b"a.png", octal(512))
    + b"z" * 512,
    "damaged header": b"x" * 512,
}


@pytest.mark.parametrize("kind", [*HOSTILE_TARS])
@pytest.mark.parametrize("before", [0, 1])
def test_tar_false_headers(kind, before, tmp_path):
    good = tar_header(b"cat.png", octal(len(CAT))) + CAT.ljust(-len(CAT) % 512 + len(CAT), b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(before * good + HOSTILE_TARS[kind] + good + bytes(1024))
    with path.open("r+b") as file:
        file.truncate(10**8 + 10**6)  # sparse: reading to the end would show
    with at_most(5 * 10**7), pytest.raises(UserError) as caught:
        open_image(root_of(path).image("a.png"))
    if not isinstance(caught.value, RecordError):
        assert str(caught.value).startswith(f"{path}: a tar archive that cannot be read: ")
    else:
        assert caught.value.reason in ("missing image", "not a file", "corrupt image")


def test_tar_names_not_utf8(tmp_path):
    good = tar_header(b"cat.png", octal(len(CAT))) + CAT.ljust(-len(CAT) % 512 + len(CAT), b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(b"\xff\xfe.png", octal(0)) + good + bytes(1024))
    assert encoded(root_of(path).image("cat.png")) == CAT
    with pytest.raises(RecordError) as caught:
        root_of(path).image("\u00ff.png")
    assert str(caught.value).encode()


def test_zip_bomb(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as member,
    ):
        for _ in range(150):
            member.write(bytes(10**6))
    assert (tmp_path / "a.zip").stat().st_size < 10**6
    image = root_of(tmp_path / "a.zip").image("a.png")
    assert refusal(encoded, image) == refusal(open_image, image) == "image too large"


def test_zip_with_prefix(tmp_path):
    """As self-extracting archives have; their indexes count from the archive's own start."""
    zipped(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" * 7 + (tmp_path / "a.zip").read_bytes())
    assert encoded(root_of(tmp_path / "a.zip").image("cat.png")) == CAT


def test_archive_cut_after_indexing(tmp_path):
    root = root_of(tarred(tmp_path / "a.tar"))
    image = root.image("sub/flat.png")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    assert refusal(open_image, image) == "corrupt image"
    (tmp_path / "a.tar").unlink()
    assert refusal(open_image, image) == "missing image"
