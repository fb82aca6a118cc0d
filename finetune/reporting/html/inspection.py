"""Accounts, dialogues and histograms -> the page of what a recipe will train on."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from typing import Any

from finetune.reporting.html.chart import CHART, Histogram, draw
from finetune.reporting.html.page import number, share, write


@dataclass(frozen=True)
class Token:
    """One token as it reads. `image` counts the images of its dialogue from 0; -1 sees none."""

    text: str
    id: int
    supervised: bool = False
    image: int = -1
    special: bool = False


@dataclass(frozen=True)
class ShownDialogue:
    """One dialogue as the model sees it; `images` are keys of the page's images, in order."""

    place: str
    source: str
    tokens: tuple[Token, ...]
    images: tuple[str, ...] = ()
    longest: bool = False
    """Shown because it is long; the others were drawn at random."""

    def __post_init__(self) -> None:
        seen = {token.image for token in self.tokens}
        assert seen <= set(range(-1, len(self.images))), f"{self.place}: tokens see {seen} of {len(self.images)} images"


def choose_shown(lengths: Sequence[int], *, seed: int, drawn: int = 20, longest: int = 5) -> list[tuple[int, bool]]:
    """(index, whether it is there for its length): some drawn by `seed`, in order, then the longest, longest first."""
    by_length = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    top, others = by_length[:longest], sorted(by_length[longest:])
    chosen = random.Random(seed).sample(others, min(drawn, len(others)))  # noqa: S311
    return [(index, False) for index in sorted(chosen)] + [(index, True) for index in top]


def inspection_page(
    accounts: Sequence[Mapping[str, Any]],
    dialogues: Sequence[ShownDialogue],
    *,
    title: str,
    recipe: str,
    images: Mapping[str, str],
    histograms: Sequence[Histogram] = (),
) -> str:
    """What a recipe will train on.

    accounts: one a source, as `Account.to_json` gives them; `images`: key -> data URI, a key left out could not be
    opened; `recipe`: its YAML.
    """
    named = [*(account["source"] for account in accounts), *(dialogue.source for dialogue in dialogues)]
    sources = list(dict.fromkeys((*named, *(drawn.source for drawn in histograms if drawn.source is not None))))
    shown = [key for key in dict.fromkeys(key for dialogue in dialogues for key in dialogue.images) if key in images]
    return write(
        "inspection",
        title=title,
        recipe=recipe,
        sources=sources,
        figures=_summary(accounts),
        table=_table(accounts),
        rejections=[account for account in accounts if account["rejected"] or account["broken"]],
        charts=[draw(histogram) for histogram in histograms],
        size=CHART,
        sections=[
            ("Dialogues drawn at random", [_dialogue(shown) for shown in dialogues if not shown.longest]),
            ("The longest dialogues", [_dialogue(shown) for shown in dialogues if shown.longest]),
        ],
        embedded={key: number for number, key in enumerate(shown)},
        data={"images": [_data_uri(images[key]) for key in shown]},
    )


def _data_uri(uri: str) -> str:
    assert uri.startswith("data:image/"), f"expected a data URI of an image, got {uri:.40}"
    return uri


_COLUMNS = {
    "read": "read",
    "kept": "kept",
    "rejected": "rejected",
    "dialogues": "dialogues",
    "examples": "examples",
    "tokens": "tokens",
    "supervised_tokens": "trained on",
    "images": "images",
    "draws_per_epoch": "draws an epoch",
    "repeats_per_epoch": "repeats",
    "documents_cut": "documents cut",
}
"""Figures of an account and their headings, in order; other numbers follow under their own names."""


def _figures(account: Mapping[str, Any]) -> dict[str, Any]:
    """An account's numbers, its rejections added up."""
    numbers = {key: value for key, value in account.items() if isinstance(value, Real) and not isinstance(value, bool)}
    return {**numbers, "rejected": sum(account["rejected"].values())}


def _total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of what every row counts; a factor is no count."""
    counted = [key for key in rows[0] if all(isinstance(row.get(key), int) for row in rows)] if rows else []
    return {key: sum(row[key] for row in rows) for key in counted if key != "repeats_per_epoch"}


def _summary(accounts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    total = _total([_figures(account) for account in accounts])
    figures = [(name, number(total.get(name, 0))) for name in ("dialogues", "examples", "tokens", "images")]
    figures.insert(3, ("of them trained on", share(total.get("supervised_tokens", 0), total.get("tokens", 0))))
    return figures


def _table(accounts: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, list[tuple[str, str]]]]:
    """(source, [(heading, figure)]) a row, without the columns that no source has; then, under None, their sums."""
    rows: list[tuple[str | None, dict[str, Any]]] = [(account["source"], _figures(account)) for account in accounts]
    named = dict.fromkeys((*_COLUMNS, *(key for _, row in rows for key in row)))
    columns = [key for key in named if any(key in row for _, row in rows)]
    if len(rows) > 1:
        rows.append((None, _total([row for _, row in rows])))
    headings = {key: _COLUMNS.get(key, key.replace("_", " ")) for key in columns}
    return [(source, [(headings[key], _cell(row, key)) for key in columns]) for source, row in rows]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key == "supervised_tokens" and key in row:
        return f"{number(row[key])} ({share(row[key], row['tokens'])})"
    return number(row.get(key))


def _dialogue(shown: ShownDialogue) -> dict[str, Any]:
    """A dialogue with its tokens in runs that see the same image."""
    runs = [(image, list(run)) for image, run in groupby(shown.tokens, key=lambda token: token.image)]
    return {"shown": shown, "runs": runs, "supervised": sum(token.supervised for token in shown.tokens)}
