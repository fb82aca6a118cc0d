"""Paths -> data files, and the fingerprint of their content."""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_files import refusal, written
from sources import make_source

from finetune.data.formats.read_records import read_records
from finetune.data.io import source_files
from finetune.data.io.source_files import files_of, fingerprint, hash_share, is_hashed
from finetune.distributed.node_group import NodeGroup
from modeling.errors import UserError


def test_files_of_folders_and_patterns(tmp_path):
    for name in (
        "b.jsonl",
        "a.csv.gz",
        "sub/c.parquet",
        ".hidden.jsonl",
        ".git/x.json",
        "notes.md",
        "photo.jpg",
        "B.JSON",
    ):
        written(tmp_path / name, b"")
    found = [str(path.relative_to(tmp_path)) for path in files_of(make_source("auto", (tmp_path,)))]
    assert found == ["B.JSON", "a.csv.gz", "b.jsonl", "sub/c.parquet"]
    files = files_of(make_source("auto", (tmp_path / "b.jsonl", tmp_path / "*.csv*", tmp_path / "su?")))
    assert files == [tmp_path / "b.jsonl", tmp_path / "a.csv.gz", tmp_path / "sub" / "c.parquet"]
    written(tmp_path / "odd[1].jsonl", b"")
    assert files_of(make_source("auto", (tmp_path / "odd[1].jsonl",))) == [tmp_path / "odd[1].jsonl"]


def test_missing_paths(tmp_path):
    written(tmp_path / "dialogues.jsonl", b"")
    written(tmp_path / "notes" / "a.md", b"")
    missing = refusal(files_of, make_source("auto", (tmp_path / "dialogue.jsonl",)))
    assert missing == f"{tmp_path}/dialogue.jsonl: nothing is there; did you mean dialogues.jsonl?"
    assert "x*.jsonl: nothing is there" in refusal(files_of, make_source("auto", (tmp_path / "x*.jsonl",)))
    assert "none is no folder" in refusal(files_of, make_source("auto", (tmp_path / "none" / "a.jsonl",)))
    assert "no data file below it" in refusal(files_of, make_source("auto", (tmp_path / "notes",)))
    unknown = refusal(read_records, make_source("auto", (tmp_path / "notes" / "a.md",)))
    assert "a.md: expected a file that ends in .json, .json.gz, .json.zst, .jsonl" in unknown


def test_unknown_suffix_before_first_record(tmp_path):
    good, bad = written(tmp_path / "a.jsonl", '{"a": 1}'), written(tmp_path / "b.xlsx", b"")
    with pytest.raises(UserError, match=r"b\.xlsx"):
        next(iter(read_records(make_source("auto", (good, bad)))))


def test_fingerprint_of_content(tmp_path):
    def of(*paths, **settings):
        return fingerprint(make_source("auto", paths, **settings))

    first, second = written(tmp_path / "a.jsonl", "{}"), written(tmp_path / "sub" / "b.jsonl", "{}")
    assert len(of(first)) == 64
    assert of(first) == of(second)
    assert of(first) != of(first, second)
    assert of(first) != of(written(tmp_path / "c.jsonl", "{} "))
    archive = written(tmp_path / "images.zip", b"PK")
    with_archive = of(first, image_root=(archive,))
    assert with_archive != of(first) == of(first, image_root=(tmp_path,))
    written(archive, b"PKPK")
    assert with_archive != of(first, image_root=(archive,))
    assert of(first, image_root=(archive,)) == of(first, image_root=(archive / "inner",))


def test_fingerprint_local_hub_folder(tmp_path):
    """The fingerprint of a local hub folder changes with its files."""
    written(tmp_path / "set" / "train.jsonl", '{"a": 1}')
    before = fingerprint(make_source("auto", hub=str(tmp_path / "set")))
    written(tmp_path / "set" / "train.jsonl", '{"a": 2}')
    changed = fingerprint(make_source("auto", hub=str(tmp_path / "set")))
    (tmp_path / "set" / "train.jsonl").rename(tmp_path / "set" / "test.jsonl")
    assert len({before, changed, fingerprint(make_source("auto", hub=str(tmp_path / "set")))}) == 3


def test_fingerprint_cache(tmp_path, monkeypatch):
    """A file that has not changed is not read again."""
    path, cache = written(tmp_path / "a.jsonl", "{}"), tmp_path / "cache" / "digests.json"
    os.utime(path, ns=(0, time.time_ns() - 10**10))
    source = make_source("auto", (path,), on_broken="keep")
    plain = fingerprint(source)
    assert fingerprint(source, cache) == plain
    kept = json.loads(cache.read_text())
    assert list(kept) == [str(path.resolve())]
    size, changed, digest = kept[str(path.resolve())]
    assert digest == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of {}
    cache.write_text(json.dumps({str(path.resolve()): [size, changed, "0" * 64]}))
    assert fingerprint(source, cache) != plain  # so the file was not read
    os.utime(path, ns=(0, time.time_ns() - 2 * 10**10))
    assert fingerprint(source, cache) == plain
    for broken in ("", "[]", "{", '{"x": 1}', json.dumps({str(path.resolve()): "x"})):
        cache.write_text(broken)
        assert fingerprint(source, cache) == plain


def test_fingerprint_cache_skips_recent_files(tmp_path):
    """The digest of a file changed a moment ago is not kept."""
    path, cache = written(tmp_path / "a.jsonl", "{}"), tmp_path / "digests.json"
    fingerprint(make_source("auto", (path,), on_broken="keep"), cache)
    assert json.loads(cache.read_text()) == {}


def test_fingerprint_hashes_large_files_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "HASHED_BYTES", 4)
    source = make_source("text", (written(tmp_path / "a.jsonl", b"0123456789"),))
    pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"0123", b"4567", b"89"))
    expected = json.dumps([hashlib.sha256(pieces).hexdigest()])
    assert fingerprint(source) == hashlib.sha256(expected.encode()).hexdigest()


class OneOfTwo(NodeGroup):
    """A node of two, each a thread of this process; `shared` is what they tell each other."""

    def __init__(self, which, shared, barrier):
        super().__init__(which, 2)
        self.shared, self.barrier = shared, barrier

    def on_main(self, step, work):
        if self.which == 0:
            self.shared[step] = work()
        self.barrier.wait(10)
        return self.shared[step]

    def each(self, step, work):
        self.shared[step, self.which] = work()
        self.barrier.wait(10)
        return [self.shared[step, which] for which in range(2)]


def test_fingerprint_nodes_divide_the_reading(tmp_path, monkeypatch):
    """Both get the fingerprint of one, and no piece is read twice."""
    monkeypatch.setattr(source_files, "HASHED_BYTES", 4)
    paths = [written(tmp_path / name, b"x" * size) for name, size in (("a.jsonl", 10), ("b.jsonl", 0), ("c.csv", 5))]
    source = make_source("text", paths)
    alone, read = fingerprint(source), []
    hash_piece = source_files._hash_piece
    monkeypatch.setattr(source_files, "_hash_piece", lambda piece: (read.append(piece[1:]), hash_piece(piece))[1])
    shared, barrier = {}, threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        nodes = [OneOfTwo(which, shared, barrier) for which in range(2)]
        found = list(threads.map(lambda node: fingerprint(source, tmp_path / "cache.json", node), nodes))
    assert found == [alone, alone]
    a, b, c = paths
    assert sorted(read) == [(a, 0), (a, 4), (a, 8), (b, 0), (c, 0), (c, 4)]


def test_shares_hash_files_once_for_all(tmp_path):
    paths = [written(tmp_path / f"{name}.jsonl", name.encode()) for name in "abc"]
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))
    source, cache = make_source("text", paths), tmp_path / "cache.json"
    hash_share(source, cache, NodeGroup(0, 2))
    assert sorted(json.loads(cache.read_text())) == [str(paths[0]), str(paths[2])]
    assert not is_hashed(source, cache)
    hash_share(source, cache, NodeGroup(1, 2))
    assert is_hashed(source, cache)
