"""Remote files: listed without being read, fetched when they are opened, and kept in a cache of bounded size."""

import errno
import gzip
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_files import read, refusal
from remote_files import fetched, forget
from sources import make_source

from finetune.data.io import object_storage, remote
from finetune.data.io.download import Downloader
from finetune.data.io.paths import is_folder
from finetune.data.io.remote import CACHE_SIZE, open_local
from finetune.data.io.source_files import files_of, fingerprint
from finetune.recipe.urls import path_of, shown
from modeling.errors import UserError

LINES = b'{"a": 1}\n{"a": 2}\n'


def at(*paths, **settings):
    return make_source("auto", paths, **settings)


def urls_of(*paths):
    return [shown(path) for path in files_of(at(*paths))]


@pytest.fixture
def listed(storage):
    for name in ("d/a.jsonl", "d/s/b.jsonl.gz", "d/s/notes.md", "d/.hidden/c.jsonl", "d/.c.jsonl", "e.csv"):
        storage.pipe_file(f"/bucket/{name}", LINES)
    return storage


def test_remote_files_are_listed_as_local_ones(listed, cache):
    both = ["memory://bucket/d/a.jsonl", "memory://bucket/d/s/b.jsonl.gz"]
    assert urls_of("memory://bucket/d") == both
    assert urls_of("memory://bucket/d/") == both
    assert urls_of("memory://bucket/d/**/*.jsonl*") == both
    assert urls_of("memory://*/d/a.jsonl") == [both[0]]
    assert urls_of("memory://bucket/*/a.jsonl") == [both[0]]
    assert urls_of("memory://bucket/*") == [*both, "memory://bucket/e.csv"]
    assert urls_of("memory://bucket/d/[a-c].jsonl", "memory://bucket/e.csv") == [both[0], "memory://bucket/e.csv"]
    assert is_folder(path_of("memory://bucket/d"))
    assert not is_folder(path_of("memory://bucket/e.csv"))
    assert not (cache / "memory").exists()  # nothing was read


def test_remote_name_that_exists_is_no_pattern(storage):
    for name in ("odd[1].jsonl", "odd1.jsonl"):
        storage.pipe_file(f"/bucket/{name}", LINES)
    assert urls_of("memory://bucket/odd[1].jsonl") == ["memory://bucket/odd[1].jsonl"]


def test_remote_path_to_nothing(listed):
    assert refusal(urls_of, "memory://bucket/x.jsonl") == "memory://bucket/x.jsonl: nothing is there"
    pattern = "memory://bucket/x*.jsonl"
    assert refusal(urls_of, pattern) == f"{pattern}: nothing is there that fits this pattern"
    listed.pipe_file("/empty/a.md", b"")
    assert "memory://empty/d: nothing is there" in refusal(urls_of, "memory://empty/d")
    assert "memory://bucket/d/s/notes.md: expected a file that ends in .json" in refusal(
        read, "memory://bucket/d/s/notes.md"
    )


def test_remote_records_and_their_ids(storage, cache):
    """Every kind of reader reads a remote file; ids are what they would be if the folder were on this machine."""
    table = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"a": [3]}), table)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("k.json")
        member.size = 8
        tar.addfile(member, io.BytesIO(b'{"a": 4}'))
    storage.pipe_file("/b/d/a.jsonl", LINES)
    storage.pipe_file("/b/d/s/b.jsonl.gz", gzip.compress(b'{"a": 5}'))
    storage.pipe_file("/b/d/s/c.parquet", table.getvalue())
    storage.pipe_file("/b/d/s/d.tar", archive.getvalue())
    assert read("memory://b/d") == [
        ("a.jsonl:1", {"a": 1}),
        ("a.jsonl:2", {"a": 2}),
        ("s/b.jsonl.gz:1", {"a": 5}),
        ("s/c.parquet#0", {"a": 3}),
        ("s/d.tar/k", {"__key__": "k", "a": 4}),
    ]
    assert fetched(cache) == [f"memory/b/d/{name}" for name in ("a.jsonl", "s/b.jsonl.gz", "s/c.parquet", "s/d.tar")]


def test_remote_folder_of_the_datasets_library(storage):
    """A folder that save_to_disk wrote is read by its split, without what the library keeps beside the data."""
    for name in ("dataset_dict.json", "test/state.json", "train/state.json", "test/a.arrow", "train/a.arrow"):
        storage.pipe_file(f"/b/d/{name}", b"{}")
    storage.pipe_file("/b/d/train/cache-1.arrow", b"")
    assert urls_of("memory://b/d") == ["memory://b/d/train/a.arrow"]
    got = refusal(files_of, at("memory://b/d", split="eval"))
    assert got == "memory://b/d: expected split test or train, got 'eval'"


def test_remote_file_is_fetched_once(storage, cache, monkeypatch):
    storage.pipe_file("/b/a.jsonl", LINES)
    saved = []
    original = object_storage.save
    monkeypatch.setattr(object_storage, "save", lambda url, path: saved.append(url) or original(url, path))
    for _ in range(2):
        assert read("memory://b/a.jsonl") == [("a.jsonl:1", {"a": 1}), ("a.jsonl:2", {"a": 2})]
        forget(monkeypatch)
    assert saved == ["memory://b/a.jsonl"]
    storage.pipe_file("/b/a.jsonl", b'{"a": 7}')
    assert read("memory://b/a.jsonl") == [("a.jsonl:1", {"a": 7})]
    assert len(saved) == 2
    assert list((cache / ".unfinished").iterdir()) == []


def test_remote_file_is_fetched_once_for_all_that_ask_at_once(storage, monkeypatch):
    storage.pipe_file("/b/a.jsonl", LINES)
    saved = []

    def save(url, path):
        saved.append(url)
        time.sleep(0.05)
        return original(url, path)

    original = object_storage.save
    monkeypatch.setattr(object_storage, "save", save)
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(open_local, [path_of("memory://b/a.jsonl")] * 4))
    assert [file.read() for file in opened] == [LINES] * 4
    assert len(saved) == 1


def test_remote_folder_is_listed_once(listed, monkeypatch):
    asked = []
    original = object_storage.find_below
    monkeypatch.setattr(object_storage, "find_below", lambda url: asked.append(url) or original(url))
    for _ in range(2):
        assert len(urls_of("memory://bucket/d")) == 2
        fingerprint(at("memory://bucket/d"))
    assert asked == ["memory://bucket/d"]


def test_remote_file_that_takes_a_while_is_named(storage, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LARGE", 2**20)
    storage.pipe_file("/b/a.jsonl", LINES + b" " * 2**20)
    read("memory://b/a.jsonl")
    assert "fetch memory://b/a.jsonl (1.0 MiB)" in "".join(capsys.readouterr())


def test_remote_files_without_a_connection(listed, cache, monkeypatch):
    """What was listed and fetched before is used where no storage can be asked, as on many clusters' nodes."""
    paths = ("memory://bucket/d/*.jsonl", "memory://bucket/d/s", "memory://bucket/e.csv")
    found, key, records = urls_of(*paths), fingerprint(at(*paths)), read("memory://bucket/d/a.jsonl")
    monkeypatch.setenv(remote.OFFLINE, "1")
    monkeypatch.setattr(object_storage, "_filesystem", None)
    forget(monkeypatch)
    assert len(found) == 3
    assert urls_of(*paths) == found
    assert fingerprint(at(*paths)) == key
    assert read("memory://bucket/d/a.jsonl") == records
    other, new = "memory://bucket/d/s/b.jsonl.gz", "memory://bucket/x.jsonl"
    assert refusal(read, "memory://bucket/d/s") == f"{other}: FINETUNE_OFFLINE is set, and the file is not in {cache}"
    assert refusal(read, new) == f"{new}: FINETUNE_OFFLINE is set, and it was not listed here before"


def test_remote_cache_drops_the_least_recently_opened(storage, cache, monkeypatch):
    monkeypatch.setenv(CACHE_SIZE, "100KB")
    places = {}
    for name in "abc":
        storage.pipe_file(f"/b/{name}", name.encode() * 40_000)
        places[name] = path_of(f"memory://b/{name}")
    for name in "aba":
        open_local(places[name]).close()
    open_local(places["c"]).close()
    assert fetched(cache) == ["memory/b/a", "memory/b/c"]
    assert sorted(path.name for path in (cache / ".versions" / "memory" / "b").iterdir()) == ["a", "c"]
    assert open_local(places["b"]).read() == b"b" * 40_000  # fetched again
    assert fetched(cache) == ["memory/b/b", "memory/b/c"]


def test_remote_cache_keeps_open_files(storage, cache, monkeypatch):
    monkeypatch.setenv(CACHE_SIZE, "100KB")
    for name in "abc":
        storage.pipe_file(f"/b/{name}", name.encode() * 40_000)
    with open_local(path_of("memory://b/a")) as oldest:
        open_local(path_of("memory://b/b")).close()
        open_local(path_of("memory://b/c")).close()
        assert fetched(cache) == ["memory/b/a", "memory/b/c"]
        assert oldest.read() == b"a" * 40_000
    with open_local(path_of("memory://b/c")):
        other = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'rb+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        locked = [sys.executable, "-c", other, cache / "memory/b/c"]
        assert b"BlockingIOError" in subprocess.run(locked, capture_output=True, check=False).stderr


def test_remote_cache_shares_its_room_among_processes(storage, cache, monkeypatch):
    """A process looks at the cache again after it has filled its share of the room, not for every file."""
    monkeypatch.setenv(CACHE_SIZE, "1000KB")
    walks = []
    original = remote._cached_files
    monkeypatch.setattr(remote, "_cached_files", lambda cache: walks.append(1) or original(cache))
    for number in range(13):
        storage.pipe_file(f"/b/{number}", b"x" * 10_000)
        open_local(path_of(f"memory://b/{number}")).close()
    assert len(walks) == 1  # the first file leaves 990 KB, of which an eighth are twelve files
    storage.pipe_file("/b/13", b"x" * 10_000)
    open_local(path_of("memory://b/13")).close()
    assert len(walks) == 2


def test_remote_file_larger_than_the_cache(storage, monkeypatch):
    monkeypatch.setenv(CACHE_SIZE, "3MiB")
    storage.pipe_file("/b/a.jsonl", bytes(2**22))
    got = refusal(read, "memory://b/a.jsonl")
    assert got == (
        "memory://b/a.jsonl: 4.0 MiB, and the cache of remote files may hold 3.0 MiB; set FINETUNE_REMOTE_CACHE_SIZE"
    )
    monkeypatch.setenv(CACHE_SIZE, "much")
    assert "FINETUNE_REMOTE_CACHE_SIZE: expected a size with its unit" in refusal(read, "memory://b/a.jsonl")


def test_remote_cache_without_room_on_disk(storage, cache):
    cache.parent.joinpath("cache").write_bytes(b"a file, where a folder is needed")
    storage.pipe_file("/b/a.jsonl", LINES)
    got = refusal(read, "memory://b/a.jsonl")
    assert got.startswith(f"memory://b/a.jsonl: cannot be kept in {cache}: ")
    assert got.endswith("; FINETUNE_REMOTE_CACHE names another folder, and FINETUNE_REMOTE_CACHE_SIZE limits its size")


def test_remote_disk_is_full(storage, web, cache, monkeypatch):
    """A full disk is no interrupted connection: it is not tried again, and the message says where the files go."""
    attempts = []

    def full(*_):
        attempts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.pipe_file("/b/a.jsonl", LINES)
    monkeypatch.setattr(type(storage), "get_file", full)
    monkeypatch.setattr(Downloader, "_pieces", full)
    for url in ("memory://b/a.jsonl", f"http://127.0.0.1:{web.server_port}/data/a.jsonl"):
        assert f"{url}: cannot be kept in {cache}: No space left on device; " in refusal(read, url)
    assert len(attempts) == 2


def test_remote_leftover_of_a_killed_process(storage, cache):
    for age in (10, 7200):
        path = cache / ".unfinished" / str(age)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        changed = time.time() - age
        os.utime(path, (changed, changed))
    storage.pipe_file("/b/a.jsonl", LINES)
    open_local(path_of("memory://b/a.jsonl")).close()
    assert [path.name for path in (cache / ".unfinished").iterdir()] == ["10"]


def test_remote_fingerprint_reads_nothing(storage, cache, monkeypatch):
    def of(*paths, **settings):
        forget(monkeypatch)
        return fingerprint(at(*paths, **settings))

    storage.pipe_file("/b/d/a.jsonl", LINES)
    storage.pipe_file("/b/i.zip", b"PK")
    before, with_archive = of("memory://b/d"), of("memory://b/d", image_root=("memory://b/i.zip/inner",))
    assert before == of("memory://b/d")
    assert before != with_archive
    assert before == of("memory://b/d", image_root=("memory://b/d",))
    storage.pipe_file("/b/i.zip", b"PKPK")
    assert with_archive != of("memory://b/d", image_root=("memory://b/i.zip/inner",))
    storage.pipe_file("/b/d/a.jsonl", LINES)  # written again: the storage gives another date
    assert before != of("memory://b/d")
    assert not (cache / "memory").exists()


def test_remote_connection_is_tried_again(storage, monkeypatch):
    storage.pipe_file("/b/a.jsonl", LINES)
    attempts = []
    original = storage.get_file

    def interrupted(*arguments):
        attempts.append(1)
        if len(attempts) % 3:
            raise ConnectionResetError("connection reset")
        return original(*arguments)

    monkeypatch.setattr(type(storage), "get_file", lambda self, *arguments: interrupted(*arguments))
    assert len(read("memory://b/a.jsonl")) == 2
    assert len(attempts) == 3
    monkeypatch.setattr(object_storage, "PAUSES_S", (0,))
    storage.pipe_file("/b/b.jsonl", LINES)
    assert refusal(read, "memory://b/b.jsonl") == "memory://b/b.jsonl: connection reset"
    assert len(attempts) == 5


def test_remote_file_that_is_cut_short(storage, cache, monkeypatch):
    storage.pipe_file("/b/a.jsonl", LINES)
    monkeypatch.setattr(type(storage), "get_file", lambda self, url, path: Path(path).write_bytes(LINES[:9]))
    assert refusal(read, "memory://b/a.jsonl") == "memory://b/a.jsonl: got 9 of 18 bytes"
    assert fetched(cache) == []


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError("Forbidden"), "s3://b/a.jsonl: no permission: Forbidden\n  credentials and endpoint are"),
        (NoCredentialsError("Unable to locate"), "s3://b/a.jsonl: Unable to locate\n  credentials and endpoint are"),
        (FileNotFoundError("b/a.jsonl"), "s3://b/a.jsonl: nothing is there"),
    ],
)
def test_remote_refusal_is_final(error, expected, storage, monkeypatch):
    asked = []

    def refuse(url):
        asked.append(url)
        raise error

    monkeypatch.setattr(object_storage, "_filesystem", refuse)
    assert refusal(read, "s3://b/a.jsonl").startswith(expected)
    assert asked == ["s3://b/a.jsonl"]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_remote_package_missing(scheme, package, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    got = refusal(read, f"{scheme}://b/a.jsonl")
    repair = f"pip install 'idefics-finetune[{scheme}]'"
    assert got == f"{scheme}://b/a.jsonl: {scheme}:// needs the package {package}: {repair}"


def test_remote_file_changes_while_it_is_fetched(storage, cache):
    storage.pipe_file("/b/a.jsonl", LINES)
    files_of(at("memory://b/a.jsonl"))
    storage.pipe_file("/b/a.jsonl", LINES[:9])
    got = refusal(read, "memory://b/a.jsonl")
    assert re.fullmatch(r"memory://b/a\.jsonl: expected version 18 [\d.]+, got 9 [\d.]+; it changed meanwhile", got)
    assert fetched(cache) == []


def test_web_file_changes_while_it_is_fetched(web, cache):
    url = f"http://127.0.0.1:{web.server_port}/data/a.jsonl"
    files_of(at(url))
    web.version = 2
    got = refusal(read, url)
    assert got == f'{url}: expected version 18 "1", got 18 "2"; it changed meanwhile'


class Handler(BaseHTTPRequestHandler):
    """/data/a.jsonl is LINES; what `server.faults` holds for a path happens first."""

    def do_GET(self):
        self.server.requests.append(self.path)
        path = self.path.partition("?")[0]
        fault = self.server.faults.pop(0) if self.server.faults else None
        if path != "/data/a.jsonl":
            self.send_error(404)
        elif fault == "busy":
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(LINES)))
            if fault != "unversioned":
                self.send_header("ETag", f'"{self.server.version}"')
            self.end_headers()
            self.wfile.write(LINES[:5] if fault == "cut" else LINES)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(cache, monkeypatch):
    """A web server of this machine, which is no public address: only here it is allowed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.faults, server.version = [], [], 1
    server.handle_error = lambda *_: None  # who only asks what is there hangs up before the body
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(remote, "Downloader", partial(Downloader, allow=lambda address: True))
    yield server
    server.shutdown()
    server.server_close()


def test_web_file(web, cache, monkeypatch):
    url = f"http://127.0.0.1:{web.server_port}/data/a.jsonl"
    first = fingerprint(at(url))
    assert read(url) == [("a.jsonl:1", {"a": 1}), ("a.jsonl:2", {"a": 2})]
    assert web.requests == ["/data/a.jsonl"] * 2  # what is there, and the file
    forget(monkeypatch)
    assert fingerprint(at(url)) == first
    assert len(read(url)) == 2
    assert len(web.requests) == 3
    forget(monkeypatch)
    web.version = 2
    assert fingerprint(at(url)) != first
    assert len(read(url)) == 2
    assert len(web.requests) == 5


def test_web_file_with_a_query(web, cache):
    url = f"http://127.0.0.1:{web.server_port}/data/a.jsonl?key=secret"
    assert [record_id for record_id, _ in read(url)] == ["a.jsonl:1", "a.jsonl:2"]
    assert web.requests == ["/data/a.jsonl?key=secret"] * 2
    assert not [path for path in cache.rglob("*") if "secret" in path.name]
    missing = f"http://127.0.0.1:{web.server_port}/data/b.jsonl?key=secret"
    got = refusal_of_any(read, missing)
    assert got.endswith("/data/b.jsonl?...': HTTP 404 Not Found")
    assert "secret" not in got


def refusal_of_any(function, *arguments):
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    return str(caught.value)


def test_web_connection_is_tried_again(web):
    url = f"http://127.0.0.1:{web.server_port}/data/a.jsonl"
    web.faults = ["busy", None, "cut", "busy", None]
    assert len(read(url)) == 2
    assert len(web.requests) == 5


@pytest.mark.parametrize(
    ("fault", "expected", "requests"),
    [
        ("cut", "IncompleteRead", 4),
        ("busy", "HTTP 503", 3),
        ("unversioned", "neither ETag nor Last-Modified", 1),
    ],
)
def test_web_failure(fault, expected, requests, web, cache):
    web.faults = [fault] * 9 if fault != "cut" else [None, *["cut"] * 9]
    assert expected in refusal_of_any(read, f"http://127.0.0.1:{web.server_port}/data/a.jsonl")
    assert len(web.requests) == requests
    assert not (cache / "http").exists() or not [path for path in (cache / "http").rglob("*") if path.is_file()]


def test_web_private_address_is_refused(cache):
    got = refusal_of_any(read, "http://127.0.0.1:9/a.jsonl")
    assert got == "download failed: 'http://127.0.0.1:9/a.jsonl': 127.0.0.1 is at 127.0.0.1, which is no public address"


def test_web_patterns_are_names(web):
    url = f"http://127.0.0.1:{web.server_port}/data/*.jsonl"
    assert "HTTP 404" in refusal_of_any(read, url)
    assert web.requests == ["/data/*.jsonl"]
