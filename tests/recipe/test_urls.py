"""URLs as paths of a recipe: which are accepted, the places of their files, and what of them is shown."""

import stat

import pytest
from pydantic import ValidationError

from finetune.recipe import urls
from finetune.recipe.load import absolute_paths
from finetune.recipe.schema import Source
from finetune.recipe.urls import path_of, shown, url_below, url_of


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(urls.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket/d/a.jsonl", "s3/bucket/d/a.jsonl"),
        ("S3://bucket/d/", "s3/bucket/d"),
        ("s3://bucket", "s3/bucket"),
        ("s3://bucket/*/[ab]?.jsonl", "s3/bucket/*/[ab]?.jsonl"),
        ("gs://bucket/a%20b#c.csv", "gs/bucket/a%20b#c.csv"),
        ("hf://datasets/me/cats@main/a.parquet", "hf/datasets/me/cats@main/a.parquet"),
        ("https://host:8443/d/a.tar", "https/host:8443/d/a.tar"),
    ],
)
def test_place_of_url(url, place, cache):
    assert path_of(url) == cache / place
    assert url_of(cache / place) == url.rstrip("/").replace("S3", "s3")
    assert not cache.exists()  # a name costs nothing


def test_place_of_url_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(urls.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert path_of("s3://b/a.csv") == tmp_path / "idefics-finetune" / "remote" / "s3" / "b" / "a.csv"


def test_url_query_is_kept_apart(cache):
    """A query chooses the file, and may be private: no name shows it, and only its owner can read it."""
    queried = "https://host/d/a.jsonl?key=a/b"
    place = path_of(queried)
    assert place.name == "a.jsonl"
    assert place != path_of("https://host/d/a.jsonl?key=c")
    assert url_of(place) == queried
    assert [path.name for path in place.parent.iterdir()] == [".url"]
    assert stat.S_IMODE((place.parent / ".url").stat().st_mode) == 0o600
    assert "key" not in str(place)
    assert url_below(place.parent, "images/é 1?.png") == "https://host/d/images/%C3%A9%201%3F.png"


def test_shown_url(cache):
    assert shown("s3://b/a?.csv") == "s3://b/a?.csv"
    assert shown("https://me:secret@host/a.csv?key=1#x") == "https://...@host/a.csv?..."
    assert shown(path_of("https://host/a.csv?key=1")) == "https://host/a.csv?..."
    assert shown("d//a.csv") == "d/a.csv"
    source = Source(path="https://host/a.csv?key=1", download=True)
    assert source.name == "https://host/a.csv?...[train]"
    assert source.label == "a.csv"


@pytest.mark.parametrize(
    ("url", "download", "expected"),
    [
        ("ftp://host/a.csv", True, "ftp://host/a.csv: expected a path on this machine, or s3://, gs://, hf://"),
        ("file:///a.csv", True, "expected a path on this machine"),
        ("memory://b/a.csv", True, "expected a path on this machine"),
        ("s3://", False, "expected s3://bucket/folder, without empty parts, '.' and '..'"),
        ("https://host", True, "expected https://host/file, without empty parts, '.' and '..'"),
        ("s3://b//a.csv", False, "without empty parts, '.' and '..'"),
        ("s3://b/../a.csv", False, "without empty parts, '.' and '..'"),
        ("https://host/d/./a.csv", True, "without empty parts, '.' and '..'"),
        ("https://host/a.csv#top", True, "https://host/a.csv?...: expected a URL without '#'"),
        ("https://me:secret@host/a.csv", True, "https://...@host/a.csv: credentials in the URL"),
        ("https://host/a.csv?key=1", False, "https://host/a.csv?...: `download: true` on the source fetches it"),
        ("https://h/a.csv?X-Amz-Signature=1f", True, "https://h/a.csv?...: a signature or a token; a recipe is kept"),
        ("https://h/a.csv?x=1&access_token=", True, "https://h/a.csv?...: a signature or a token; a recipe is kept"),
        ("http://host/a.csv", True, "http://host/a.csv: `download: http` on the source fetches it"),
    ],
)
def test_source_refuses_url(url, download, expected):
    for keys in ({"path": url}, {"path": "a.csv", "image_root": [url]}):
        with pytest.raises(ValidationError) as caught:
            Source(download=download, **keys)
        (error,) = caught.value.errors()
        assert expected in error["msg"]


def test_source_refuses_local_and_remote_paths_in_one():
    with pytest.raises(ValidationError, match="expected all paths at URLs, or none: make two sources of them"):
        Source(path=["a.csv", "s3://b/a.csv"])
    assert Source(path="a.csv", image_root="s3://b/images").is_remote
    assert not Source(path="a.csv", image_root="images").is_remote


def test_url_is_not_made_relative_to_the_recipe(tmp_path):
    keys = ("data", "sources")
    given = [{"path": ["s3://b//a.csv", "https://host/a.csv?x=~"], "image_root": "gs://b/i.zip"}]
    assert absolute_paths(given, keys, tmp_path) == given
