"""Rows of a trainer that a thread makes before they are asked for, and how long the trainer still waited for them."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch

from finetune.data.collate import Batch, Rows
from finetune.planning.estimate import PREFETCHED
from modeling.device import pin_batch
from modeling.loading import CPU


class PrefetchedRows:
    """The trainer's data collator: while one row is trained on, the next ones are decoded.

    One thread makes them, in order, as streams must be read. Rows are asked for in steps of `stride`, the number of
    processes. A row's own errors are raised where it is asked for.
    """

    def __init__(self, rows: Rows, *, stride: int = 1, depth: int = PREFETCHED, device: torch.device = CPU):
        """`depth`: rows made beyond the one that was asked for last; for a GPU `device` they are in pinned memory."""
        self.rows, self.stride, self.depth, self.device = rows, stride, depth, device
        self.waited = 0.0
        """Seconds that the trainer has waited for rows, since the beginning."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: dict[int, Future[Batch]] = {}

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        (feature,) = features
        number, started = feature["row"], time.perf_counter()
        wanted = [number + ahead * self.stride for ahead in range(self.depth + 1)]
        self._coming = {
            row: self._coming.get(row) or self._pool.submit(self._make, row) for row in wanted if row < len(self.rows)
        }
        batch = self._coming.pop(number).result()
        self.waited += time.perf_counter() - started
        return batch

    def _make(self, number: int) -> Batch:
        return cast(Batch, pin_batch(self.rows.at(number), self.device))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
