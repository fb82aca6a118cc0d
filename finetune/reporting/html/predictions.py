"""Lines of predictions.jsonl -> the page of what a model answered."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import PIL.Image

from finetune.reporting.html.page import number, render, share, thumbnail
from modeling.errors import UserError

SCORES = {"vqa": "VQA accuracy", "cider": "CIDEr", "rouge_l": "ROUGE-L"}
"""Scores that a line may have, with their names."""


def predictions_page(
    lines: Iterable[Mapping[str, Any]],
    *,
    title: str,
    image: Callable[[str], PIL.Image.Image | None],
    thumbnails: int = 500,
    cards: int = 20_000,
) -> str:
    """Return the page, one self-contained HTML file; wrong answers come first.

    `image` opens a path, or returns None where it cannot. Only the first `cards` answers are shown, and of their images
    the first `thumbnails` distinct ones. Raises UserError for a line that is not a prediction.
    """
    predictions = []
    for line_number, line in enumerate(lines, start=1):
        _require_prediction(line, line_number)
        scores = {key: line[key] for key in SCORES if line.get(key) is not None}
        predictions.append({**line, "number": line_number, "scores": scores})
    shown = sorted(predictions, key=_wrong_first)[:cards]
    album = _Album(image, thumbnails)
    return render(
        "predictions",
        title=title,
        figures=_figures(predictions),
        total=len(predictions),
        shown=len(shown),
        data={"cards": [_card(prediction, album) for prediction in shown], "images": album.uris},
        left_out=len(album.left_out),
        embedded=len(album.uris),
    )


def _require_prediction(line: Mapping[str, Any], line_number: int) -> None:
    """Raises UserError where something is missing or of another type."""

    def is_list(value: object, *types: type) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(item, types) for item in value)

    got = {key: line.get(key) for key in ("images", "question", "references", "answer", "stopped", "exact", *SCORES)}
    expected = {
        "images": ("[path or null, ...]", is_list(got["images"], str, type(None))),
        "question": ("text", isinstance(got["question"], str)),
        "references": ("[text, ...]", is_list(got["references"], str)),
        "answer": ("text", isinstance(got["answer"], str)),
        "stopped": ("true or false", isinstance(got["stopped"], bool)),
        "exact": ("true or false", isinstance(got["exact"], bool)),
        **{key: ("a number", got[key] is None or isinstance(got[key], int | float)) for key in SCORES},
    }
    for key, (what, holds) in expected.items():
        if not holds:
            raise UserError(f'prediction {line_number}: expected "{key}": {what}, got {got[key]!r:.80}')


def _wrong_first(prediction: Mapping[str, Any]) -> tuple[bool, float, int]:
    """Sort wrong before right, then by the first score that there is, then as in the file."""
    return prediction["exact"], next(iter(prediction["scores"].values()), 0.0), prediction["number"]


def _figures(predictions: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the figures at the top of the page."""
    count = len(predictions)
    means = [
        (label, number(fmean(scored)))
        for key, label in SCORES.items()
        if (scored := [one["scores"][key] for one in predictions if key in one["scores"]])
    ]
    return [
        ("answers", number(count)),
        ("exactly right", share(sum(one["exact"] for one in predictions), count)),
        ("ended by the model itself", share(sum(one["stopped"] for one in predictions), count)),
        *means,
    ]


@dataclass
class _Album:
    """The thumbnails of a page: the first `limit` distinct images that open."""

    open: Callable[[str], PIL.Image.Image | None]
    limit: int
    uris: list[str] = field(default_factory=list)
    found: dict[str, int | str] = field(default_factory=dict)
    """Path -> index into uris, or why there is none."""
    left_out: set[str] = field(default_factory=set)

    def add(self, path: str | None) -> int | str:
        """Return the index of an image's thumbnail, or why there is none."""
        if path is None:
            return "an image without a file of its own"
        if path in self.found:
            return self.found[path]
        name = path.replace("\\", "/").rpartition("/")[2]
        if len(self.uris) == self.limit:
            self.left_out.add(path)
            self.found[path] = f"{name}: left out"
        elif (opened := self.open(path)) is None:
            self.found[path] = f"{name}: could not be opened"
        else:
            self.found[path] = len(self.uris)
            self.uris.append(thumbnail(opened))
        return self.found[path]


def _card(prediction: Mapping[str, Any], album: _Album) -> dict[str, Any]:
    """Return what the page's script shows of an answer."""
    return {
        "number": prediction["number"],
        "images": [album.add(path) for path in prediction["images"]],
        "question": prediction["question"],
        "references": list(Counter(prediction["references"]).items()),
        "answer": prediction["answer"],
        "stopped": prediction["stopped"],
        "right": prediction["exact"],
        "scores": [(SCORES[key], number(score)) for key, score in prediction["scores"].items()],
    }
