"""One command at a time in a run folder: the second ends at once and says who is there; a killed one leaves nothing."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
from contextlib import ExitStack, contextmanager

import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.distributed import lock
from finetune.distributed.lock import LOCK, locked, working_in
from finetune.pipeline import open_run
from finetune.recipe.load import load_recipe
from modeling.errors import UserError

FORK = multiprocessing.get_context("fork")


def hold(place, ready, begin=lambda: None):
    with working_in(place):
        begin()
        ready.set()
        signal.pause()


@contextmanager
def held_by_another(place, begin=lambda: None):
    """Another process works in the folder; it is yielded."""
    ready = FORK.Event()
    other = FORK.Process(target=hold, args=(place, ready, begin))
    other.start()
    try:
        assert ready.wait(20)
        yield other
    finally:
        other.kill()
        other.join()


def test_lock_says_who_holds_it_and_ends_with_its_process(tmp_path):
    place = tmp_path / "run"
    with held_by_another(place) as other:
        said = rf"^{place}: another command works here: process {other.pid} on \S+, since \d{{4}}-\d\d-\d\d .*\n"
        expected = pytest.raises(UserError, match=said + r"  wait until it has ended, or stop it; .*output=runs/NAME")
        with expected, working_in(place):
            pytest.fail("in")
    with working_in(place):  # killed -9
        assert (place / LOCK).is_file()
        (place / "result").touch()
    assert [path.name for path in place.iterdir()] == ["result"]


def test_lock_is_not_kept_by_a_worker_that_outlives_its_process(tmp_path):
    pids = FORK.SimpleQueue()

    def fork():
        if (pid := os.fork()) == 0:
            signal.pause()
        pids.put(pid)

    with held_by_another(tmp_path / "run", fork):
        worker = pids.get()
    try:
        os.kill(worker, 0)
        with working_in(tmp_path / "run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_lock_leaves_no_folder_where_nothing_was_put(tmp_path):
    with working_in(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_lock_whose_content_is_odd(tmp_path, content):
    with held_by_another(tmp_path / "run"):
        (tmp_path / "run" / LOCK).write_bytes(content)
        expected = pytest.raises(UserError, match="another command works here: a process that has just started")
        with expected, working_in(tmp_path / "run"):
            pytest.fail("in")


def test_lock_on_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with working_in(tmp_path / "run"):
        (tmp_path / "run" / "result").touch()
    assert "this disk has no locks (No locks available); start no second command" in capsys.readouterr().err


def test_lock_deleted_by_its_last_holder_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """Between a second command's open and lock, the first one ends and deletes the file; a third would make another."""
    original, calls = os.open, []

    def slow(path, *args, **kwargs):
        descriptor = original(path, *args, **kwargs)
        if str(path).endswith(LOCK) and not calls:
            calls.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(lock.os, "open", slow)
    with locked(tmp_path / LOCK, what="here", instead="there"):
        assert (tmp_path / LOCK).is_file()
    assert len(calls) == 1


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_lock_where_there_can_be_no_folder(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="expected a folder to work in"), working_in(tmp_path / place):
        pytest.fail("in")


def test_lock_keeps_every_verb_out(recipe_file, tmp_path):
    """Every verb that writes in a run folder is locked out."""
    place = tmp_path / "run"
    with open_run(load_recipe(recipe_file)) as run_dir:
        (run_dir.folder / "adapter").mkdir()
    before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    commands = [[verb, recipe_file] for verb in ("run", "train", "evaluate", "merge")]
    with ExitStack() as both:
        other = both.enter_context(held_by_another(place))
        for command in [*commands, ["merge", place], ["merge", place / "adapter"]]:
            outcome = CliRunner().invoke(app, [str(word) for word in command])
            assert outcome.exit_code == 1, command
            assert f"another command works here: process {other.pid} on" in outcome.stderr, command
            assert not re.search("Traceback", outcome.output)
    assert {path: path.stat().st_mtime_ns for path in place.iterdir() if path.name != LOCK} == before
