"""Rows are made before they are asked for, in the order of who asks, and are the rows all the same."""

import threading
import time

import pytest

from finetune.planning.estimate import PREFETCHED
from finetune.training.prefetch import PrefetchedRows
from modeling.errors import UserError


class Numbers:
    """A row is its number; `gate` holds back all rows from `held` on."""

    def __init__(self, count, held=10**9):
        self.count, self.held, self.gate, self.made = count, held, threading.Event(), []

    def __len__(self):
        return self.count

    def at(self, number):
        if number >= self.held:
            assert self.gate.wait(10)
        if number == 13:
            raise UserError("row 13")
        self.made.append(number)
        return {"row": number}


def ask(rows, number):
    return rows([{"row": number}])["row"]


@pytest.mark.parametrize("stride", [1, 4])
def test_prefetch_makes_each_row_once(stride):
    """Rows come in the order in which they are asked for."""
    numbers = Numbers(12)
    rows = PrefetchedRows(numbers, stride=stride)
    asked = list(range(1, 12, stride))
    assert [ask(rows, number) for number in asked] == asked
    assert sorted(numbers.made) == asked


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
