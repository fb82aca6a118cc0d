"""Rows of a trainer that are made before they are asked for, and how long the trainer still waited for them."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import cast

import torch

from finetune.data.collate import Batch, MadeRow, Rows
from finetune.data.row_workers import made_by_workers
from finetune.planning.estimate import PREFETCHED
from modeling.cpu_cores import available_cores
from modeling.device import pin_batch
from modeling.errors import UserError
from modeling.loading import CPU


class PrefetchedRows:
    """The trainer's data collator: while one row is trained on, the next ones are made.

    One thread makes them in order, or receives them from `workers` processes. Rows are asked for in steps of `stride`,
    the number of processes that train. A row's own errors are raised where it is asked for.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        stride: int = 1,
        depth: int = PREFETCHED,
        device: torch.device = CPU,
        workers: int = 0,
    ):
        """`depth`: rows made beyond the one that was asked for last; for a GPU `device` they are in pinned memory."""
        self.rows, self.stride, self.depth, self.device, self.workers = rows, stride, depth, device, workers
        self.waited = 0.0
        """Seconds that the trainer has waited for rows, since the beginning."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: dict[int, Future[MadeRow]] = {}
        self._received: Iterator[MadeRow | UserError] = iter(())
        self._next: int | None = None
        """Number of the next row from the workers."""

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        (feature,) = features
        number, started = feature["row"], time.perf_counter()
        wanted = [number + ahead * self.stride for ahead in range(self.depth + 1)]
        self._coming = {
            row: self._coming.get(row) or self._pool.submit(self._make, row) for row in wanted if row < len(self.rows)
        }
        batch = self.rows.take(self._coming.pop(number).result())
        self.waited += time.perf_counter() - started
        return batch

    def _make(self, number: int) -> MadeRow:
        made = self._receive(number) if self.workers else self.rows.make(number)
        return replace(made, batch=cast(Batch, pin_batch(made.batch, self.device)))

    def _receive(self, number: int) -> MadeRow:
        """Return the row from the workers, which begin anew where it is not the next one."""
        if number != self._next:
            self._received = made_by_workers(
                self.rows,
                range(number, len(self.rows), self.stride),
                workers=self.workers,
                ahead=math.ceil(self.depth / self.workers),
            )
        self._next = None
        made = next(self._received)
        self._next = number + self.stride
        if isinstance(made, UserError):
            raise made
        return made

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._received = iter(())


def row_workers(rows: Rows, wanted: int | None, *, processes: int) -> int:
    """Return the number of worker processes that make the rows of one of the `processes` that train; 0: a thread does.

    `wanted` is the recipe's `data.workers`. By default, each process leaves one of its share of the cores to the
    trainer.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = max(available_cores() // local - 1, 0) if wanted is None else wanted
    return rows.workers(most, processes=processes)
