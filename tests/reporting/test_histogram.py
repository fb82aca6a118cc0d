"""Histograms and their drawing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.reporting.html.histogram import Histogram, draw, histogram


def test_histogram_has_round_edges():
    made = histogram([12, 18, 21, 39], name="Length", unit="tokens", bars=3)
    assert made == Histogram("Length", "tokens", (10, 20, 30, 40), (2, 1, 1))
    assert histogram([0, 2, 2], name="Images", unit="images").edges == (0, 1, 2, 3)
    assert histogram([], name="Images", unit="images") == Histogram("Images", "images", (0, 1), (0,))


@given(st.lists(st.integers(0, 10**6), min_size=1), st.integers(2, 40))
def test_histogram_counts_every_value_in_its_bar(values, bars):
    made = histogram(values, name="n", unit="u", bars=bars)
    assert len(made.counts) <= bars
    naive = [
        sum(low <= value < high for value in values) for low, high in zip(made.edges, made.edges[1:], strict=False)
    ]
    assert list(made.counts) == naive
    assert sum(naive) == len(values)


def test_draw_bars_to_scale_with_labels():
    drawn = draw(Histogram("Length", "tokens", (0, 1000, 2000, 3000), (20, 0, 10)))
    assert [bar.label for bar in drawn["bars"]] == [
        "0–999 tokens: 20",
        "1,000–1,999 tokens: 0",
        "2,000–2,999 tokens: 10",
    ]
    full, none, half = (bar.height for bar in drawn["bars"])
    assert (full, none, half) == (152, 0, 76)
    assert [label for _, label in drawn["up"]] == ["0", "5", "10", "15", "20"]
    assert [label for _, label in drawn["across"]] == ["0", "1,000", "2,000", "3,000"]
    assert drawn["text"] == "0–999 tokens: 20; 2,000–2,999 tokens: 10"


def test_draw_labels_single_values_in_the_middle():
    drawn = draw(Histogram("Images", "images", (0, 1, 2), (4, 1)))
    assert [bar.label for bar in drawn["bars"]] == ["0 images: 4", "1 images: 1"]
    middles = [bar.left + bar.width / 2 for bar in drawn["bars"]]
    assert drawn["across"] == [(middles[0], "0"), (middles[1], "1")]


def test_histogram_edges_rise_and_enclose_the_counts():
    with pytest.raises(AssertionError, match="2 edges, 2 counts"):
        Histogram("n", "u", (0, 1), (1, 2))
    with pytest.raises(AssertionError, match="edges do not rise"):
        Histogram("n", "u", (0, 2, 2), (1, 2))
