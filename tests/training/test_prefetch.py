"""Rows are made before they are asked for, in the order of who asks, and are the rows all the same."""

import threading
import time
from dataclasses import replace

import pytest

from finetune.data.collate import MadeRow
from finetune.planning.estimate import PREFETCHED
from finetune.training import prefetch
from finetune.training.prefetch import PrefetchedRows, row_workers
from modeling.errors import UserError


class Numbers:
    """A row is its number; `gate` holds back all rows from `held` on."""

    def __init__(self, count, held=10**9):
        self.count, self.held, self.gate = count, held, threading.Event()
        self.made, self.taken = [], []

    def __len__(self):
        return self.count

    def workers(self, most, *, processes):
        return most

    def make(self, number):
        if number >= self.held:
            assert self.gate.wait(10)
        if number == 13:
            raise UserError("row 13")
        self.made.append(number)
        return MadeRow(number, {"row": number})

    def take(self, made):
        self.taken.append(made.number)
        return made.batch

    def __getstate__(self):
        return {"count": self.count, "held": 10**9, "made": []}


def ask(rows, number):
    return rows([{"row": number}])["row"]


@pytest.mark.parametrize("stride", [1, 4])
def test_prefetch_makes_each_row_once(stride):
    """Rows come in the order in which they are asked for."""
    numbers = Numbers(12)
    rows = PrefetchedRows(numbers, stride=stride)
    asked = list(range(1, 12, stride))
    assert [ask(rows, number) for number in asked] == asked
    assert sorted(numbers.made) == numbers.taken == asked


def test_prefetch_makes_the_next_rows_alone():
    """The next rows are made meanwhile, and no more."""
    numbers = Numbers(100)
    rows = PrefetchedRows(numbers)
    ask(rows, 5)
    deadline = time.monotonic() + 10
    while len(numbers.made) < 1 + PREFETCHED and time.monotonic() < deadline:
        time.sleep(0.001)
    rows.close()
    assert sorted(numbers.made) == list(range(5, 6 + PREFETCHED))
    assert numbers.taken == [5]


def test_prefetch_counts_seconds_of_waiting():
    """The trainer waits for a row that is not ready, and the seconds are counted."""
    numbers = Numbers(9, held=1)
    rows = PrefetchedRows(numbers)
    ask(rows, 0)
    before = rows.waited
    threading.Timer(0.2, numbers.gate.set).start()
    assert ask(rows, 1) == 1
    assert 0.1 < rows.waited - before < 5  # a machine may be slow to wake, not quick


def test_prefetch_after_a_jump():
    """Rows that were made ahead elsewhere are forgotten."""
    numbers = Numbers(40)
    rows = PrefetchedRows(numbers)
    assert [ask(rows, number) for number in (0, 20, 21, 3)] == [0, 20, 21, 3]


def test_prefetch_takes_one_row_at_once():
    with pytest.raises(ValueError, match="too many values"):
        PrefetchedRows(Numbers(2))([{"row": 0}, {"row": 1}])


def test_prefetch_raises_where_the_row_is_asked_for():
    rows = PrefetchedRows(Numbers(20))
    assert [ask(rows, number) for number in (11, 12)] == [11, 12]
    with pytest.raises(UserError, match="row 13"):
        ask(rows, 13)
    assert ask(rows, 14) == 14


@pytest.mark.slow
def test_prefetch_from_workers():
    """Rows of processes come in order, after a jump too; an error is raised where its row is asked for."""
    numbers = Numbers(40)
    rows = PrefetchedRows(numbers, stride=2, workers=2)
    assert [ask(rows, number) for number in (1, 3, 5)] == [1, 3, 5]
    assert [ask(rows, number) for number in (9, 11)] == [9, 11]
    with pytest.raises(UserError, match="row 13"):
        ask(rows, 13)
    assert ask(rows, 15) == 15
    assert numbers.made == []
    assert numbers.taken == [1, 3, 5, 9, 11, 15]
    rows.close()


@pytest.mark.parametrize(
    ("wanted", "cores", "local", "processes", "workers"),
    [
        (None, 1, "1", 1, 0),  # the trainer needs the core
        (None, 2, "1", 1, 1),
        (None, 16, "4", 8, 3),
        (0, 16, "1", 1, 0),
        (5, 1, "2", 2, 5),
    ],
)
def test_row_workers(monkeypatch, wanted, cores, local, processes, workers):
    monkeypatch.setattr(prefetch, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert row_workers(Numbers(9), wanted, processes=processes) == workers


def test_row_workers_of_rows_without_images(make_rows):
    """A thread is enough for rows whose features are cached."""
    assert row_workers(make_rows(), 1, processes=1) == 1
    assert row_workers(replace(make_rows(), features=lambda images: None), 4, processes=1) == 0
    assert row_workers(replace(make_rows(), images=()), 4, processes=1) == 0
