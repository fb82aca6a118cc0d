"""An inspection -> the page of what a recipe will train on."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from numbers import Real
from typing import Any

from finetune.data.conversation import Image, RecordError
from finetune.data.images import open_image
from finetune.reporting.html.histogram import CHART, draw
from finetune.reporting.html.page import number, render, share, thumbnail
from finetune.reporting.inspect import Inspection, ShownExample

COLUMNS = {
    "read": "records read",
    "kept": "kept",
    "rejected": "rejected",
    "dialogues": "dialogues",
    "examples": "examples",
    "tokens": "tokens",
    "supervised_tokens": "trained on",
    "images": "images",
    "draws_per_epoch": "drawn per epoch",
    "repeats_per_epoch": "times per epoch",
    "documents_cut": "documents cut",
}
"""Figures of a source and their headings, in order; other numbers follow under their own names."""

RARE = ("documents_cut",)
"""Figures whose column is left out where every source has 0."""


def inspection_page(
    inspection: Inspection, *, title: str, recipe: str, images: Mapping[Image, str] | None = None
) -> str:
    """Return the page, one self-contained HTML file.

    `recipe`: its YAML. `images`: image -> its data URI; by default they are opened. An image without one is shown as
    one that could not be opened.
    """
    stats, examples = inspection.stats, inspection.examples
    if images is None:
        images = _thumbnails(image for example in examples for image in example.images)
    named = [*(one["source"] for one in stats), *(example.source for example in examples)]
    drawn = [histogram.source for histogram in inspection.histograms if histogram.source is not None]
    embedded = [image for image in dict.fromkeys(image for one in examples for image in one.images) if image in images]
    for image in embedded:
        assert images[image].startswith("data:image/"), f"expected a data URI of an image, got {images[image]:.40}"
    return render(
        "inspection",
        title=title,
        recipe=recipe,
        sources=list(dict.fromkeys((*named, *drawn))),
        figures=_figures(stats),
        table=_table(stats),
        losses=[{"source": one["source"], "rows": rows} for one in stats if (rows := _losses(one))],
        charts=[draw(histogram) for histogram in inspection.histograms],
        size=CHART,
        sections=[
            ("Examples drawn at random", [_example(example) for example in examples if not example.longest]),
            ("The longest examples", [_example(example) for example in examples if example.longest]),
        ],
        embedded={image: index for index, image in enumerate(embedded)},
        data={"images": [images[image] for image in embedded]},
    )


def _thumbnails(images: Iterable[Image]) -> dict[Image, str]:
    """Return image -> its data URI, without those that cannot be opened any more."""
    uris = {}
    for image in dict.fromkeys(images):
        with suppress(RecordError):
            uris[image] = thumbnail(open_image(image))
    return uris


def _figures(stats: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the figures at the top of the page."""
    total = _total([_numbers(one) for one in stats])
    figures = [(name, number(total.get(name, 0))) for name in ("dialogues", "examples", "tokens", "images")]
    trained = share(total.get("supervised_tokens", 0), total.get("tokens", 0))
    return [*figures[:3], ("of the tokens are trained on", trained), figures[3]]


def _table(stats: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """Return (source, [(heading, figure)]) of each source, then of all together, with None as the source."""
    rows: list[tuple[str | None, dict[str, Any]]] = [(one["source"], _numbers(one)) for one in stats]
    named = dict.fromkeys((*COLUMNS, *(key for _, row in rows for key in row)))
    keys = [key for key in named if any(row.get(key) if key in RARE else key in row for _, row in rows)]
    if len(rows) > 1:
        rows.append((None, _total([row for _, row in rows])))
    headings = {key: COLUMNS.get(key, key.replace("_", " ")) for key in keys}
    table = []
    for source, row in rows:
        cells = {key: number(row.get(key)) for key in keys}
        if "supervised_tokens" in row:
            trained = row["supervised_tokens"]
            cells["supervised_tokens"] = f"{number(trained)} ({share(trained, row['tokens'])})"
        table.append((source, [(headings[key], cell) for key, cell in cells.items()]))
    return table


def _losses(stats: Mapping[str, Any]) -> list[tuple[int | None, str, str]]:
    """Return (how many, reason, detail) for everything that is not trained on."""
    first = {reason: f"first: {where}" for reason, where in stats["first_rejected"].items()}
    parts = stats.get("parts_rejected", {}).items()
    return [
        *((None, "file breaks off", detail) for detail in stats["broken"]),
        *((records, reason, first.get(reason, "")) for reason, records in stats["rejected"].items()),
        *((count, f"{reason}, in records that are kept", first.get(reason, "")) for reason, count in parts),
        *((records, "ignored key", key) for key, records in stats.get("ignored", {}).items()),
    ]


def _numbers(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers among a source's stats, its rejected records added up."""
    numbers = {key: value for key, value in stats.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {**numbers, "rejected": sum(stats["rejected"].values())}


def _total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of what every row counts; a factor is not a count."""
    counted = [key for key in rows[0] if all(isinstance(row.get(key), int) for row in rows)] if rows else []
    return {key: sum(row[key] for row in rows) for key in counted if key != "repeats_per_epoch"}


def _example(example: ShownExample) -> dict[str, Any]:
    """Return what the template shows of an example, with its tokens in runs that see the same image."""
    runs = [(image, list(run)) for image, run in groupby(example.tokens, key=lambda token: token.image)]
    return {"example": example, "runs": runs}
