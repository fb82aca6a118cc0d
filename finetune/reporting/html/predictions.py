"""Lines of predictions.jsonl -> the page of what a model answered."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import PIL.Image

from finetune.reporting.html.page import number, share, thumbnail, write
from modeling.errors import UserError


def predictions_page(
    lines: Iterable[Mapping[str, Any]],
    *,
    title: str,
    image: Callable[[str], PIL.Image.Image | None],
    thumbnails: int = 500,
    cards: int = 20_000,
) -> str:
    """What a model answered, from the lines of predictions.jsonl; wrong answers first.

    `image` opens a path, None where it cannot; only the first `thumbnails` distinct images are shown, and the first
    `cards` answers. Raises UserError for a line that is no prediction.
    """
    predictions = [_prediction(line, number) for number, line in enumerate(lines, start=1)]
    shown = sorted(predictions, key=_worst_first)[:cards]
    album = _Album(image, thumbnails)
    drawn = [_card(prediction, album) for prediction in shown]
    return write(
        "predictions",
        title=title,
        figures=_scores(predictions),
        total=len(predictions),
        shown=len(shown),
        left_out=len(album.left_out),
        embedded=len(album.uris),
        data={"cards": drawn, "images": album.uris},
    )


@dataclass(frozen=True)
class _Prediction:
    """A line of predictions.jsonl."""

    number: int
    images: tuple[str | None, ...]
    question: str
    references: tuple[str, ...]
    answer: str
    stopped: bool
    exact: bool
    scores: Mapping[str, float]


SCORES = {"vqa": "VQA accuracy", "cider": "CIDEr", "rouge_l": "ROUGE-L"}


def _prediction(line: Mapping[str, Any], number: int) -> _Prediction:
    """Raises UserError where something is missing or of another kind."""
    for key, (expected, holds) in _EXPECTED.items():
        if not holds(line.get(key)):
            raise UserError(f'prediction {number}: expected "{key}": {expected}, got {line.get(key)!r:.80}')
    scores = {key: line[key] for key in SCORES if line.get(key) is not None}
    for key, score in scores.items():
        if not isinstance(score, int | float):
            raise UserError(f'prediction {number}: expected "{key}": a number, got {score!r:.80}')
    plain = {key: line[key] for key in ("question", "answer", "stopped", "exact")}
    return _Prediction(number, tuple(line["images"]), references=tuple(line["references"]), scores=scores, **plain)


def _is_list(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list | tuple) and all(isinstance(item, kinds) for item in value)


_EXPECTED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "images": ("[path or null, ...]", _is_list(str, type(None))),
    "question": ("text", lambda value: isinstance(value, str)),
    "references": ("[text, ...]", _is_list(str)),
    "answer": ("text", lambda value: isinstance(value, str)),
    "stopped": ("true or false", lambda value: isinstance(value, bool)),
    "exact": ("true or false", lambda value: isinstance(value, bool)),
}


def _worst_first(prediction: _Prediction) -> tuple[bool, float, int]:
    """Wrong before right, then by the first score there is, then as in the file."""
    return prediction.exact, next(iter(prediction.scores.values()), 0.0), prediction.number


def _scores(predictions: Sequence[_Prediction]) -> list[tuple[str, str]]:
    """The figures at the top of the page."""
    count = len(predictions)
    right, stopped = (sum(getattr(one, name) for one in predictions) for name in ("exact", "stopped"))
    means = [
        (label, number(fmean(scored)))
        for key, label in SCORES.items()
        if (scored := [one.scores[key] for one in predictions if key in one.scores])
    ]
    shares = [("right, word for word", share(right, count)), ("stopped by themselves", share(stopped, count))]
    return [("answers", number(count)), *shares, *means]


@dataclass
class _Album:
    """The thumbnails of a page: the first `limit` distinct images that open."""

    open: Callable[[str], PIL.Image.Image | None]
    limit: int
    uris: list[str] = field(default_factory=list)
    places: dict[str, int | str] = field(default_factory=dict)
    """Path -> index into uris, or why there is none."""
    left_out: set[str] = field(default_factory=set)

    def place(self, path: str | None) -> int | str:
        """Index of an image's thumbnail, or what stands in its place."""
        if path is None:
            return "an image without a file of its own"
        if path not in self.places:
            self.places[path] = self._add(path)
        return self.places[path]

    def _add(self, path: str) -> int | str:
        name = path.replace("\\", "/").rpartition("/")[2]
        if len(self.uris) == self.limit:
            self.left_out.add(path)
            return f"{name}: left out"
        opened = self.open(path)
        if opened is None:
            return f"{name}: could not be opened"
        self.uris.append(thumbnail(opened))
        return len(self.uris) - 1


def _card(prediction: _Prediction, album: _Album) -> dict[str, Any]:
    """What the page's script shows of an answer."""
    return {
        "number": prediction.number,
        "images": [album.place(path) for path in prediction.images],
        "question": prediction.question,
        "references": list(Counter(prediction.references).items()),
        "answer": prediction.answer,
        "stopped": prediction.stopped,
        "right": prediction.exact,
        "scores": [(SCORES[key], number(score)) for key, score in prediction.scores.items()],
    }
