"""Integers -> a histogram -> the geometry of its drawing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.reporting.html.page import number


@dataclass(frozen=True)
class Histogram:
    """Bar i counts the integers with edges[i] <= value < edges[i + 1]."""

    name: str
    """What is counted: "Tokens per example"."""
    unit: str
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    source: str | None = None
    """None: all sources together."""

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.counts) + 1 >= 2, f"{len(self.edges)} edges, {len(self.counts)} counts"
        assert list(self.edges) == sorted(set(self.edges)), f"edges do not rise: {self.edges}"

    @property
    def labels(self) -> list[str]:
        """What each bar says: "40–59 tokens: 12"."""
        labels = []
        for index, count in enumerate(self.counts):
            first, last = self.edges[index], self.edges[index + 1] - 1
            span = number(first) if first == last else f"{number(first)}–{number(last)}"
            labels.append(f"{span} {self.unit}: {number(count)}")
        return labels


def histogram(values: Sequence[int], *, name: str, unit: str, source: str | None = None, bars: int = 24) -> Histogram:
    """Return the histogram of at most `bars` bars of equal round width: 1, 2, 5, 10, 20, ..."""
    low, high = (min(values), max(values)) if values else (0, 0)
    width = next(step for step in _round_numbers() if high // step - low // step < bars)
    first, last = low // width, high // width
    counts = Counter(value // width for value in values)
    edges = tuple(width * index for index in range(first, last + 2))
    return Histogram(name, unit, edges, tuple(counts[index] for index in range(first, last + 1)), source)


@dataclass(frozen=True)
class Bar:
    """A bar, the room it stands in, and what it says."""

    left: float
    width: float
    top: float
    height: float
    label: str


CHART = {"width": 460, "height": 200, "left": 46, "right": 18, "top": 10, "bottom": 38}
"""An SVG's size and the margins of its plot, in its own units."""


def draw(histogram: Histogram) -> dict[str, Any]:
    """Return a histogram's geometry: bars, the ticks of both axes as (position, label), and its values as text."""
    edges, counts, labels = histogram.edges, histogram.counts, histogram.labels
    right, bottom = CHART["width"] - CHART["right"], CHART["height"] - CHART["bottom"]
    step, most = (right - CHART["left"]) / len(counts), max(1, max(counts))
    tick = next(size for size in _round_numbers() if size >= most / 4)
    top = tick * -(-most // tick)
    tall = (bottom - CHART["top"]) / top
    singles = edges[1] - edges[0] == 1
    every = -(-len(edges) // 8)
    return {
        "histogram": histogram,
        "bars": [
            Bar(CHART["left"] + step * index, step, bottom - tall * count, tall * count, labels[index])
            for index, count in enumerate(counts)
        ],
        "across": [
            (CHART["left"] + step * (index + singles / 2), number(edge))
            for index, edge in enumerate(edges)
            if index % every == 0 and index + singles < len(edges)
        ],
        "up": [(bottom - tall * value, number(value)) for value in range(0, top + 1, tick)],
        "text": "; ".join(label for label, count in zip(labels, counts, strict=True) if count),
    }


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
