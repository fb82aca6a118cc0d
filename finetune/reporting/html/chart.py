"""Integers -> Histogram -> the geometry of its drawing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.reporting.html.page import number


@dataclass(frozen=True)
class Histogram:
    """Bar i counts the values with edges[i] <= value < edges[i + 1], all integers; no `source`: of all together."""

    name: str
    unit: str
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    source: str | None = None

    def __post_init__(self) -> None:
        assert len(self.edges) == len(self.counts) + 1 >= 2, f"{len(self.edges)} edges, {len(self.counts)} counts"
        assert list(self.edges) == sorted(set(self.edges)), f"edges do not rise: {self.edges}"


def histogram(values: Sequence[int], *, name: str, unit: str, source: str | None = None, bars: int = 24) -> Histogram:
    """At most so many bars of equal round width: 1, 2, 5, 10, 20, ..."""
    low, high = (min(values), max(values)) if values else (0, 0)
    width = next(step for step in _steps() if high // step - low // step < bars)
    first, last = low // width, high // width
    counts = Counter(value // width for value in values)
    edges = tuple(width * index for index in range(first, last + 2))
    return Histogram(name, unit, edges, tuple(counts[index] for index in range(first, last + 1)), source)


@dataclass(frozen=True)
class _Bar:
    """A bar, the room it stands in, and what it says."""

    left: float
    width: float
    top: float
    height: float
    label: str


CHART = {"width": 460, "height": 200, "left": 46, "right": 8, "top": 10, "bottom": 38}
"""An SVG's size and the margins of its plot, in its own units."""


def draw(histogram: Histogram) -> dict[str, Any]:
    """A histogram's geometry: bars, ticks of both axes as (position, label), and its values as text."""
    edges, counts = histogram.edges, histogram.counts
    right, bottom = CHART["width"] - CHART["right"], CHART["height"] - CHART["bottom"]
    step = (right - CHART["left"]) / len(counts)
    tick = _nice(max(1, max(counts)) / 4)
    top = tick * -(-max(1, max(counts)) // tick)
    tall = (bottom - CHART["top"]) / top
    singles = edges[1] - edges[0] == 1
    every = -(-len(edges) // 8)
    bars = [
        _Bar(CHART["left"] + step * index, step, bottom - tall * count, tall * count, _label(histogram, index))
        for index, count in enumerate(counts)
    ]
    return {
        "histogram": histogram,
        "bars": bars,
        "across": [
            (CHART["left"] + step * (index + singles / 2), number(edge))
            for index, edge in enumerate(edges)
            if index % every == 0 and index + singles < len(edges)
        ],
        "up": [(bottom - tall * value, number(value)) for value in range(0, top + 1, tick)],
        "text": "; ".join(bar.label for bar, count in zip(bars, counts, strict=True) if count),
    }


def _label(histogram: Histogram, index: int) -> str:
    """ "40–59 tokens: 12"."""
    first, last = histogram.edges[index], histogram.edges[index + 1] - 1
    span = number(first) if first == last else f"{number(first)}–{number(last)}"
    return f"{span} {histogram.unit}: {number(histogram.counts[index])}"


def _nice(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is no smaller."""
    return next(step for step in _steps() if step >= least)


def _steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10
