"""Independent tasks in worker processes, a bounded number at a time, so that memory does not grow with the work."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from modeling.errors import UserError

Task = TypeVar("Task")


def run_all(tasks: Iterable[Task], work: Callable[[Task], None], *, workers: int) -> None:
    """Call work(task) for each; `work` is sent once to each worker. A single task, or one worker, is done right here.

    Workers are spawned, never forked: the caller may have threads.
    """
    coming = iter(tasks)
    first = list(islice(coming, 2))
    if workers < 2 or len(first) < 2:
        for task in chain(first, coming):
            work(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work,))
    try:
        for finished in _bounded(pool, chain(first, coming), most=3 * workers):
            finished.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died, most likely for want of memory; try fewer: data.workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _bounded(pool: ProcessPoolExecutor, tasks: Iterator[Any], *, most: int) -> Iterator["Future[None]"]:
    """Futures as they finish, with at most `most` tasks read ahead."""
    running = {pool.submit(_do, task) for task in islice(tasks, most)}
    while running:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        yield from finished
        running |= {pool.submit(_do, task) for task in islice(tasks, len(finished))}


_work: Callable[[Any], None] | None = None


def _start(work: Callable[[Any], None]) -> None:
    """In a worker: an interruption is the parent's business, and parallelism is ours."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(task: Any) -> None:
    assert _work is not None
    _work(task)
