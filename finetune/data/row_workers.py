"""Rows made by worker processes, those of torch's DataLoader. They import this file, and so not the model."""

import atexit
import signal
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from finetune.data.collate import Batch, MadeRow, Rows
from finetune.data.worker_pool import end_with_parent
from modeling.errors import UserError


def made_by_workers(rows: Rows, numbers: range, *, workers: int, ahead: int) -> Iterator[MadeRow | UserError]:
    """Yield the rows of these numbers in order, each the row or its error; workers make `ahead` rows each in advance.

    Worker w makes every row `numbers[w::workers]`. Workers are spawned, never forked: the caller may have threads and a
    GPU. Closing the iterator ends them, and so does the end of this process. Raises UserError: a worker was killed.
    """
    loader = DataLoader(
        _Made(rows, numbers),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=ahead,
        multiprocessing_context="spawn",
        worker_init_fn=_start,
        generator=torch.Generator(),  # else the loader draws a seed from the trainer's
    )
    made = _receive(loader)
    atexit.register(_close, weakref.ref(made))  # before multiprocessing waits for processes that wait to be read
    return made


def _close(made: "weakref.ref[Generator[MadeRow | UserError, None, None]]") -> None:
    if still_open := made():
        still_open.close()


def _receive(loader: DataLoader[MadeRow | UserError]) -> Generator[MadeRow | UserError, None, None]:
    coming: Any = iter(loader)
    # Half a row of a worker that was killed may be in the pipe. Reading the rest ends when no process can write it:
    # then torch finds which one died.
    coming._worker_result_queue._writer.close()
    threading.Thread(target=_end_with_any, args=(coming._workers,), daemon=True).start()
    try:
        for made in coming:
            yield made if isinstance(made, UserError) else replace(made, batch=_each(torch.from_numpy, made.batch))
    except (RuntimeError, OSError, EOFError) as error:
        if str(error) and not str(error).startswith(_DIED):
            raise
        raise UserError(
            "a process that makes rows died, most likely out of memory; try fewer: data.workers=1"
        ) from error


_DIED = ("DataLoader worker (pid", "got end of file during message")
"""How errors begin that reading from the pipe raises where a worker has died; an EOFError says nothing."""


def _end_with_any(workers: Sequence[BaseProcess]) -> None:
    """Kill the other workers when one has died; return when all have ended."""
    left = list(workers)
    while left:
        ready = wait([one.sentinel for one in left])
        for one in left:
            while one.sentinel in ready and one.exitcode is None:  # another thread is asking at the same time
                time.sleep(0.01)
        left = [one for one in left if one.exitcode is None]
        if any(one.exitcode for one in workers):
            for one in left:
                one.kill()


class _Made(IterableDataset[MadeRow | UserError]):
    def __init__(self, rows: Rows, numbers: range):
        self.rows, self.numbers = rows, numbers

    def __iter__(self) -> Iterator[MadeRow | UserError]:
        worker = get_worker_info()
        assert worker is not None
        for number in self.numbers[worker.id :: worker.num_workers]:
            try:
                made = self.rows.make(number)
            except UserError as error:
                yield error
            else:
                # Arrays go through a pipe. Tensors would go through /dev/shm, which is 64 MB in most containers, and
                # each would keep a file open until its row was trained on.
                yield replace(made, batch=_each(torch.Tensor.numpy, made.batch))


def _each(change: Any, batch: Batch) -> Batch:
    """Return a batch with its tensors, or arrays, changed."""
    return cast(Batch, {name: change(one) if hasattr(one, "dtype") else one for name, one in batch.items()})


def _unchanged(made: MadeRow | UserError) -> MadeRow | UserError:
    return made


def _start(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may go to all processes, to the trainer: it finishes its step, and ends these."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
