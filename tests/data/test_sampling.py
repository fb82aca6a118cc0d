"""The rows of a run: who is drawn how often, in which row, and what fills the last step of an epoch."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.sampling import Mix, Row, build_schedule

TOKENS, IMAGES = [3, 8, 5, 2, 7, 4, 6, 1, 8, 3], [0, 1, 1, 0, 2, 0, 1, 0, 0, 1]


def mix(sizes, weights, lengths=None, unit="examples"):
    return Mix(sizes, weights, np.array([1] * sum(sizes) if lengths is None else lengths, np.int64), unit)


def schedule(weights=(None, None), **changes):
    arguments = {"row_tokens": 8, "row_images": 2, "rows_per_step": 4, "seed": 0}
    return build_schedule(mix([6, 4], weights, TOKENS), np.array(IMAGES), **{**arguments, **changes})


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([30, 10], [None, None], [30, 10]),
        ([30, 10], [1, 1], [20, 20]),
        ([30, 10], [3, 1], [30, 10]),
        ([5, 5], [1, 3], [3, 7]),  # 2.5 and 7.5: of equal remainders, the first
        ([4, 3, 3], [1, 1, 1], [4, 3, 3]),
        ([1, 1, 8], [0.5, 0.3, 0.2], [5, 3, 2]),
        ([9, 1, 1], [2, 3, 3], [3, 4, 4]),  # 2.75, 4.125, 4.125: the largest remainder is the first's
        ([1, 1, 5], [1, 2, 5], [1, 2, 4]),  # 0.875, 1.75, 4.375: the first two have the larger remainders
        ([10, 0], [1, 1], [10, 0]),
        ([0, 10], [None, None], [0, 10]),
        ([6, 0, 4], [1, 8, 1], [5, 0, 5]),
        ([7], [0.1], [7]),
    ],
)
def test_draws_per_epoch(sizes, weights, expected):
    assert mix(sizes, weights).draws == expected


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 100)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_draws_are_as_many_as_examples_and_each_within_one_of_its_share(sources):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    if not sum(sizes):
        return
    draws = mix(sizes, weights).draws
    assert sum(draws) == sum(sizes)
    total = sum(weight for size, weight in sources if size)
    for draw, (size, weight) in zip(draws, sources, strict=True):
        assert abs(draw - (weight / total * sum(sizes) if size else 0)) < 1 + 1e-9
        assert size or not draw


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("weights", [[1, 2], [None, None]])
def test_without_an_example_nothing_is_drawn(unit, weights):
    nothing = mix([0, 0], weights, unit=unit)
    assert (nothing.draws, nothing.repeats) == ([0, 0], [0, 0])
    assert nothing.draw(seed=0, epoch=0).tolist() == []


def test_a_source_without_an_example_leaves_the_others_their_ratio():
    by_examples, by_tokens = (mix([4, 0, 2], [1, 5, 2], [1, 1, 1, 1, 4, 4], unit) for unit in ("examples", "tokens"))
    assert (by_examples.draws, by_examples.repeats) == ([2, 0, 4], [0.5, 0, 2])
    assert (by_tokens.draws, by_tokens.repeats) == ([4, 0, 2], [1, 0, 1])  # 4 and 8 of 12 tokens


def test_tokens_by_hand():
    lengths = [4, 4, 4, 1, 1, 10]
    assert (mix([3, 3], [1, 1], lengths, "tokens").draws, mix([3, 3], [None, None], lengths, "tokens").draws) == (
        [3, 3],
        [3, 3],
    )
    three_to_one = mix([3, 3], [3, 1], lengths, "tokens")  # 18 and 6 of 24 tokens
    assert three_to_one.repeats == [1.5, 0.5]
    assert three_to_one.draws == [4, 2]
    drawn = [three_to_one.draw(seed=0, epoch=epoch).tolist() for epoch in range(30)]
    assert {sum(index < 3 for index in epoch) for epoch in drawn} == {4}  # of 16 and 20, as near to 18: the fewer
    # in the orders 1 1 10, 1 10 1, 10 1 1, the sums nearest to 6 are 2, 1 (as near as 11), 10
    assert {sum(lengths[index] for index in epoch if index >= 3) for epoch in drawn} == {1, 2, 10}


SOURCES = st.lists(st.tuples(st.lists(st.integers(1, 60), max_size=12), st.floats(0.05, 20)), min_size=1, max_size=5)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@given(SOURCES, st.booleans(), st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_an_epoch_gives_a_source_its_share_to_one_example_and_draws_its_examples_equally_often_to_one(
    unit, sources, weighted, seed, epoch
):
    lengths = [length for of_source, _ in sources for length in of_source]
    sizes, weights = [len(of_source) for of_source, _ in sources], [weight for _, weight in sources]
    drawn = mix(sizes, weights if weighted else [None] * len(sources), lengths, unit).draw(seed=seed, epoch=epoch)
    amounts = lengths if unit == "tokens" else [1] * len(lengths)
    total = sum(weight for of_source, weight in sources if of_source)
    times, first = Counter(drawn.tolist()), 0
    for size, weight in zip(sizes, weights, strict=True):
        mine = range(first, first + size)
        first += size
        counts = [times.pop(index, 0) for index in mine]
        if not size:
            continue
        assert max(counts) - min(counts) <= 1
        there = sum(amounts[index] for index in mine)
        share = weight / total * sum(amounts) if weighted else there
        got = sum(count * amounts[index] for count, index in zip(counts, mine, strict=True))
        if not weighted:
            assert counts == [1] * size
        elif unit == "examples":
            assert abs(got - share) < 1 + 1e-9
        else:  # the share is rounded to a whole token, and the nearest sum is at most half an example away
            assert abs(got - share) <= 1 + max(amounts[index] for index in mine) / 2
    assert not times


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_who_comes_once_more_or_not_at_all_is_drawn_anew_each_epoch(unit):
    both = mix([20, 20], [5, 3], [3] * 40, unit)  # 25 of the first, 15 of the second
    epochs = [Counter(both.draw(seed=0, epoch=epoch).tolist()) for epoch in range(4)]
    twice = {frozenset(index for index in range(20) if times[index] == 2) for times in epochs}
    never = {frozenset(index for index in range(20, 40) if not times[index]) for times in epochs}
    assert {len(some) for some in (*twice, *never)} == {5}
    assert len(twice) == len(never) == 4


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_order_depends_on_the_epoch_and_the_seed_alone(unit):
    def drawn(seed, epoch):
        return mix([12, 8], [1, 1], [*range(1, 21)], unit).draw(seed=seed, epoch=epoch).tolist()

    assert drawn(3, 1) == drawn(3, 1)
    assert len({tuple(drawn(seed, epoch)) for seed in (3, 4) for epoch in (0, 1)}) == 4


def test_every_example_comes_once_an_epoch_and_epochs_are_whole_steps():
    rows = schedule(epochs=3)
    assert [row.epoch for row in rows] == sorted(row.epoch for row in rows)
    for epoch in range(3):
        of_epoch = [row for row in rows if row.epoch == epoch]
        assert sorted(index for row in of_epoch for index in row.examples) == list(range(10))
        assert len(of_epoch) % 4 == 0


def test_examples_drawn_by_weight_come_as_often_as_drawn():
    rows = schedule((1, 4), epochs=1)
    times = Counter(index for row in rows for index in row.examples)
    assert sum(times[index] for index in range(6)) == 2
    assert [times[index] for index in range(6, 10)] == [2, 2, 2, 2]


def test_rows_keep_both_budgets():
    rows = schedule(epochs=2)
    assert max(sum(TOKENS[index] for index in row.examples) for row in rows) == 8
    assert max(sum(IMAGES[index] for index in row.examples) for row in rows) == 2


@pytest.mark.parametrize("rows_per_step", [1, 4, 7, 100])
def test_only_the_last_step_of_an_epoch_is_filled(rows_per_step):
    rows = schedule(epochs=2, rows_per_step=rows_per_step)
    for epoch in range(2):
        of_epoch = [row for row in rows if row.epoch == epoch]
        fillers = of_epoch.count(Row(epoch))
        assert fillers == -(len(of_epoch) - fillers) % rows_per_step
        assert all(row.examples for row in of_epoch[: len(of_epoch) - fillers])


def test_fillers_by_hand():
    rows = build_schedule(
        mix([3], [None], [5, 5, 5]), np.zeros(3, int), row_tokens=8, row_images=1, rows_per_step=2, seed=0, epochs=1
    )
    assert [len(row.examples) for row in rows] == [1, 1, 1, 0]
    assert rows[3] == Row(0, ())


def test_steps_cut_or_continue_the_same_rows():
    three_epochs = schedule(epochs=3)
    per_epoch = len(three_epochs) // 3 // 4
    for steps in (1, per_epoch, per_epoch + 1, 3 * per_epoch):
        assert schedule(steps=steps) == three_epochs[: 4 * steps]
    assert len(schedule(steps=50)) == 200
    assert schedule(epochs=1, steps=50) == schedule(epochs=1)


def test_the_same_seed_gives_the_same_rows_another_seed_others():
    assert schedule(epochs=2) == schedule(epochs=2)
    assert schedule(epochs=2) != schedule(epochs=2, seed=1)


def test_the_order_of_rows_is_another_in_every_epoch():
    """Each of these examples fills a row, and rows are made from the largest on: their order alone is drawn."""
    lengths = [*range(9, 17)]
    rows = build_schedule(
        mix([8], [None], lengths), np.zeros(8, int), row_tokens=16, row_images=0, rows_per_step=8, seed=0, epochs=4
    )
    orders = [tuple(row.examples for row in rows if row.epoch == epoch) for epoch in range(4)]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple((index,) for index in range(8))}


def test_rows_are_shuffled_not_sorted_by_fill():
    fills = [[sum(TOKENS[index] for index in row.examples) for row in schedule(epochs=1, seed=s)] for s in range(5)]
    assert any(fill != sorted(fill, reverse=True) for fill in fills)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_nothing_to_draw_gives_no_rows(unit):
    nothing = mix([0], [1], unit=unit)
    assert build_schedule(nothing, np.zeros(0, int), row_tokens=8, row_images=1, rows_per_step=2, seed=0, steps=5) == []


def test_a_schedule_by_tokens_repeats_short_examples_to_keep_the_ratio():
    """Of 16 tokens half go to each source: 12 is nearer to 8 than nothing, and four of 1 come twice."""
    uneven = mix([1, 4], [1, 1], [12, 1, 1, 1, 1], "tokens")
    rows = build_schedule(uneven, np.zeros(5, int), row_tokens=12, row_images=0, rows_per_step=1, seed=0, epochs=2)
    times = Counter(index for row in rows for index in row.examples)
    assert times == {0: 2, 1: 4, 2: 4, 3: 4, 4: 4}
    assert {row.epoch for row in rows} == {0, 1}
