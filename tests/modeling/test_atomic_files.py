"""Files that are whole or not there, and JSON that names itself."""

import os
import socket
from pathlib import Path

import pytest

from modeling.atomic_files import atomic_write, open_regular, partial_of, read_json, write_json
from modeling.errors import UserError


def test_atomic_write_keeps_old_file(tmp_path, monkeypatch):
    """Atomic write keeps the old file until the new one is whole."""
    path = tmp_path / "note.json"
    write_json(path, {"step": 1})
    flushed = []  # the file before it gets its name, then the folder
    monkeypatch.setattr("modeling.atomic_files.os.fsync", lambda descriptor: flushed.append(path.read_text()))
    write_json(path, {"step": 2})
    assert flushed == [
        '{\n  "step": 1\n}\n',
        '{\n  "step": 2\n}\n',
    ]
    assert not partial_of(path).exists()


def test_atomic_write_not_unicode(tmp_path):
    """Atomic write escapes what is no unicode."""
    write_json(tmp_path / "a.json", {"name": "caf\u00e9 \ud800"})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "name": "caf\xc3\xa9 \\ud800"\n}\n'
    assert read_json(tmp_path / "a.json") == {"name": "caf\u00e9 \ud800"}
    atomic_write(tmp_path / "b.bin", b"\xff")
    assert (tmp_path / "b.bin").read_bytes() == b"\xff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON (Expecting value: line 1 column 1 (char 0)); it may be cut short: delete it"),
        (b'{"step": 1', "not JSON (Expecting ',' delimiter: line 1 column 11 (char 10)); it may be cut short"),
        (b'{"a": "\xff"}', "not JSON ('utf-8' codec can't decode byte 0xff in position 7: invalid start byte)"),
        (b"[" * 100_000, "not JSON (maximum recursion depth exceeded"),
        (b"[1]", "expected a JSON object, got list; delete it, and give the same command again"),
        (b"null", "expected a JSON object, got NoneType"),
    ],
    ids=["empty", "cut", "no-utf8", "deep", "list", "null"],
)
def test_read_json_damaged(tmp_path, content, message):
    """Read JSON names a damaged file."""
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_json(path)
    assert str(refused.value).startswith(f"{path}: {message}")


def test_read_json_missing(tmp_path):
    """Read JSON of no file."""
    assert read_json(tmp_path / "none.json") is None


@pytest.fixture
def odd_places(tmp_path):
    """One of each kind that is no file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("pipe")
    yield tmp_path
    listening.close()


def test_open_regular(odd_places):
    """Open regular reads a file and waits for nothing else."""
    path = odd_places / "file"
    path.write_bytes(b"abc")
    with open_regular(path) as file:
        assert (file.read(2), file.read()) == (b"ab", b"c")
    for name, found in [("pipe", "a pipe"), ("link", "a pipe"), ("socket", "a socket"), ("folder", "a folder")]:
        with pytest.raises(OSError, match=f"expected a file, found {found}"):
            open_regular(odd_places / name)
    with pytest.raises(OSError, match="expected a file, found a device"):
        open_regular(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        open_regular(odd_places / "nothing")
