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
def test_rows_come_as_asked_and_each_is_made_once(stride):
    numbers = Numbers(12)
    rows = PrefetchedRows(numbers, stride=stride)
    asked = list(range(1, 12, stride))
    assert [ask(rows, number) for number in asked] == asked
    assert sorted(numbers.made) == asked


def test_the_next_ones_are_made_meanwhile_and_no_more():
    numbers = Numbers(100)
    rows = PrefetchedRows(numbers)
    ask(rows, 5)
    deadline = time.monotonic() + 10
    while len(numbers.made) < 1 + PREFETCHED and time.monotonic() < deadline:
        time.sleep(0.001)
    rows.close()
    assert sorted(numbers.made) == list(range(5, 6 + PREFETCHED))


def test_who_asks_waits_for_a_row_that_is_not_ready_and_the_seconds_are_counted():
    numbers = Numbers(9, held=1)
    rows = PrefetchedRows(numbers)
    ask(rows, 0)
    before = rows.waited
    threading.Timer(0.2, numbers.gate.set).start()
    assert ask(rows, 1) == 1
    assert 0.1 < rows.waited - before < 5  # a machine may be slow to wake, not quick


def test_going_on_elsewhere_forgets_what_was_ahead():
    numbers = Numbers(40)
    rows = PrefetchedRows(numbers)
    assert [ask(rows, number) for number in (0, 20, 21, 3)] == [0, 20, 21, 3]


def test_a_micro_batch_is_one_row():
    with pytest.raises(ValueError, match="too many values"):
        PrefetchedRows(Numbers(2))([{"row": 0}, {"row": 1}])


def test_an_error_is_raised_where_its_row_is_asked_for():
    rows = PrefetchedRows(Numbers(20))
    assert [ask(rows, number) for number in (11, 12)] == [11, 12]
    with pytest.raises(UserError, match="row 13"):
        ask(rows, 13)
    assert ask(rows, 14) == 14
