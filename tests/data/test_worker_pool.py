"""Every task done once, in whatever order; whatever goes wrong is raised where the tasks are given, and ends all."""

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.data.conversation import RecordError
from finetune.data.worker_pool import run_all
from modeling.errors import UserError


@dataclass(frozen=True)
class Write:
    """Leaves a file of the task's name that tells which process wrote it; each task has two records."""

    folder: Path

    def __call__(self, task):
        path = self.folder / str(task)
        path.write_text(path.read_text() + "again" if path.exists() else str(os.getpid()))
        yield 2


def fail(task):
    yield 1
    if task == 3:
        raise RecordError("too long", "9 tokens")


def misuse(task):
    yield 1
    raise UserError(f"no such thing as {task}")


def die(task):
    yield 1
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def endless(task):
    """The first task fails when the second has begun, which goes on for ever."""
    if task == 0:
        time.sleep(0.5)
        raise UserError("no such thing")
    while True:
        time.sleep(0.01)
        yield 1


def written(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_workers_do_each_task_once_in_other_processes(tmp_path):
    assert len(list(run_all(range(20), Write(tmp_path), workers=2))) == 40
    done = written(tmp_path)
    assert sorted(done) == sorted(map(str, range(20)))
    assert str(os.getpid()) not in done.values()
    assert 1 <= len(set(done.values())) <= 2


@pytest.mark.parametrize(("tasks", "workers"), [(0, 4), (1, 4), (3, 1), (3, 0)])
def test_one_task_or_one_worker_needs_no_other_process(tasks, workers, tmp_path):
    assert len(list(run_all(range(tasks), Write(tmp_path), workers=workers))) == 2 * tasks
    assert written(tmp_path) == {str(task): str(os.getpid()) for task in range(tasks)}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_a_task_is_the_callers(workers):
    with pytest.raises(RecordError) as caught:
        list(run_all(range(100), fail, workers=workers))
    assert (caught.value.reason, caught.value.detail) == ("too long", "9 tokens")
    with pytest.raises(UserError, match="no such thing as"):
        list(run_all(range(5), misuse, workers=workers))


def test_an_error_ends_the_other_workers_in_the_middle_of_their_tasks():
    with pytest.raises(UserError, match="no such thing"):
        list(run_all(range(2), endless, workers=2))


def test_a_caller_that_goes_away_ends_the_workers():
    progress = run_all(range(1, 3), endless, workers=2)
    next(progress)
    progress.close()


def test_a_worker_that_is_killed_is_reported_with_a_way_out():
    with pytest.raises(UserError) as caught:
        list(run_all(range(5), die, workers=2))
    assert str(caught.value) == "a worker process died, most likely out of memory; try fewer: data.workers=1"


@dataclass(frozen=True)
class Note:
    """Leaves a file named by the process. The first task is done when the second has begun, which goes on for ever."""

    folder: Path

    def __call__(self, task):
        (self.folder / str(os.getpid())).touch()
        while task == 1 or len(written(self.folder)) < 2:
            time.sleep(0.01)
            yield 1


def run_in_two(folder):
    list(run_all(range(2), Note(folder), workers=2))


def test_workers_end_when_the_caller_is_killed(tmp_path):
    """One of them is at work, the other waits for a task."""
    caller = multiprocessing.get_context("spawn").Process(target=run_in_two, args=(tmp_path,))
    caller.start()
    try:
        wait_until(lambda: len(written(tmp_path)) == 2)
        time.sleep(0.1)
    finally:
        caller.kill()
        caller.join()
    wait_until(lambda: not any(map(is_running, written(tmp_path))))


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
