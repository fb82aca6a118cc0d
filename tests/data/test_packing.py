"""Packs: every sequence once, both budgets kept, as full as a best fit makes them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.packing import arrange, pack, pack_in_order

ROW_TOKENS, ROW_IMAGES = 12, 3
LENGTHS = st.lists(st.tuples(st.integers(1, ROW_TOKENS), st.integers(0, ROW_IMAGES)), max_size=40)


def naive(tokens, images, *, row_tokens, row_images):
    """Best fit by looking at every row; of rows that fit as well, the one with least room for images."""
    rows = []
    for index in arrange(tokens, images, row_tokens=row_tokens, row_images=row_images):
        rooms = [
            (row_tokens - sum(tokens[i] for i in row), row_images - sum(images[i] for i in row), row) for row in rows
        ]
        fitting = [room for room in rooms if room[0] >= tokens[index] and room[1] >= images[index]]
        if fitting:
            min(fitting, key=lambda room: room[:2])[2].append(index)
        else:
            rows.append([index])
    return rows


def filling(rows, tokens, images):
    return sorted((sum(tokens[i] for i in row), sum(images[i] for i in row)) for row in rows)


def test_the_example_of_the_docstring():
    assert pack((5, 3, 4), (1, 0, 1), row_tokens=8, row_images=1) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("tokens", "images", "expected"),
    [
        ([], [], []),
        ([12], [3], [[0]]),
        ([6, 6, 6], [0, 0, 0], [[0, 1], [2]]),
        ([2, 10, 7, 5, 3], [0, 0, 0, 0, 0], [[1, 0], [2, 3], [4]]),
        ([7, 8, 4], [0, 0, 0], [[1, 2], [0]]),  # 4 goes where nothing is left over
        ([7, 8, 4], [0, 3, 1], [[1], [0, 2]]),  # unless there is no room for its image
        ([1, 1, 1, 1], [2, 2, 1, 1], [[0, 3], [1, 2]]),  # images alone fill a row
    ],
)
def test_packs_by_hand(tokens, images, expected):
    assert pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES) == expected


def test_rows_without_images():
    assert pack([4, 4, 4], [0, 0, 0], row_tokens=8, row_images=0) == [[0, 1], [2]]


@given(LENGTHS)
@settings(max_examples=150, deadline=None)
def test_every_sequence_is_in_one_row_and_no_row_is_over_a_budget(lengths):
    tokens, images = [token for token, _ in lengths], [image for _, image in lengths]
    rows = pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(rows)
    assert all(used <= ROW_TOKENS and seen <= ROW_IMAGES for used, seen in filling(rows, tokens, images))
    assert pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES) == rows


@given(LENGTHS)
@settings(max_examples=150, deadline=None)
def test_rows_are_as_full_as_those_of_a_naive_best_fit(lengths):
    tokens, images = [token for token, _ in lengths], [image for _, image in lengths]
    rows = pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    expected = naive(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    assert filling(rows, tokens, images) == filling(expected, tokens, images)


def test_sequences_are_laid_large_ones_first_and_small_ones_last():
    tokens = [50, 10, 400, 30, 300, 1, 40, 20, 60, 2]
    assert arrange(tokens, [0] * 10, row_tokens=1000, row_images=4) == [2, 4, 0, 1, 3, 6, 7, 8, 9, 5]


@pytest.mark.parametrize(
    ("tokens", "images", "order"),
    [
        ([10, 251, 260, 9, 8, 7, 6, 5, 4, 3], [0] * 10, [2, 1, 0, 3, 4, 5, 6, 7, 8, 9]),
        ([10, 250, 260, 9, 8, 7, 6, 5, 4, 3], [0] * 10, [2, 0, 1, 3, 4, 5, 6, 7, 8, 9]),  # a quarter is not large
        ([10, 1, 1, 9, 8, 7, 6, 5, 4, 3], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0], [2, 0, 1, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_large_is_what_takes_more_than_a_quarter_of_a_row(tokens, images, order):
    laid = arrange(tokens, images, row_tokens=1000, row_images=4)
    assert laid == order


@pytest.mark.parametrize(
    ("tokens", "images", "rows"),
    [
        ([5, 7], [0, 0], [[0, 1]]),  # to the last token
        ([6, 7], [0, 0], [[0], [1]]),  # one more
        ([1, 1], [2, 1], [[0, 1]]),  # to the last image
        ([1, 1], [2, 2], [[0], [1]]),
    ],
)
def test_rows_are_filled_to_their_budget_and_not_beyond(tokens, images, rows):
    packed = pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    assert sorted(map(sorted, packed)) == rows
    ids = [range(10 * index, 10 * index + count) for index, count in enumerate(images)]
    assert pack_in_order(tokens, ids, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES) == rows


def test_between_them_many_tokens_and_many_images_take_turns():
    tokens, images = [90, 90, 90, 10, 10, 10, 5], [1, 1, 1, 3, 3, 3, 0]
    assert arrange(tokens, images, row_tokens=1000, row_images=40) == [0, 3, 1, 4, 2, 5, 6]


@given(LENGTHS)
@settings(deadline=None)
def test_an_arrangement_has_every_sequence_once(lengths):
    tokens, images = [token for token, _ in lengths], [image for _, image in lengths]
    laid = arrange(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)
    assert sorted(laid) == list(range(len(lengths)))


@pytest.mark.parametrize("row_images", [16, 32, 38, 48, 100])
def test_like_dialogues_fill_the_scarcer_budget(row_images):
    """Log-normal lengths, 1 to 3 images; 38 images in 2,048 tokens are just as scarce as the tokens."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(np.log(90), 0.6, 5000), 16, 2048).astype(int).tolist()
    images = rng.integers(1, 4, 5000).tolist()
    rows = pack(tokens, images, row_tokens=2048, row_images=row_images)
    assert max(sum(tokens) / 2048, sum(images) / row_images) / len(rows) > 0.97


@pytest.mark.parametrize(("tokens", "images"), [([3, 13], [0, 0]), ([3, 3], [0, 4])])
def test_a_sequence_that_fits_no_row_is_an_error(tokens, images):
    with pytest.raises(ValueError, match=rf"sequence 1: {tokens[1]} tokens, {images[1]} images; 12, 3 fit"):
        pack(tokens, images, row_tokens=ROW_TOKENS, row_images=ROW_IMAGES)


def test_an_image_fits_no_row_without_images():
    with pytest.raises(ValueError, match="1 images; 8, 0 fit"):
        pack([3], [1], row_tokens=8, row_images=0)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(0, 5), max_size=3)), max_size=40),
    st.integers(20, 60),
    st.integers(3, 6),
)
@settings(max_examples=100, deadline=None)
def test_in_order_nothing_moves_and_both_budgets_hold(sequences, row_tokens, row_images):
    tokens, ids = [length for length, _ in sequences], [images for _, images in sequences]
    rows = pack_in_order(tokens, ids, row_tokens=row_tokens, row_images=row_images)
    assert [index for row in rows for index in row] == list(range(len(tokens)))
    for row in rows:
        assert sum(tokens[index] for index in row) <= row_tokens
        assert len({image for index in row for image in ids[index]}) <= row_images
    for row, after in pairwise(rows):  # no row was closed while the next one still fitted
        grown = [*row, after[0]]
        too_long = sum(tokens[index] for index in grown) > row_tokens
        assert too_long or len({image for index in grown for image in ids[index]}) > row_images


def test_neighbours_about_one_image_share_it():
    assert pack_in_order((5, 3, 4), ((7,), (7,), (8,)), row_tokens=8, row_images=1) == [[0, 1], [2]]
