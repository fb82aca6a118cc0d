"""References -> images: from every kind of root, and never from anywhere else."""

import base64
import json
import os
import pickle

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import (
    ARCHIVES,
    CAT,
    DOG,
    ENCODED,
    FILES,
    mistake,
    refusal,
    root_of,
    tarred,
    write_json_store,
    zipped,
)
from sources import make_source

from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.formats import FORMATS
from finetune.data.formats.read_records import read_records
from finetune.data.images import encoded, open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import to_dialogue
from modeling.errors import UserError


def test_image_roots_in_order(folder, tmp_path):
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


def test_default_image_root(folder, tmp_path):
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
def test_image_outside_folder_refused(reference, folder, tmp_path):
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "outdir").symlink_to(tmp_path)
    assert refusal(root_of(folder).image, reference) == "image outside the image root"


@pytest.mark.parametrize("name", [*ARCHIVES])
@pytest.mark.parametrize("reference", OUTSIDE[:5])
def test_image_outside_archive_refused(reference, name, tmp_path):
    files = {**FILES, "../secret.png": CAT, "/etc/hostname": CAT}
    assert refusal(root_of(ARCHIVES[name](tmp_path / name, files)).image, reference) == "image outside the image root"


def test_link_inside_folder(folder):
    (folder / "link.png").symlink_to("cat.png")
    assert root_of(folder).image("link.png") == Image(folder / "cat.png")
    (folder / "loop.png").symlink_to("loop.png")
    assert refusal(lambda: open_image(root_of(folder).image("loop.png"))) in ("not an image reference", "corrupt image")


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
def test_bad_reference(reference, folder, tmp_path):
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
def test_missing_image_names_nearest(reference, near, folder, tmp_path):
    path = folder / reference
    hint = f"; did you mean {folder / near}?" if near else ""
    assert missing(root_of(folder), reference) == f"{path}: No such file or directory{hint}"
    for archive in (zipped(tmp_path / "a.zip"), tarred(tmp_path / "a.tar")):
        detail = missing(root_of(archive), reference)
        assert detail.startswith(f"{reference}: not in {archive}")
        assert detail.endswith(f"; did you mean {near}?" if near else str(archive))


def test_missing_image_lists_folder_once(folder, monkeypatch):
    for number in range(300):
        (folder / f"COCO_{number:06}.png").write_bytes(b"")
    listed = []
    scandir = os.scandir
    monkeypatch.setattr("finetune.data.io.paths.os.scandir", lambda path: listed.append(path) or scandir(path))
    root = root_of(folder)
    assert missing(root, "COCO_000299.jpg").endswith("did you mean " + str(folder / "COCO_000299.png") + "?")
    assert all(missing(root, f"COCO_9{number:05}.png") for number in range(20))
    assert listed == [str(folder)]


def test_file_url(folder):
    for reference in (f"file://{folder}/cat.png", f"FILE://localhost{folder}/cat.png", f"file:{folder}/cat.png"):
        assert root_of(folder).image(reference) == Image(folder / "cat.png")
    assert root_of(folder).image(f"file://{folder}/sub/d%C3%B6g.jpg") == Image(folder / "sub" / "dög.jpg")
    assert missing(root_of(folder), f"file://{folder}/dog.png").startswith(f"{folder}/dog.png: No such file")
    for reference in ("file:///etc/hostname", "FILE:/etc/hostname", f"file://{folder}/../secret.png"):
        assert refusal(root_of(folder).image, reference) == "image outside the image root"
    for reference in ("file://host/cat.png", "file:cat.png", "file://cat.png", "file:////etc/hostname"):
        assert refusal(root_of(folder).image, reference) == "image is a URL"
    assert refusal(root_of(folder).image, "file:///a%00b") == "not an image reference"


def test_link_outside_names_its_repair(folder, tmp_path):
    """The error names the link's target and the line that allows it."""
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


def test_default_image_roots_of_several_paths(tmp_path):
    """Without image_root the folder of each path is searched."""
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


def test_default_image_root_of_record(tmp_path):
    """Without image_root the folder of a record's own file comes first."""
    line = json.dumps({"question": "What?", "answer": "A.", "image": "images/x.png"})
    for name in ("a", "b", "c/deep"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "d.jsonl").write_text(line)
        if name != "c/deep":
            (tmp_path / name / "images" / "x.png").write_bytes(CAT)
    for paths in (["[ab]/d.jsonl"], ["a", "b/d.jsonl"], ["**/d.jsonl"], ["."]):
        source = make_source("lrv", tuple((tmp_path / path) for path in paths))
        root = ImageRoot(source)
        records = [(record_id, record) for record_id, record in read_records(source) if "deep" not in record_id]
        images = {record_id: to_dialogue(record_id, record, root).images for record_id, record in records}
        assert images["a/d.jsonl:1"] == (Image(tmp_path / "a/images/x.png"),)
        assert images["b/d.jsonl:1"] == (Image(tmp_path / "b/images/x.png"),)
    lost = root.beside("c/deep/d.jsonl:1")
    assert missing(lost, "images/x.png").startswith(f"{tmp_path}/c/deep/images/x.png: No such file")
    assert root.beside("c/deep/d.jsonl:1") is lost
    assert lost.image("../../a/images/x.png") == Image(tmp_path / "a/images/x.png")
    assert refusal(lost.image, "../../../x.png") == "image outside the image root"
    assert root_of(tmp_path / "a").beside("b/d.jsonl:1").image("images/x.png") == Image(tmp_path / "a/images/x.png")


def test_image_root_pattern(tmp_path):
    zipped(tmp_path / "a0.zip", {"train/cat.png": CAT})
    zipped(tmp_path / "a1.zip", {"train/dog.jpg": DOG})
    root = root_of(tmp_path / "a?.zip" / "train")
    assert [encoded(root.image(name)) for name in ("cat.png", "dog.jpg")] == [CAT, DOG]
    assert "nothing is there that fits this pattern" in mistake(root_of, tmp_path / "b?.zip" / "train")


@pytest.mark.parametrize("name", ["pipe", "pipe.zip", "pipe.tar", "pipe.json", "pipe.parquet"])
def test_image_root_pipe(name, tmp_path):
    """A pipe is refused, not waited for."""
    os.mkfifo(tmp_path / name)
    assert "expected a folder of images, or a file that ends in" in mistake(root_of, tmp_path / name)
    assert refusal(lambda: open_image(root_of(tmp_path).image(name))) == "corrupt image"


def test_reference_too_long(folder):
    assert refusal(root_of(folder).image, "x" * 300 + "/../..") == "not an image reference"
    assert refusal(lambda: open_image(root_of(folder).image("x" * 5000))) in ("not an image reference", "corrupt image")


@pytest.mark.parametrize(
    "url", ["file://host/etc/hostname", "file:hostname", "ftp://a.b/c.png", "s3://a/b.png", "gs://a/b", "ftp:x"]
)
@pytest.mark.parametrize("settings", [{}, {"download": "http"}])
def test_url_of_other_schemes_refused(url, settings, folder):
    assert refusal(root_of(folder, **settings).image, url) == "image is a URL"


def test_url_download_settings(folder):
    plain, secure = "http://a.b/c.png", "HTTPS://a.b/c.png"
    assert [refusal(root_of(folder).image, url) for url in (plain, secure)] == ["image is a URL"] * 2
    assert root_of(folder, download=True).image(secure) == Image(Remote(secure))
    assert refusal(root_of(folder, download=True).image, plain) == "image is a URL"
    assert root_of(folder, download="http").image(plain) == Image(Remote(plain))


def test_reference_is_image_already(folder):
    root, held = root_of(folder), PIL.Image.new("RGB", (2, 2))
    place = Slice(folder / "cat.png", 0, 9)
    assert root.image(CAT) == root.image({"bytes": CAT, "path": "../x.png"}) == Image(CAT)
    assert (
        root.image({"bytes": None, "path": "cat.png"}) == root.image({"path": "cat.png"}) == Image(folder / "cat.png")
    )
    assert refusal(root.image, {"bytes": None, "path": "../secret.png"}) == "image outside the image root"
    assert root.image(held).source is held
    assert root.image(place) == Image(place)


def test_data_url(folder):
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


def test_image_name(folder):
    root = root_of(folder)
    assert root.named({"image_id": 9}, "COCO_{image_id:012d}.jpg") == Image(folder / "COCO_000000000009.jpg")
    assert root.named({"image_id": "9"}, "{image_id:03d}.jpg") == Image(folder / "009.jpg")
    assert root.named({"a": "sub", "b": "x"}, "{a}/{b}_{b}{{}}.jpg") == Image(folder / "sub" / "x_x{}.jpg")
    assert root_of(folder, image_name="{id}.png").named({"id": "cat"}, "{never}") == Image(folder / "cat.png")
    assert refusal(root.named, {"id": "../../secret"}, "{id}.png") == "image outside the image root"
    assert refusal(root.named, {"id": "https://x"}, "{id}.png") == "image is a URL"


@pytest.mark.parametrize("record", [{}, {"id": None}, {"id": [1]}, {"id": True}, {"id": 1.5}, {"id": "x"}, {"id": "²"}])
def test_image_name_bad_fields(record, folder):
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
def test_image_name_bad_template(template, folder):
    message = mistake(lambda: root_of(folder, image_name=template))
    assert message.startswith("image_name: expected a name such as {image_id:012d}.jpg, got ")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.json", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind" * 100])
def test_image_root_unreadable(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in mistake(root_of(tmp_path / name).image, "cat.png")


def test_image_root_refused(folder, tmp_path):
    assert "did you mean images?" in mistake(root_of, tmp_path / "image")
    tarred(tmp_path / "a.tar.gz", kind="w:gz")
    assert "unpack it" in mistake(root_of, tmp_path / "a.tar.gz")
    (tmp_path / "a.rar").write_bytes(b"")
    assert "expected a folder of images, or a file that ends in .zip" in mistake(root_of, tmp_path / "a.rar")
    assert "a.json holds no folders" in mistake(root_of, write_json_store(tmp_path / "a.json") / "inner")


def test_image_root_pickles(folder, tmp_path):
    root = root_of(zipped(tmp_path / "a.zip"), folder, write_json_store(tmp_path / "b.json"))
    before = root.image("cat.png")
    assert len(pickle.dumps(root)) < 2000
    assert pickle.loads(pickle.dumps(root)).image("cat.png") == before


@given(st.text(st.sampled_from("./\\ab:~\0é\ud800%"), max_size=12))
def test_any_reference_stays_inside(tmp_path_factory, reference):
    """Whatever a reference says, the image lies inside the root."""
    folder = tmp_path_factory.getbasetemp() / "inside" / "root"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        image = root_of(folder).image(reference)
    except RecordError:
        return
    assert image.source.is_relative_to(folder.resolve())


def url(root, reference):
    source = root.image(reference).source
    assert isinstance(source, Remote)
    return source.url


def test_remote_image_folder(storage, cache):
    """An image below a remote folder is a URL, which is downloaded later; no name leads out of the folder."""
    storage.pipe_file("/b/images/sub/cat.png", CAT)
    root = root_of("memory://b/images")
    assert url(root, "sub/cat.png") == "memory://b/images/sub/cat.png"
    assert url(root, "./sub/../a b?.png") == "memory://b/images/a b?.png"
    for name in ("../secret.png", "sub/../../secret.png", "/etc/hostname", "..", "."):
        assert refusal(root.image, name) == "image outside the image root"
    for reference in ("memory://b/images/sub/cat.png", "s3://b/cat.png", "https://host/cat.png"):
        assert refusal(root.image, reference) == "image is a URL"
    assert pickle.loads(pickle.dumps(root)).image("cat.png") == Image(Remote("memory://b/images/cat.png"))
    with pytest.raises(UserError, match="memory://b/other: nothing is there"):
        root_of("memory://b/other")
    assert not (cache / "memory").exists()


def test_remote_image_folder_comes_last(storage, folder):
    storage.pipe_file("/b/images/cat.png", CAT)
    root = root_of(folder, "memory://b/images")
    assert root.image("cat.png") == Image(folder / "cat.png")
    assert url(root, "other.png") == "memory://b/images/other.png"
    with pytest.raises(UserError, match="a remote folder is not listed: put it last, and only one"):
        root_of("memory://b/images", folder)


def test_image_folder_on_the_web(cache):
    root = root_of("https://host/images/", download=True)
    assert url(root, "sub/é%2e #?.png") == "https://host/images/sub/%C3%A9%252e%20%23%3F.png"
    assert refusal(root.image, "../secret.png") == "image outside the image root"
    with pytest.raises(UserError, match=r"https://host/images\?\.\.\.: expected the URL of a folder without a query"):
        root_of("https://host/images?a=b", download=True)


def test_remote_archive(storage, cache):
    zipped(cache.parent / "a.zip", {"in/cat.png": CAT, "in/dog.jpg": DOG})
    tarred(cache.parent / "a.tar", {"in/cat.png": CAT})
    for name in ("a.zip", "a.tar"):
        storage.pipe_file(f"/b/{name}", (cache.parent / name).read_bytes())
        root = root_of(f"memory://b/{name}/in")
        assert encoded(root.image("cat.png")) == CAT
        assert refusal(root.image, "../cat.png") == "image outside the image root"
        assert root.image("cat.png").source.path == cache / "memory" / "b" / name
        (cache / "memory" / "b" / name).unlink()  # it left to make room
        assert encoded(root.image("cat.png")) == CAT
    storage.pipe_file("/b/a.tar.gz", b"")
    with pytest.raises(UserError, match=r"memory://b/a\.tar\.gz: a compressed tar archive"):
        root_of("memory://b/a.tar.gz")


def test_remote_images_beside_their_data(storage, cache):
    """Without `image_root`, an image belongs to the folder of its own record's file."""
    for name in ("d/a.jsonl", "d/sub/a.jsonl"):
        storage.pipe_file(f"/b/{name}", b'{"image": "cat.png"}\n')
    source = make_source("auto", ("memory://b/d",))
    found = {
        record_id: url(ImageRoot(source).beside(record_id), record["image"])
        for record_id, record in read_records(source)
    }
    assert found == {
        "a.jsonl:1": "memory://b/d/cat.png",
        "sub/a.jsonl:1": "memory://b/d/sub/cat.png",
    }


def test_remote_image_folder_as_data(storage):
    for name in ("cat.png", "sub/dog.png"):
        storage.pipe_file(f"/b/d/{name}", CAT)
        storage.pipe_file(f"/b/d/{name[:-4]}.txt", b"A pet.")
    source = make_source("image_folder", ("memory://b/d",))
    root, read = ImageRoot(source), FORMATS["image_folder"].read
    assert [(record_id, url(root, record["image"]), record["text"]) for record_id, record in read(source)] == [
        ("cat.png", "memory://b/d/cat.png", "A pet."),
        ("sub/dog.png", "memory://b/d/sub/dog.png", "A pet."),
    ]


def test_cached_file_is_not_fetched_as_an_image(storage, cache, tmp_path):
    """A record that names a place in the cache fetches nothing, even where `image_root` holds the cache."""
    storage.pipe_file("/b/cat.png", CAT)
    image = root_of(tmp_path).image("cache/memory/b/cat.png")
    assert refusal(open_image, image) == "missing image"
    assert not cache.exists()
