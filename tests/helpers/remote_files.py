"""Remote files: a storage in memory that only tests know, and a cache of their own."""

import fsspec
import pytest

from finetune.data.io import object_storage, remote
from finetune.recipe import urls


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has not asked for any file yet."""
    monkeypatch.setenv(urls.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(object_storage, "PAUSES_S", (0, 0))
    monkeypatch.setattr(remote, "PAUSES_S", (0, 0))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch):
    """Begin as a new process would."""
    monkeypatch.setattr(remote, "_answers", {})
    monkeypatch.setattr(remote, "_listed", {})
    monkeypatch.setattr(remote, "_room", {})


@pytest.fixture
def storage(cache, monkeypatch):
    """Storage under memory://, empty; `pipe_file` writes a file."""
    monkeypatch.setattr(urls, "SCHEMES", (*urls.SCHEMES, "memory"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


def fetched(cache):
    """Return the names of the files in the cache, below it."""
    return sorted(path.relative_to(cache).as_posix() for path in (cache / "memory").rglob("*") if path.is_file())
