"""The rows of a run: who is drawn how often, in which row, and what fills the last step of an epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.schedule import Row, build_schedule, draw_epoch, draws_per_epoch

TOKENS, IMAGES = [3, 8, 5, 2, 7, 4, 6, 1, 8, 3], [0, 1, 1, 0, 2, 0, 1, 0, 0, 1]


def schedule(**changes):
    arguments = {
        "sizes": [6, 4],
        "draws": [6, 4],
        "row_tokens": 8,
        "row_images": 2,
        "packs_per_step": 4,
        "seed": 0,
    }
    return build_schedule(TOKENS, IMAGES, **{**arguments, **changes})


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
    assert draws_per_epoch(sizes, weights) == expected


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0.01, 100)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_draws_are_as_many_as_examples_and_each_within_one_of_its_share(sources):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    if not sum(sizes):
        return
    draws = draws_per_epoch(sizes, weights)
    assert sum(draws) == sum(sizes)
    total = sum(weight for size, weight in sources if size)
    for draw, (size, weight) in zip(draws, sources, strict=True):
        assert abs(draw - (weight / total * sum(sizes) if size else 0)) < 1 + 1e-9
        assert size or not draw


def test_weights_without_an_example_draw_nothing():
    assert draws_per_epoch([0, 0], [1, 2]) == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=4), st.integers(0, 99), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_an_epoch_draws_each_example_of_a_source_equally_often_to_one(sources, seed, epoch):
    sizes, draws = [size for size, _ in sources], [draw if size else 0 for size, draw in sources]
    drawn = draw_epoch(sizes, draws, seed=seed, epoch=epoch).tolist()
    times, first = Counter(drawn), 0
    assert len(drawn) == sum(draws)
    for size, draw in zip(sizes, draws, strict=True):
        counts = [times.pop(index, 0) for index in range(first, first + size)]
        assert sum(counts) == draw
        assert not counts or max(counts) - min(counts) <= 1
        first += size
    assert not times


def test_who_comes_once_more_is_drawn_anew_each_epoch():
    extra = [frozenset(draw_epoch([20], [5], seed=0, epoch=epoch).tolist()) for epoch in range(4)]
    assert len(set(extra)) == 4


def test_order_depends_on_the_epoch_and_the_seed_alone():
    def drawn(seed, epoch):
        return draw_epoch([20], [20], seed=seed, epoch=epoch).tolist()

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
    rows = schedule(draws=[2, 8], epochs=1)
    times = Counter(index for row in rows for index in row.examples)
    assert sum(times[index] for index in range(6)) == 2
    assert [times[index] for index in range(6, 10)] == [2, 2, 2, 2]


def test_rows_keep_both_budgets():
    rows = schedule(epochs=2)
    assert max(sum(TOKENS[index] for index in row.examples) for row in rows) == 8
    assert max(sum(IMAGES[index] for index in row.examples) for row in rows) == 2


@pytest.mark.parametrize("packs_per_step", [1, 4, 7, 100])
def test_only_the_last_step_of_an_epoch_is_filled(packs_per_step):
    rows = schedule(epochs=2, packs_per_step=packs_per_step)
    for epoch in range(2):
        of_epoch = [row for row in rows if row.epoch == epoch]
        fillers = of_epoch.count(Row(epoch))
        assert fillers == -(len(of_epoch) - fillers) % packs_per_step
        assert all(row.examples for row in of_epoch[: len(of_epoch) - fillers])


def test_fillers_by_hand():
    rows = build_schedule(
        [5, 5, 5], [0] * 3, sizes=[3], draws=[3], row_tokens=8, row_images=1, packs_per_step=2, seed=0, epochs=1
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


def test_rows_are_shuffled_not_sorted_by_fill():
    fills = [[sum(TOKENS[index] for index in row.examples) for row in schedule(epochs=1, seed=s)] for s in range(5)]
    assert any(fill != sorted(fill, reverse=True) for fill in fills)


def test_nothing_to_draw_gives_no_rows():
    assert schedule(draws=[0, 0], steps=5) == []
    assert (
        build_schedule([], [], sizes=[0], draws=[0], row_tokens=8, row_images=1, packs_per_step=2, seed=0, steps=5)
        == []
    )
