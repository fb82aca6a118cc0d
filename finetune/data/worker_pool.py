"""Tasks done by several processes, with the progress of each counted, and ended at once if one fails."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any, TypeVar

from modeling.errors import UserError

Task = TypeVar("Task")

Work = Callable[[Task], Iterator[int]]
"""Does a task, and yields now and then how many records are done since the last time."""

SECONDS = 0.2
"""How often progress is looked at."""


def run_all(tasks: Sequence[Task], work: Work[Task], *, workers: int) -> Iterator[None]:
    """Do all tasks, and yield once for each record that is done. `work` is sent once to each worker.

    With one task or one worker, no process is started. Workers are spawned, never forked: the caller may have threads,
    and a GPU. Whatever ends the iteration early, an error or the caller, ends the workers after their current records;
    if the caller is killed, they end at once.

    Raises UserError: a worker was killed; and whatever `work` raises.
    """
    workers = min(workers, len(tasks))
    if workers < 2:
        for task in tasks:
            for count in work(task):
                yield from repeat(None, count)
        return
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Value("b", 0)
    start: Any = (work, done, stop)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=start)
    seen = 0
    try:
        running = {pool.submit(_do, task) for task in tasks}
        while running:
            finished, running = wait(running, timeout=SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            now = done.value
            yield from repeat(None, now - seen)
            seen = now
    except BrokenProcessPool as error:
        raise UserError("a worker process died, most likely out of memory; try fewer: data.workers=1") from error
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


_worker: Any = None
"""In a worker: what `_start` got."""


def _start(*worker: Any) -> None:
    """Initialise a worker: it ignores Ctrl-C, which the parent handles, and uses one thread."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def end_with_parent() -> None:
    """End this process when the parent has died: a worker that waits for it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Any) -> None:
    work, done, stop = _worker
    for count in work(task):
        with done.get_lock():
            done.value += count
        if stop.value:
            return
