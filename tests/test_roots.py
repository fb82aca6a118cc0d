"""References -> images: from every kind of root, and never from anywhere else."""

import base64
import io
import json
import pickle
import stat
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.dialogue import Image, RecordError, Remote, Slice
from finetune.data.images import encoded, open_image
from finetune.data.sources.roots import ImageRoot
from finetune.data.sources.source import Source
from modeling.errors import UserError


def picture(seed, extension="PNG"):
    file = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(file, extension)
    return file.getvalue()


CAT, DOG = picture(1), picture(2, "JPEG")
FILES = {"cat.png": CAT, "sub/dög.jpg": DOG, "sub/flat.png": CAT + b"\0" * 5000}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "secret.png").write_bytes(CAT)
    return tmp_path / "images"


def root_of(*paths, **settings):
    return ImageRoot(Source("auto", image_root=paths, **settings))


def refusal(function, *arguments):
    with pytest.raises(RecordError) as caught:
        function(*arguments)
    return caught.value.reason


def mistake(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert not isinstance(caught.value, RecordError)
    return str(caught.value)


def zipped(path, files=FILES, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("sub")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path, files=FILES, kind="w"):
    with tarfile.open(path, kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


ARCHIVES = {
    "stored.zip": zipped,
    "deflated.zip": lambda path, files=FILES: zipped(path, files, zipfile.ZIP_DEFLATED),
    "plain.tar": tarred,
}


@pytest.mark.parametrize("name", [*ARCHIVES])
def test_images_in_an_archive_equal_the_files_pixel_for_pixel(name, folder, tmp_path):
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
def test_a_folder_inside_an_archive(name, tmp_path):
    root = root_of(ARCHIVES[name](tmp_path / name) / "sub")
    assert encoded(root.image("dög.jpg")) == DOG
    assert refusal(root.image, "../cat.png") == "image outside the image root"
    assert refusal(root.image, "cat.png") == "missing image"


def test_several_roots_are_searched_in_order(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "cat.png").write_bytes(DOG)
    (other / "new.png").write_bytes(DOG)
    archive = zipped(tmp_path / "a.zip", {"last.png": DOG, "cat.png": DOG})
    root = root_of(folder, other, archive)
    assert root.image("cat.png") == Image(folder / "cat.png")
    assert root.image("new.png") == Image(other / "new.png")
    assert root.image(str(other / "new.png")) == Image(other / "new.png")
    assert encoded(root.image("last.png")) == DOG
    assert root.image("none.png") == Image(folder / "none.png")
    assert refusal(root_of(archive, folder).image, "none.png") == "missing image"


def test_the_default_root_is_the_folder_of_the_first_path(folder, tmp_path):
    for path in (tmp_path / "a.jsonl", tmp_path, tmp_path / "*.jsonl"):
        assert ImageRoot(Source("auto", (path,))).image("images/cat.png") == Image(folder / "cat.png")
    assert ImageRoot(Source("auto", hub=str(tmp_path))).image("images/cat.png") == Image(folder / "cat.png")
    assert refusal(ImageRoot(Source("text")).image, "cat.png") == "missing image"


OUTSIDE = [
    "../secret.png",
    "sub/../../secret.png",
    "/etc/hostname",
    "..",
    "//host/cat.png",
    "out.png",
    "outdir/secret.png",
]


@pytest.mark.parametrize("reference", OUTSIDE)
def test_nothing_outside_of_a_folder_is_reached(reference, folder, tmp_path):
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "outdir").symlink_to(tmp_path)
    assert refusal(root_of(folder).image, reference) == "image outside the image root"


@pytest.mark.parametrize("name", [*ARCHIVES])
@pytest.mark.parametrize("reference", OUTSIDE[:5])
def test_nothing_outside_of_an_archive_is_reached(reference, name, tmp_path):
    files = {**FILES, "../secret.png": CAT, "/etc/hostname": CAT}
    assert refusal(root_of(ARCHIVES[name](tmp_path / name, files)).image, reference) == "image outside the image root"


def test_a_link_inside_of_the_folder_is_followed(folder):
    (folder / "link.png").symlink_to("cat.png")
    assert root_of(folder).image("link.png") == Image(folder / "cat.png")
    (folder / "loop.png").symlink_to("loop.png")
    assert refusal(lambda: open_image(root_of(folder).image("loop.png"))) in ("not an image reference", "corrupt image")


def test_links_in_archives_are_no_images(tmp_path):
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


@pytest.mark.parametrize(
    "reference",
    [
        None,
        7,
        "",
        [],
        {},
        {"path": None},
        {"bytes": None},
        {"bytes": [1]},
        {"url": "x"},
        1.5,
        True,
        "a\0b",
        "\ud800.png",
    ],
    ids=repr,
)
def test_what_names_no_image(reference, folder, tmp_path):
    for root in (root_of(folder), root_of(zipped(tmp_path / "a.zip"))):
        assert refusal(root.image, reference) == "not an image reference"


@pytest.mark.parametrize("reference", ["sub\\flat.png", "C:\\cat.png", "..\\secret.png", "\\\\host\\cat.png"])
def test_windows_paths_are_told(reference, folder):
    assert refusal(root_of(folder).image, reference) == "not an image reference"


def test_a_name_that_is_too_long(folder):
    assert refusal(lambda: open_image(root_of(folder).image("x" * 5000))) in ("not an image reference", "corrupt image")


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "FILE:/etc/hostname", "ftp://a.b/c.png", "s3://a/b.png", "gs://a/b", "ftp:x"]
)
@pytest.mark.parametrize("settings", [{}, {"download": True, "download_http": True}])
def test_other_schemes_are_never_followed(url, settings, folder):
    assert refusal(root_of(folder, **settings).image, url) == "image is a URL"


def test_urls_are_followed_as_far_as_the_source_allows(folder):
    plain, secure = "http://a.b/c.png", "HTTPS://a.b/c.png"
    for settings in ({}, {"download_http": True}):
        assert [refusal(root_of(folder, **settings).image, url) for url in (plain, secure)] == ["image is a URL"] * 2
    assert root_of(folder, download=True).image(secure) == Image(Remote(secure))
    assert refusal(root_of(folder, download=True).image, plain) == "image is a URL"
    assert root_of(folder, download=True, download_http=True).image(plain) == Image(Remote(plain))


def test_images_that_are_there_already(folder):
    root, held = root_of(folder), PIL.Image.new("RGB", (2, 2))
    place = Slice(folder / "cat.png", 0, 9)
    assert root.image(CAT) == root.image({"bytes": CAT, "path": "../x.png"}) == Image(CAT)
    assert (
        root.image({"bytes": None, "path": "cat.png"}) == root.image({"path": "cat.png"}) == Image(folder / "cat.png")
    )
    assert refusal(root.image, {"bytes": None, "path": "../secret.png"}) == "image outside the image root"
    assert root.image(held).source is held
    assert root.image(place) == Image(place)


ENCODED = base64.b64encode(CAT).decode()


def test_data_urls(folder):
    root = root_of(folder)
    for head in ("data:image/png;base64,", "DATA:image/PNG;charset=utf-8;base64,"):
        assert root.image(head + ENCODED) == Image(CAT)
    for wrong in ("data:text/html;base64,", "data:image/png,", "data:,", "data:image/png;base64;"):
        assert refusal(root.image, wrong + ENCODED) == "not an image reference"
    assert refusal(root.image, "data:image/png;base64,iVBOR!") == "corrupt image"


def test_base64(folder):
    root = root_of(folder)
    lines = base64.encodebytes(CAT).decode()
    assert lines.count("\n") > 2
    assert root.base64(ENCODED) == root.base64(lines) == root.base64(f" {ENCODED}\r\n\t") == Image(CAT)
    for wrong in ("iVBOR!", "abc", "abcde", "é" * 4, "ab=c", "-_-_", None, 7, b"abcd"):
        assert refusal(root.base64, wrong) == "corrupt image"


def test_names_made_of_a_records_fields(folder):
    root = root_of(folder)
    assert root.named({"image_id": 9}, "COCO_{image_id:012d}.jpg") == Image(folder / "COCO_000000000009.jpg")
    assert root.named({"image_id": "9"}, "{image_id:03d}.jpg") == Image(folder / "009.jpg")
    assert root.named({"a": "sub", "b": "x"}, "{a}/{b}_{b}{{}}.jpg") == Image(folder / "sub" / "x_x{}.jpg")
    assert root_of(folder, image_name="{id}.png").named({"id": "cat"}, "{never}") == Image(folder / "cat.png")
    assert refusal(root.named, {"id": "../../secret"}, "{id}.png") == "image outside the image root"
    assert refusal(root.named, {"id": "https://x"}, "{id}.png") == "image is a URL"


@pytest.mark.parametrize("record", [{}, {"id": None}, {"id": [1]}, {"id": True}, {"id": 1.5}, {"id": "x"}, {"id": "²"}])
def test_fields_that_make_no_name(record, folder):
    with pytest.raises(RecordError) as caught:
        root_of(folder).named(record, "{id:05d}.png")
    assert caught.value.reason == "no image name"
    assert "'id'" in caught.value.detail


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{}", "{0}", "{a", "a}", "{a:{b}}", "{a.__class__}", "{a:qq}", "{ a }"]
)
def test_a_template_that_is_none_is_the_users_mistake(template, folder):
    message = mistake(lambda: root_of(folder, image_name=template))
    assert message.startswith("image_name: expected a name such as {image_id:012d}.jpg, got ")


IDS = {"DC_1": CAT, 'q"\\é': DOG, "../x": CAT, "": DOG}


def store(path, indent=None, ascii_only=True):
    content = {name: base64.b64encode(value).decode() for name, value in IDS.items()}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    return path


@pytest.mark.parametrize(("indent", "ascii_only"), [(None, True), (2, False)])
def test_mimic_it_images_lie_in_json(indent, ascii_only, tmp_path):
    root = root_of(store(tmp_path / "DC.json", indent, ascii_only))
    for name, content in IDS.items():
        if name:
            image = root.image(name) if "\\" not in name else root._stores[0].find(name)
            assert isinstance(image.source, Slice)
            assert encoded(image) == content
    assert refusal(root.image, "DC_2") == "missing image"


def test_mimic_it_json_as_other_writers_escape_it(tmp_path):
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
    ["", "[]", '{"a": "x"', '{"a": {}}', '{"a": "x",}', '{"a": "x"} {}', '{"a": "x" "b": "y"}', '{"a', "{", '{"a": 1}'],
)
def test_a_json_store_that_is_none(text, tmp_path):
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
def test_mimic_it_images_in_parquet(names, wrap, tmp_path):
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


def test_parquet_that_is_no_store(tmp_path):
    pq.write_table(pa.table({"name": ["a"], "image": [None]}), tmp_path / "a.parquet")
    message = mistake(root_of(tmp_path / "a.parquet").image, "a")
    assert message.endswith(
        "expected a column of id or image_id or __index_level_0__ and one of image or base64, got name, image"
    )
    pq.write_table(pa.table({"id": ["a"], "image": pa.array([None], pa.binary())}), tmp_path / "b.parquet")
    assert refusal(root_of(tmp_path / "b.parquet").image, "a") == "corrupt image"


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 100])
def test_a_root_that_cannot_be_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in mistake(root_of(tmp_path / name).image, "cat.png")


def test_roots_that_are_refused_at_once(folder, tmp_path):
    assert "did you mean images?" in mistake(root_of, tmp_path / "image")
    tarred(tmp_path / "a.tar.gz", kind="w:gz")
    assert "unpack it" in mistake(root_of, tmp_path / "a.tar.gz")
    (tmp_path / "a.rar").write_bytes(b"")
    assert "expected a folder of images, or a file that ends in .zip" in mistake(root_of, tmp_path / "a.rar")
    assert "a.json holds no folders" in mistake(root_of, store(tmp_path / "a.json") / "inner")


def test_zip_members_that_cannot_be_read_in_place(tmp_path):
    zipped(tmp_path / "a.zip", method=zipfile.ZIP_LZMA)
    assert refusal(root_of(tmp_path / "a.zip").image, "cat.png") == "unknown compression"
    content = bytearray(zipped(tmp_path / "b.zip", {"cat.png": CAT}).read_bytes())
    flags = content.rindex(b"PK\1\2") + 8
    content[flags] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    assert refusal(root_of(tmp_path / "b.zip").image, "cat.png") == "encrypted image"


def test_a_zip_bomb_is_too_large(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as member,
    ):
        for _ in range(150):
            member.write(bytes(10**6))
    assert (tmp_path / "a.zip").stat().st_size < 10**6
    image = root_of(tmp_path / "a.zip").image("a.png")
    assert refusal(encoded, image) == refusal(open_image, image) == "image too large"


def test_a_zip_with_something_before_it(tmp_path):
    """As self-extracting archives have; their indexes count from the archive's own start."""
    zipped(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" * 7 + (tmp_path / "a.zip").read_bytes())
    assert encoded(root_of(tmp_path / "a.zip").image("cat.png")) == CAT


def test_an_archive_cut_after_it_was_indexed(tmp_path):
    root = root_of(tarred(tmp_path / "a.tar"))
    image = root.image("sub/flat.png")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    assert refusal(open_image, image) == "corrupt image"
    (tmp_path / "a.tar").unlink()
    assert refusal(open_image, image) == "missing image"


def test_a_root_is_sent_to_another_process(folder, tmp_path):
    root = root_of(zipped(tmp_path / "a.zip"), folder, store(tmp_path / "b.json"))
    before = root.image("cat.png")
    assert len(pickle.dumps(root)) < 2000
    assert pickle.loads(pickle.dumps(root)).image("cat.png") == before


@given(st.text(st.sampled_from("./\\ab:~\0é\ud800%"), max_size=12))
def test_whatever_a_reference_says_it_stays_inside(tmp_path_factory, reference):
    folder = tmp_path_factory.getbasetemp() / "inside" / "root"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        image = root_of(folder).image(reference)
    except RecordError:
        return
    assert image.source.is_relative_to(folder.resolve())
