"""References -> images: from every kind of root, and never from anywhere else."""

import base64
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.images import encoded, open_image
from finetune.data.io.files import read_records
from finetune.data.io.image_roots import ImageRoot
from finetune.data.records import to_dialogue
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
    return ImageRoot(make_source("auto", image_root=paths, **settings))


def refusal(function, *arguments):
    with pytest.raises(RecordError) as caught:
        function(*arguments)
    return caught.value.reason


def mistake(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert not isinstance(caught.value, RecordError)
    return str(caught.value)


@contextmanager
def at_most(memory):
    """Fails where Python held more bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


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
        assert ImageRoot(make_source("auto", (path,))).image("images/cat.png") == Image(folder / "cat.png")
    assert ImageRoot(make_source("auto", hub=str(tmp_path))).image("images/cat.png") == Image(folder / "cat.png")
    assert refusal(ImageRoot(make_source("text")).image, "cat.png") == "missing image"


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


def missing(root, reference):
    with pytest.raises(RecordError) as caught:
        open_image(root.image(reference))
    assert caught.value.reason == "missing image"
    return caught.value.detail


@pytest.mark.parametrize(
    ("reference", "near"),
    [
        ("sub\\flat.png", "sub/flat.png"),
        ("SUB\\flat.png", "sub/flat.png"),
        ("C:\\images\\cat.png", "cat.png"),
        ("..\\cat.png", "cat.png"),
        ("Cat.PNG", "cat.png"),
        ("cat", "cat.png"),
        ("cat.jpg", "cat.png"),
        ("Sub/flat.png", "sub/flat.png"),
        ("sub/d%C3%B6g.jpg", "sub/dög.jpg"),
        ("sub%2Fflat.png", "sub/flat.png"),
        ("images/cat.png", "cat.png"),
        ("images/train/cat.png", "cat.png"),
        ("cats.png", "cat.png"),
        ("nothing like it.png", None),
    ],
)
def test_missing_image_names_the_nearest_one(reference, near, folder, tmp_path):
    path = folder / reference
    hint = f"; did you mean {folder / near}?" if near else ""
    assert missing(root_of(folder), reference) == f"{path}: No such file or directory{hint}"
    for archive in (zipped(tmp_path / "a.zip"), tarred(tmp_path / "a.tar")):
        detail = missing(root_of(archive), reference)
        assert detail.startswith(f"{reference}: not in {archive}")
        assert detail.endswith(f"; did you mean {near}?" if near else str(archive))


def test_missing_image_in_a_folder_of_many_costs_one_listing(folder, monkeypatch):
    for number in range(300):
        (folder / f"COCO_{number:06}.png").write_bytes(b"")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr("finetune.data.io.paths.os.scandir", lambda path: listed.append(path) or scandir(path))
    root = root_of(folder)
    assert missing(root, "COCO_000299.jpg").endswith("did you mean " + str(folder / "COCO_000299.png") + "?")
    assert all(missing(root, f"COCO_9{number:05}.png") for number in range(20))
    assert listed == [str(folder)]


def test_file_urls_are_paths(folder):
    for reference in (f"file://{folder}/cat.png", f"FILE://localhost{folder}/cat.png", f"file:{folder}/cat.png"):
        assert root_of(folder).image(reference) == Image(folder / "cat.png")
    assert root_of(folder).image(f"file://{folder}/sub/d%C3%B6g.jpg") == Image(folder / "sub" / "dög.jpg")
    assert missing(root_of(folder), f"file://{folder}/dog.png").startswith(f"{folder}/dog.png: No such file")
    for reference in ("file:///etc/hostname", "FILE:/etc/hostname", f"file://{folder}/../secret.png"):
        assert refusal(root_of(folder).image, reference) == "image outside the image root"
    for reference in ("file://host/cat.png", "file:cat.png", "file://cat.png", "file:////etc/hostname"):
        assert refusal(root_of(folder).image, reference) == "image is a URL"
    assert refusal(root_of(folder).image, "file:///a%00b") == "not an image reference"


def test_links_name_their_target_and_the_line_that_allows_them(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(CAT)
    (folder / "train2017").symlink_to("../elsewhere")
    (folder / "deep").mkdir()
    (folder / "deep" / "one.png").symlink_to(elsewhere / "a.png")

    def why(reference, root=None):
        with pytest.raises(RecordError) as caught:
            (root or root_of(folder)).image(reference)
        assert caught.value.reason == "image outside the image root"
        return caught.value.detail

    allows = f"`image_root: [{folder}, {elsewhere}]` allows it"
    link = f"{folder}/train2017 is a link to {elsewhere}, outside of {folder}"
    assert why("train2017/a.png") == f"train2017/a.png: {link}; {allows}"
    assert why("train2017/none.png") == f"train2017/none.png: {link}"
    link = f"{folder}/deep/one.png is a link to {elsewhere}/a.png, outside of {folder}"
    assert why("deep/one.png") == f"deep/one.png: {link}; {allows}"
    assert why(f"{elsewhere}/a.png") == f"{elsewhere}/a.png is not under {folder}; {allows}"
    assert why("/etc/hostname") == f"/etc/hostname is not under {folder}"
    beside = ImageRoot(make_source("auto", (folder / "d.jsonl",)))  # no image_root: the data's own folder
    assert why("train2017/a.png", beside).endswith(allows)

    (folder / "as_text").write_text("../elsewhere")  # what git makes of a link where the disk has none
    link = f"{folder}/as_text is a link to {elsewhere}, outside of {folder}"
    assert why("as_text/a.png") == f"as_text/a.png: {link}; {allows}"

    both = root_of(folder, elsewhere)
    assert both.image("as_text/a.png") == Image(elsewhere / "a.png")
    assert both.image("train2017/a.png") == both.image("deep/one.png") == Image(elsewhere / "a.png")
    assert refusal(both.image, "../secret.png") == "image outside the image root"


def test_without_image_root_each_path_brings_its_folder(tmp_path):
    for name in ("f/a.png", "g/b.png", "f/same.png", "g/same.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CAT)
    for paths in (
        (tmp_path / "f", tmp_path / "g"),
        (tmp_path / "[fg]",),
        (tmp_path / "f/a.jsonl", tmp_path / "g/b.jsonl"),
    ):
        for path in paths:
            if path.suffix:
                path.write_text("")
        root = ImageRoot(make_source("auto", paths))
        assert root.image("b.png") == root.image(f"{tmp_path}/g/b.png") == Image(tmp_path / "g" / "b.png")
        assert root.image("a.png") == Image(tmp_path / "f" / "a.png")
        with pytest.raises(RecordError) as caught:
            root.image("same.png")
        assert str(caught.value) == (
            f"ambiguous image: same.png: {tmp_path}/f/same.png and {tmp_path}/g/same.png; "
            "name its folder as image_root, or make two sources of them"
        )
        assert root.image(f"{tmp_path}/g/same.png") == Image(tmp_path / "g" / "same.png")


def test_without_image_root_a_record_s_own_folder_comes_first(tmp_path):
    line = json.dumps({"question": "What?", "answer": "A.", "image": "images/x.png"})
    for name in ("a", "b", "c/deep"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "d.jsonl").write_text(line)
        if name != "c/deep":
            (tmp_path / name / "images" / "x.png").write_bytes(CAT)
    for paths in (["[ab]/d.jsonl"], ["a", "b/d.jsonl"], ["**/d.jsonl"], ["."]):
        source = make_source("lrv", tuple((tmp_path / path) for path in paths))
        root = ImageRoot(source)
        records = [(place, record) for place, record in read_records(source) if "deep" not in place]
        images = {place: to_dialogue(place, record, root).images for place, record in records}
        assert images["a/d.jsonl:1"] == (Image(tmp_path / "a/images/x.png"),)
        assert images["b/d.jsonl:1"] == (Image(tmp_path / "b/images/x.png"),)
    lost = root.beside("c/deep/d.jsonl:1")
    assert missing(lost, "images/x.png").startswith(f"{tmp_path}/c/deep/images/x.png: No such file")
    assert root.beside("c/deep/d.jsonl:1") is lost
    assert lost.image("../../a/images/x.png") == Image(tmp_path / "a/images/x.png")
    assert refusal(lost.image, "../../../x.png") == "image outside the image root"
    assert root_of(tmp_path / "a").beside("b/d.jsonl:1").image("images/x.png") == Image(tmp_path / "a/images/x.png")


def test_image_root_may_be_a_pattern(tmp_path):
    zipped(tmp_path / "a0.zip", {"train/cat.png": CAT})
    zipped(tmp_path / "a1.zip", {"train/dog.jpg": DOG})
    root = root_of(tmp_path / "a?.zip" / "train")
    assert [encoded(root.image(name)) for name in ("cat.png", "dog.jpg")] == [CAT, DOG]
    assert "nothing is there that fits this pattern" in mistake(root_of, tmp_path / "b?.zip" / "train")


@pytest.mark.parametrize("name", ["pipe", "pipe.zip", "pipe.tar", "pipe.json", "pipe.parquet"])
def test_an_image_root_that_is_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    assert "expected a folder of images, or a file that ends in" in mistake(root_of, tmp_path / name)
    assert refusal(lambda: open_image(root_of(tmp_path).image(name))) == "corrupt image"


def test_a_name_that_is_too_long(folder):
    assert refusal(root_of(folder).image, "x" * 300 + "/../..") == "not an image reference"
    assert refusal(lambda: open_image(root_of(folder).image("x" * 5000))) in ("not an image reference", "corrupt image")


@pytest.mark.parametrize(
    "url", ["file://host/etc/hostname", "file:hostname", "ftp://a.b/c.png", "s3://a/b.png", "gs://a/b", "ftp:x"]
)
@pytest.mark.parametrize("settings", [{}, {"download": "http"}])
def test_other_schemes_are_never_followed(url, settings, folder):
    assert refusal(root_of(folder, **settings).image, url) == "image is a URL"


def test_urls_are_followed_as_far_as_the_source_allows(folder):
    plain, secure = "http://a.b/c.png", "HTTPS://a.b/c.png"
    assert [refusal(root_of(folder).image, url) for url in (plain, secure)] == ["image is a URL"] * 2
    assert root_of(folder, download=True).image(secure) == Image(Remote(secure))
    assert refusal(root_of(folder, download=True).image, plain) == "image is a URL"
    assert root_of(folder, download="http").image(plain) == Image(Remote(plain))


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
    "template",
    [
        *("{a.b}", "{a[0]}", "{}", "{0}", "{a", "a}", "{a:{b}}", "{a.__class__}", "{a:qq}", "{ a }", "{a!r}"),
        *("{a:9999999999d}", "{a:0256d}", "{a:.9999999999f}", "{a:" + 5000 * "9" + "}", "{a.__init__.__globals__}"),
    ],
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


def test_parquet_whose_dictionary_multiplies_is_not_read(tmp_path):
    """A thousand times the same two megabytes: a file of two megabytes, two gigabytes in memory."""
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(2 * 10**6)]))
    table = pa.table({"id": [str(number) for number in range(1000)], "image": large})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    message = mistake(root_of(tmp_path / "a.parquet").image, "7")
    assert message.startswith(f"{tmp_path}/a.parquet: a Parquet file that cannot be read: ")
    assert "\n" not in message


def test_parquet_ids_that_are_not_utf8_are_one_error(tmp_path):
    ids = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"id": ids, "image": [CAT]}), tmp_path / "a.parquet")
    message = mistake(root_of(tmp_path / "a.parquet").image, "7")
    assert "a Parquet file that cannot be read: not a row: In column 0: Invalid: Invalid UTF8" in message


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


def rewritten(path, *changes):
    """A zip archive of cat.png whose index says something else: (place in its entry, format, value)."""
    content = bytearray(zipped(path, {"cat.png": CAT}, method=zipfile.ZIP_STORED).read_bytes())
    for place, kind, value in changes:
        struct.pack_into(f"<{kind}", content, content.rindex(b"PK\1\2") + place, value)
    path.write_bytes(content)
    return root_of(path)


def test_zip_index_that_lies(tmp_path):
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


def test_zip_sizes_of_64_bits_that_lie(tmp_path):
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


def test_zip_index_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "a.zip"
    with path.open("wb") as file:
        file.truncate(3 * 10**9)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, 29 * 10**8, 0, 0))
    with at_most(10**7):
        assert "an index of 2,900,000,000 bytes" in mistake(root_of(path).image, "cat.png")


def test_zip_entries_that_overlap_or_come_twice(tmp_path):
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
def test_odd_names_in_archives(name, tmp_path):
    root = root_of(ARCHIVES[name](tmp_path / name, ODD_NAMES))
    assert encoded(root.image("cat.png")) == encoded(root.image("here/dot.png")) == CAT
    assert encoded(root.image("win\\dows.png")) == CAT
    if name.endswith(".zip"):  # only there do Windows' tools write backslashes for slashes
        assert encoded(root.image("win/dows.png")) == CAT
    for reference in ("out.png", "abs.png", "up.png", "etc/abs.png"):
        assert refusal(root.image, reference) == "missing image"
    for reference in ("../out.png", "/abs.png"):
        assert refusal(root.image, reference) == "image outside the image root"


def test_zip_names_in_utf8_without_the_mark_that_says_so(tmp_path):
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
def test_tar_headers_that_lie(kind, before, tmp_path):
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


def test_tar_names_that_are_not_utf8_lose_nothing_else(tmp_path):
    good = tar_header(b"cat.png", octal(len(CAT))) + CAT.ljust(-len(CAT) % 512 + len(CAT), b"\0")
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(b"\xff\xfe.png", octal(0)) + good + bytes(1024))
    assert encoded(root_of(path).image("cat.png")) == CAT
    with pytest.raises(RecordError) as caught:
        root_of(path).image("\u00ff.png")
    assert str(caught.value).encode()


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
