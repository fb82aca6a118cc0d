"""Places to write to are looked at before the work: what cannot be written is one line, and nothing is made."""

import errno
import os
from pathlib import Path

import pytest

from finetune.distributed.writable import check_place
from modeling.errors import UserError


@pytest.fixture
def around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("x")
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere/at/all")
    Path("linked").symlink_to("folder")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "folder", "problem"),
    [
        ("folder", False, "is a folder; expected a file"),
        ("linked", False, "is a folder; expected a file"),
        ("pipe", False, "is a pipe or a device; expected a file"),
        ("/dev/null", False, "is a pipe or a device; expected a file"),
        ("file", True, "is a file; expected a folder"),
        ("pipe", True, "is a file; expected a folder"),
        ("file/below/it", True, "cannot be written: {}/file is a file, not a folder; choose another place"),
        ("file/page.html", False, "cannot be written: {}/file is a file, not a folder; choose another place"),
        ("loop", False, "is not a valid path: Too many levels of symbolic links"),
        ("loop/x", True, "is not a valid path: Too many levels of symbolic links"),
        ("a\0b", False, "is not a valid path: embedded null byte"),
        ("no/such/" + "é" * 150, True, "is not a valid path: a part of it has 300 bytes, and 255 is the most"),
        ("x" * 250, False, "is not a valid path: a part of it has 258 bytes, and 255 is the most"),
        ("x/" * 3000, True, "is not a valid path: File name too long"),
    ],
)
def test_not_writable(around, path, folder, problem):

    with pytest.raises(UserError) as raised:
        check_place("--out", Path(path), folder=folder)
    assert str(raised.value) == f"--out: {str(Path(path))!r:.200} {problem.format(around)}"


@pytest.mark.parametrize("path", ["\ud800", "a/\udfff/b"])
def test_not_writable_any_name(around, path):
    with pytest.raises(UserError, match=r"^--out: '.*' is not a valid path: "):
        check_place("--out", Path(path))


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("file", False),
        ("folder", True),
        ("linked", True),
        ("new", False),
        ("no/such/yet", True),
        ("no/such/yet.html", False),
        ("dangling", False),
        ("folder/../new", False),
        ("x" * 247, False),
        (".", True),
    ],
)
def test_writable_leaves_nothing(around, path, folder):
    before = sorted(around.rglob("*"))
    check_place("--out", Path(path), folder=folder)
    assert sorted(around.rglob("*")) == before


@pytest.mark.parametrize(
    ("path", "folder"), [("shut/new", False), ("shut/file", False), ("shut", True), ("shut/a/b", True)]
)
def test_not_writable_read_only(around, monkeypatch, path, folder):
    (around / "shut").mkdir()
    (around / "shut" / "file").touch()

    def refuse(dir):  # root may write everywhere
        assert dir == around / "shut"
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("finetune.distributed.writable.TemporaryFile", refuse)
    with pytest.raises(UserError) as raised:
        check_place("--out", Path(path), folder=folder)
    said = f"cannot be written: no file can be made in {around / 'shut'}: Permission denied; choose another place"
    assert str(raised.value) == f"--out: {path!r} {said}"


@pytest.mark.parametrize("path", ["/proc/nothing", "/proc/no/such.html"])
def test_not_writable_although_permissions_allow_it(path):
    """Where no file can be made although permissions allow it."""
    with pytest.raises(UserError, match="cannot be written: no file can be made in /proc: "):
        check_place("--html", Path(path))


def test_not_writable_read_only_file(around, monkeypatch):
    """A file that is read only is not replaced."""
    monkeypatch.setattr("finetune.distributed.writable.os.access", lambda place, mode: place != around / "file")
    with pytest.raises(UserError, match="'file' is read-only; choose another place"):
        check_place("--out", Path("file"))
