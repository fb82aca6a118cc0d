"""Folders of images with captions, and texts."""

import gzip
import json

import pytest
from data_files import PNG, read_format, write_files
from sources import make_source

from finetune.data.conversation import Dialogue, Image, Turn
from finetune.data.formats import FORMATS
from finetune.data.io.image_roots import ImageRoot
from modeling.errors import UserError


def test_image_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    images = ("b.PNG", "a.jpg", "sub/c.webp", "d.jpg", "e.jpg", "f.jpg")
    for name in images:
        (tmp_path / name).write_bytes(PNG)
    lines = [
        {"file_name": "a.jpg", "text": "An a."},
        {"file_name": "sub/c.webp", "text": "A c."},
        {"file_name": "a.jpg", "text": "Another a."},
        {"file_name": "../gone.jpg", "text": "Gone."},
        {"file_name": "f.jpg"},
        {"file_name": "e.jpg", "text": "An e."},
    ]
    write_files(
        tmp_path, metadata__jsonl="\n".join(map(json.dumps, lines)), b__txt="A b.\n", g__txt="A g.", e__txt="E."
    )
    (tmp_path / "d.txt").write_bytes(b"\xff")
    records = list(FORMATS["image_folder"].read(make_source("image_folder", paths=(tmp_path,))))
    assert [(record_id, getattr(record, "reason", record)) for record_id, record in records] == [
        ("metadata.jsonl:3", "two captions"),
        ("metadata.jsonl:5", "missing field"),
        ("a.jpg", {"image": str(tmp_path / "a.jpg"), "text": "An a."}),
        ("b.PNG", {"image": str(tmp_path / "b.PNG"), "text": "A b.\n"}),
        ("d.jpg", "text is not Unicode"),
        ("e.jpg", "two captions"),
        ("f.jpg", "no caption"),
        ("sub/c.webp", {"image": str(tmp_path / "sub" / "c.webp"), "text": "A c."}),
        ("metadata.jsonl:4", "missing image"),
        ("g.txt", "missing image"),
    ]


def test_image_folder_columns(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PNG)
    write_files(tmp_path, metadata__csv='file_name,caption\na.jpg,"An a, and more."\n')
    source = make_source("image_folder", paths=(tmp_path,), columns={"text": "caption"})
    ((record_id, record),) = FORMATS["image_folder"].read(source)
    assert record_id == "a.jpg"
    dialogue = FORMATS["image_folder"].convert(record, ImageRoot(source))
    assert dialogue == Dialogue((Turn("document", (Image((tmp_path / "a.jpg").resolve()), "An a, and more.")),))


def test_image_folder_needs_folder(tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        read_format("image_folder", tmp_path / "gone")
    (path,) = write_files(tmp_path, a__txt="A.")
    with pytest.raises(UserError, match="expected a folder of images, found a file"):
        read_format("image_folder", path)
    with pytest.raises(UserError, match=r"expected folders as path, got me/images\[train\]"):
        read_format("image_folder", hub="me/images")


def test_text_files(tmp_path):
    paths = write_files(tmp_path, a__txt="\ufeffOne.\n\nTwo.", b__jsonl='{"text": "Three."}\n{"text": "Four."}')
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert read_format("text", *paths) == [{"text": "One.\n\nTwo."}, {"text": "Three."}, {"text": "Four."}]
    assert [reason for reason, _ in read_format("text", tmp_path / "c.txt")] == ["text is not Unicode"]


def test_text_folders(tmp_path):
    for name in ("texts/of/mine", "records"):
        (tmp_path / name).mkdir(parents=True)
    write_files(tmp_path / "texts", b__txt="B.", a__txt="A.")
    write_files(tmp_path / "texts/of/mine", c__txt="C.")
    write_files(tmp_path / "records", d__jsonl={"text": "D."})
    expected = [{"text": text} for text in ("A.", "B.", "C.", "D.")]
    assert read_format("text", tmp_path / "records", tmp_path / "texts") == expected
    assert read_format("text", tmp_path / "texts" / "*.txt") == expected[:2]


def test_image_folder_broken_metadata(tmp_path):
    lines = gzip.compress(b'{"file_name": "a.png", "text": "A."}\n')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "metadata.csv").write_text('file_name,text\na.png,"A.\n')
    with pytest.raises(UserError, match=r"metadata\.csv: the file breaks off: not CSV: a quote opens in line 2"):
        read_format("image_folder", tmp_path / "images")
    got = read_format("image_folder", tmp_path / "images", on_broken="keep")
    assert [record[0] for record in got] == ["not CSV"]
    (tmp_path / "cut.jsonl.gz").write_bytes(lines[:-4])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: the file breaks off: corrupt file"):
        read_format("pairs", tmp_path / "cut.jsonl.gz")
