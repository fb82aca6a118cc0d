"""A table of the images that img2dataset downloaded: made once, shared, made again where a shard has changed."""

import numpy as np
import pytest
from data_files import shard, written
from img2dataset_files import BLUE, METADATA, RED, write_shard

from finetune.data.conversation import RecordError
from finetune.data.images import encoded
from finetune.data.io import url_images
from finetune.data.io.img2dataset import image_shards
from finetune.data.io.url_images import TABLE, UrlImages
from modeling.errors import UserError

URLS = [row["url"] for row in METADATA]


def images_in(folder):
    return UrlImages(folder, image_shards(folder))


def found(folder, urls=URLS):
    return [image and encoded(image) for image in map(images_in(folder).find, urls)]


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
@pytest.mark.parametrize("encoding", ["jpg", "png", "webp"])
def test_find_by_url(tmp_path, layout, encoding):
    write_shard(tmp_path, layout, encoding=encoding)
    assert found(tmp_path) == [RED, None, None, BLUE]
    assert found(tmp_path, ["https://example.org/RED.jpg?w=80", "", "\ud800"]) == [None, None, None]


def test_table_is_made_once(tmp_path, monkeypatch):
    write_shard(tmp_path, "webdataset")
    assert found(tmp_path) == [RED, None, None, BLUE]
    monkeypatch.setattr(url_images, "_make", None)
    assert found(tmp_path) == [RED, None, None, BLUE]


@pytest.mark.parametrize("damage", [b"", b"ARROW1\0\0 no table"])
def test_table_that_is_damaged_is_made_again(tmp_path, damage):
    write_shard(tmp_path, "webdataset")
    (tmp_path / TABLE).write_bytes(damage)
    assert found(tmp_path) == [RED, None, None, BLUE]


def test_table_of_other_shards_is_made_again(tmp_path):
    write_shard(tmp_path, "webdataset")
    assert found(tmp_path)[0] == RED
    written(
        tmp_path / "00000.tar", shard([("7.jpg", BLUE), ("7.json", b'{"url": "https://example.org/red.jpg?w=80"}')])
    )
    assert found(tmp_path) == [BLUE, None, None, None]


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """The table is then in memory: tests may run as root, who can write everywhere."""
    write_shard(tmp_path, "webdataset")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(url_images, "FileLock", refuse)
    assert found(tmp_path) == [RED, None, None, BLUE]
    assert "cannot be written (Permission denied): each process lists the images again" in capsys.readouterr().err
    assert not (tmp_path / TABLE).exists()


def test_equal_halves_of_hashes(tmp_path, monkeypatch):
    """Two URLs of which one half of the hash is equal are told apart by the other."""
    whole = url_images._hashed
    monkeypatch.setattr(url_images, "_hashed", lambda urls: (np.zeros(len(urls), np.uint64), whole(urls)[1]))
    write_shard(tmp_path, "webdataset")
    assert found(tmp_path) == [RED, None, None, BLUE]


def test_first_of_two_equal_urls(tmp_path):
    for name, content in (("00000", RED), ("00001", BLUE)):
        written(tmp_path / f"{name}.tar", shard([("0.jpg", content), ("0.json", b'{"url": "https://a.b/c"}')]))
        written(tmp_path / f"{name}_stats.json", b"{}")
    assert found(tmp_path, ["https://a.b/c"]) == [RED]


@pytest.mark.parametrize(
    ("member", "left"),
    [
        (("7.json", b"not JSON"), [None]),
        (("7.json", b'{"url": 7}'), [None]),
        (("7.txt", b"no JSON at all"), [None]),
        (("7.json", b'{"url": "https://a.b/c"}'), [RED]),
    ],
)
def test_members_without_url(tmp_path, member, left):
    written(tmp_path / "00000.tar", shard([("7.jpg", RED), member]))
    written(tmp_path / "00000_stats.json", b"{}")
    assert found(tmp_path, ["https://a.b/c"]) == left


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet"])
def test_shard_that_cannot_be_read(tmp_path, name):
    written(tmp_path / name, b"nothing of the kind")
    written(tmp_path / "00000_stats.json", b"{}")
    with pytest.raises(UserError, match=rf"{name}: a shard of images that cannot be read") as caught:
        found(tmp_path)
    assert not isinstance(caught.value, RecordError)


def test_shards_of_a_folder(tmp_path):
    files = "0.tar 0.parquet 0_stats.json 1.parquet 1_stats.json 2.tar 3_stats.json 4.parquet 4_stats.json 4/7.jpg"
    for name in files.split():
        written(tmp_path / name, b"")
    assert image_shards(tmp_path) == [tmp_path / "0.tar", tmp_path / "1.parquet"]
