"""Every task done once, in whatever order; read ahead no further than needed; whatever goes wrong is told."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.data.conversation import RecordError
from finetune.data.parallel_parts import run_all
from modeling.errors import UserError


@dataclass(frozen=True)
class Write:
    """Leaves a file of the task's name that tells which process wrote it."""

    folder: Path

    def __call__(self, task):
        path = self.folder / str(task)
        path.write_text(path.read_text() + "again" if path.exists() else str(os.getpid()))


def fail(task):
    if task == 3:
        raise RecordError("too long", "9 tokens")


def misuse(task):
    raise UserError(f"no such thing as {task}")


def die(task):
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def written(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_workers_do_each_task_once_in_other_processes(tmp_path):
    run_all(range(20), Write(tmp_path), workers=2)
    done = written(tmp_path)
    assert sorted(done) == sorted(map(str, range(20)))
    assert str(os.getpid()) not in done.values()
    assert 1 <= len(set(done.values())) <= 2


@pytest.mark.parametrize(("tasks", "workers"), [(0, 4), (1, 4), (3, 1), (3, 0)])
def test_one_task_or_one_worker_needs_no_other_process(tasks, workers, tmp_path):
    run_all(range(tasks), Write(tmp_path), workers=workers)
    assert written(tmp_path) == {str(task): str(os.getpid()) for task in range(tasks)}


def test_tasks_are_read_little_ahead_of_what_is_done(tmp_path):
    ahead = []

    def tasks():
        for task in range(40):
            ahead.append(task - len(list(tmp_path.iterdir())))
            yield task

    run_all(tasks(), Write(tmp_path), workers=2)
    assert len(written(tmp_path)) == len(ahead) == 40
    assert max(ahead) <= 3 * 2
    ahead.clear()
    for path in tmp_path.iterdir():
        path.unlink()
    run_all(tasks(), Write(tmp_path), workers=1)
    assert max(ahead) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_a_task_is_the_callers(workers):
    with pytest.raises(RecordError) as caught:
        run_all(range(100), fail, workers=workers)
    assert (caught.value.reason, caught.value.detail) == ("too long", "9 tokens")
    with pytest.raises(UserError, match="no such thing as"):
        run_all(range(5), misuse, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_the_tasks_themselves_is_the_callers(workers):
    def tasks():
        yield from range(4)
        raise UserError("data.jsonl: nothing is there")

    with pytest.raises(UserError, match="nothing is there"):
        run_all(tasks(), str, workers=workers)


def test_a_worker_that_is_killed_is_told_with_a_way_out():
    with pytest.raises(UserError) as caught:
        run_all(range(5), die, workers=2)
    assert str(caught.value) == "a worker process died, most likely out of memory; try fewer: data.workers=1"
