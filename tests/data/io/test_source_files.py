"""Paths -> data files, and the fingerprint of their content."""

import json
import os
import time

import pytest
from data_files import refusal, written
from sources import make_source

from finetune.data.formats.read_records import read_records
from finetune.data.io.source_files import files_of, fingerprint
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
