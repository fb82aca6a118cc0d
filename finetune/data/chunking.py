"""Dialogues -> examples of bounded size: questions are joined, long dialogues divided, documents cut between texts.

In IDEFICS, a text sees one image: the last one before it. After joining, dividing or cutting, every text sees the same
image as before, and a text that saw none sees none.

A dialogue *opens with its images* if all of them come before the words of its first question. Its turns can then be
put into other dialogues, with the images in front again.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import Any, NamedTuple, TypeVar

import numpy as np

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, Part, RecordError, Turn
from finetune.data.formats import FORMATS
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder, Example, tokenize_all
from finetune.recipe.schema import Source

Item = TypeVar("Item", bound=Hashable)

TOO_LONG, TOO_MANY_IMAGES = "too long", "too many images"


class Exchange(NamedTuple):
    """A question, its answer, and the number of the dialogue they come from."""

    question: Turn
    answer: Turn
    origin: int


@dataclass(frozen=True)
class Piece:
    """A dialogue, with the origin of each of its exchanges; it may still be divided."""

    dialogue: Dialogue
    origins: tuple[int, ...]
    """Number of the original dialogue, for each exchange (or for the document)."""

    def halves(self) -> "tuple[Piece, Piece] | None":
        """Return a conversation divided in the middle, between turns; None if it has only one question."""
        middle = len(self.origins) // 2
        if not middle:
            return None
        first, second = divide(self.dialogue, [middle])
        return Piece(first, self.origins[:middle]), Piece(second, self.origins[middle:])


@dataclass(frozen=True)
class Limits:
    """Largest size of an example."""

    max_length: int
    """Number of tokens."""
    max_images: int
    """Number of distinct images."""


@dataclass(frozen=True)
class Splitter:
    """Turns the dialogues of one source into examples that fit into a row."""

    encoder: Encoder
    limits: Limits
    turns: int | None
    """Largest number of turns of a dialogue; None: as many as its record has."""
    ordered: bool
    """Whether turns build on each other; if not, they are shuffled with `seed`."""
    seed: int

    @property
    def joins(self) -> bool:
        """Return whether questions about one image are joined, wherever in the source they are."""
        return self.turns is not None

    def arrange(self, group: Sequence[tuple[int, Dialogue]], *, number: int) -> list[Piece]:
        """Join and divide (origin, dialogue) that open with the same images; the group's `number` seeds the shuffle."""
        origin, dialogue = group[0]
        if self.turns is None or dialogue.is_document:
            return [Piece(dialogue, (origin,)) for origin, dialogue in group]
        if opening_images(dialogue) is None:
            return bound(origin, dialogue, turns=self.turns)
        if self.ordered:
            return [piece for origin, dialogue in group for piece in bound(origin, dialogue, turns=self.turns)]
        return join(group, turns=self.turns, rng=np.random.default_rng([self.seed, 3, number]))

    def fit(
        self, pieces: Sequence[Piece], *, same: Callable[[Image], Any]
    ) -> Iterator[tuple[Piece, Example | RecordError]]:
        """Yield each piece with its example, or with the error; a piece that is too long is divided and tried again.

        `same` maps an image to a key that is equal for images that count as one.
        """
        tokenised = tokenize_all([render(piece.dialogue) for piece in pieces], self.encoder)
        for piece, example in zip(pieces, tokenised, strict=True):
            error = self._crowd(piece.dialogue, same) or self._misfit(piece.dialogue, example)
            parts: Sequence[Piece] = ()
            if error and error.reason in (TOO_LONG, TOO_MANY_IMAGES):
                if piece.dialogue.is_document:
                    parts = [Piece(part, piece.origins) for part in self._cut(piece.dialogue, same)]
                elif self.turns is not None:
                    parts = piece.halves() or ()
            if len(parts) > 1:
                yield from self.fit(parts, same=same)
            else:
                yield piece, error or example

    def _crowd(self, dialogue: Dialogue, same: Callable[[Image], Any]) -> RecordError | None:
        shown = len({same(image) for image in dialogue.images})
        if shown > self.limits.max_images:
            return RecordError(TOO_MANY_IMAGES, f"{shown}, row_images is {self.limits.max_images}")
        return None

    def _misfit(self, dialogue: Dialogue, example: Example | RecordError) -> RecordError | None:
        if isinstance(example, RecordError):
            return example
        if len(example) > self.limits.max_length:
            return RecordError(TOO_LONG, f"{len(example)} tokens, max_length is {self.limits.max_length}")
        if not example.supervised or (dialogue.is_document and not dialogue.turns[0].text):
            return RecordError("nothing supervised", "no text of it is trained on")
        return None

    def _cut(self, document: Dialogue, same: Callable[[Image], Any]) -> list[Dialogue]:
        """Cut a document between its texts, each part as full as possible. Only the last one ends with `</s>`."""
        units = document_units(document)

        def fits(start: int, stop: int) -> bool:
            part = document_part(document, units, start, stop)
            if self._crowd(part, same):
                return False
            (example,) = tokenize_all([render(part)], self.encoder)
            return not self._misfit(part, example)

        alone = [render(document_part(document, units, index, index + 1)) for index in range(len(units))]
        sizes = [len(one) if isinstance(one, Example) else 0 for one in tokenize_all(alone, self.encoder)]
        parts = fill(sizes, most=self.limits.max_length, fits=fits)
        return [document_part(document, units, start, stop) for start, stop in parts]


class Outcomes:
    """Counts how dialogues end up after joining and dividing: kept, divided or rejected, by origin."""

    def __init__(self, stats: SourceStats):
        self.stats = stats
        self._kept: Counter[int] = Counter()
        self._lost: defaultdict[int, list[RecordError]] = defaultdict(list)
        self._documents: Counter[int] = Counter()

    def take(self, piece: Piece, example: Example | RecordError) -> None:
        """Count a piece and its example, under the origin of each of its turns."""
        for origin in piece.origins:
            self._documents[origin] += piece.dialogue.is_document
            if isinstance(example, RecordError):
                self._lost[origin].append(example)
            else:
                self._kept[origin] += 1
        if isinstance(example, Example):
            self.stats.examples += 1
            self.stats.tokens += len(example)
            self.stats.supervised_tokens += example.supervised

    def count(self, record_ids: Mapping[int, str]) -> None:
        """Count each record (origin -> record_id) as kept or rejected, and the parts that kept records lost."""
        for origin, record_id in record_ids.items():
            if self._kept[origin]:
                self.stats.documents_cut += self._documents[origin] > 1
                self.stats.kept += 1
                for error in self._lost[origin]:
                    self.stats.reject_part(record_id, error)
            else:
                self.stats.reject(record_id, self._lost[origin][0])


def splitter(source: Source, encoder: Encoder, limits: Limits, *, seed: int) -> Splitter:
    """Return the splitter of a source; where the source does not say whether turns are ordered, its format does."""
    ordered = FORMATS[source.format].ordered if source.ordered is None else source.ordered
    return Splitter(encoder, limits, source.turns, ordered, seed)


@dataclass(eq=False)
class Origin:
    """The record of a streamed source that an example came from."""

    record_id: str
    examples: int
    """Number of examples made from the record."""


def fit_records(
    chunk: Sequence[tuple[str, Sequence[Dialogue]]],
    splitter: Splitter,
    stats: SourceStats,
    *,
    start: int = 0,
    same: Callable[[Image], object] = lambda image: image,
) -> list[tuple[Piece, Example, Origin]]:
    """Return the examples of records (record_id, dialogues), and count every record in `stats`.

    `start` is the number of the first record in its source, which seeds the order of its turns.

    `same` gives equal values for images that count as one.
    """
    arranged = [
        splitter.arrange([(index, dialogue) for dialogue in dialogues], number=start + index)
        for index, (_, dialogues) in enumerate(chunk)
    ]
    fitted = list(splitter.fit([piece for pieces in arranged for piece in pieces], same=same))
    outcomes = Outcomes(stats)
    for piece, example in fitted:
        outcomes.take(piece, example)
    outcomes.count({number: record_id for number, (record_id, _) in enumerate(chunk)})
    kept = [(piece, example) for piece, example in fitted if isinstance(example, Example)]
    examples = Counter(piece.origins[0] for piece, _ in kept)
    origins = {number: Origin(chunk[number][0], amount) for number, amount in examples.items()}
    return [(piece, example, origins[piece.origins[0]]) for piece, example in kept]


def opening_images(dialogue: Dialogue) -> tuple[Image, ...] | None:
    """Return the images that a dialogue opens with, or None: another role, later images, a question without words."""
    if dialogue.turns[0].role != "user":
        return None
    first = takewhile(lambda part: isinstance(part, Image), dialogue.turns[0].parts)
    images = tuple(part for part in first if isinstance(part, Image))
    if images != dialogue.images or not all(turn.text for turn in dialogue.turns):
        return None
    return images


def join(dialogues: Sequence[tuple[int, Dialogue]], *, turns: int, rng: np.random.Generator | None) -> list[Piece]:
    """Join (origin, dialogue) that open with the same images into dialogues of at most `turns` turns, shuffled."""
    images = dialogues[0][1].images
    all_exchanges = [exchange for origin, dialogue in dialogues for exchange in exchanges(dialogue, origin)]
    if rng is not None:
        all_exchanges = [all_exchanges[index] for index in rng.permutation(len(all_exchanges))]
    chunks = [all_exchanges[start : start + turns] for start in range(0, len(all_exchanges), turns)]
    return [Piece(_with_images(images, chunk), tuple(exchange.origin for exchange in chunk)) for chunk in chunks]


def bound(origin: int, dialogue: Dialogue, *, turns: int) -> list[Piece]:
    """Divide a dialogue into parts of at most `turns` turns; each repeats the system message and the earlier images."""
    count = len(exchanges(dialogue, origin))
    pieces = divide(dialogue, range(turns, count, turns))
    return [Piece(piece, (origin,) * len(exchanges(piece, origin))) for piece in pieces]


def exchanges(dialogue: Dialogue, origin: int) -> list[Exchange]:
    """Return the questions with their answers, without the images that the dialogue opens with."""
    opening = opening_images(dialogue)
    spoken = [turn for turn in dialogue.turns if turn.role != "system"]
    pairs = [Exchange(question, answer, origin) for question, answer in zip(spoken[::2], spoken[1::2], strict=True)]
    if opening:
        question = replace(pairs[0].question, parts=pairs[0].question.parts[len(opening) :])
        pairs[0] = pairs[0]._replace(question=question)
    return pairs


def divide(dialogue: Dialogue, places: Sequence[int]) -> list[Dialogue]:
    """Cut before these exchanges (counted from 0); later parts repeat the system message and the images they need."""
    opening = opening_images(dialogue) or ()
    system = tuple(turn for turn in dialogue.turns if turn.role == "system")
    pairs = exchanges(dialogue, 0)
    parts = []
    for start, stop in pairwise([0, *places, len(pairs)]):
        images = opening
        if start:  # repeat the images shown before, the latest one last, except those that begin its own question
            before = [turn for pair in pairs[:start] for turn in (pair.question, pair.answer)]
            shown = by_last_appearance([*opening, *(image for turn in before for image in turn.images)])
            own = _leading_images(pairs[start].question.parts)
            images = tuple(image for image in shown if image not in own)
        parts.append(Dialogue((*system, *_with_images(images, pairs[start:stop]).turns)))
    return parts


def by_last_appearance(images: Iterable[Item]) -> tuple[Item, ...]:
    """Return each image once, in the order in which they were last shown.

    >>> by_last_appearance("ABA")
    ('B', 'A')
    """
    return tuple(dict.fromkeys(reversed(list(images))))[::-1]


def without_images(document: Dialogue, lost: Sequence[bool]) -> list[Dialogue]:
    """Return a document without its lost images; `lost` has one value per image, in order.

    A text that saw a lost image sees none. The document is cut where the text would otherwise see an earlier image.

    A "a dog" B "a cat", B lost -> A "a dog" (goes on), "a cat"
    """
    documents: list[Dialogue] = []
    parts: list[Part] = []
    gone, saw_lost = iter(lost), False
    for part in document.turns[0].parts:
        if isinstance(part, Image):
            saw_lost = next(gone)
            if saw_lost:
                continue
        elif part.strip() and saw_lost and any(isinstance(other, Image) for other in parts):
            documents.append(document_of([tuple(parts)], goes_on=True))
            parts = []
        parts.append(part)
    return [*documents, document_of([tuple(parts)], goes_on=document.goes_on)]


def document_units(document: Dialogue) -> list[tuple[Part, ...]]:
    """Return a document's texts, each with the images before it; images after the last text are a unit without text."""
    units: list[tuple[Part, ...]] = []
    waiting: tuple[Part, ...] = ()
    for part in document.turns[0].parts:
        waiting += (part,)
        if isinstance(part, str) and part.strip():
            units.append(waiting)
            waiting = ()
    if units and not any(isinstance(part, Image) for part in waiting):
        units[-1] += waiting
        return units
    return [*units, waiting]


def document_part(document: Dialogue, units: Sequence[tuple[Part, ...]], start: int, stop: int) -> Dialogue:
    """Return these units as a document; it repeats the image that its first text saw in the whole document."""
    before = [part for unit in units[:start] for part in unit if isinstance(part, Image)]
    repeated = before[-1:] if not _leading_images(units[start]) else []
    return document_of([tuple(repeated), *units[start:stop]], goes_on=document.goes_on or stop < len(units))


def document_of(units: Sequence[tuple[Part, ...]], *, goes_on: bool) -> Dialogue:
    return Dialogue((Turn("document", tuple(part for unit in units for part in unit)),), goes_on)


def fill(sizes: Sequence[int], *, most: int, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Return (start, stop) of parts, each as full as possible; a unit that fits in none is a part by itself.

    `fits(start, stop)` decides whether a part fits; `sizes` are estimates, to be compared with `most`, that only guide
    the search.

    >>> fill((3, 3, 3), most=7, fits=lambda start, stop: 3 * (stop - start) <= 7)
    [(0, 2), (2, 3)]
    """
    ends = [0, *accumulate(sizes)]
    parts, start = [], 0
    while start < len(sizes):
        stop = max(start + 1, bisect_right(ends, ends[start] + most) - 1)
        while stop < len(sizes) and fits(start, stop + 1):
            stop += 1
        while stop > start + 1 and not fits(start, stop):
            stop -= 1
        parts.append((start, stop))
        start = stop
    return parts


def _leading_images(parts: Sequence[Part]) -> tuple[Image, ...]:
    """Return the images before the first words."""
    words = (index for index, part in enumerate(parts) if isinstance(part, str) and part.strip())
    return tuple(part for part in parts[: next(words, len(parts))] if isinstance(part, Image))


def _with_images(images: Sequence[Image], pairs: Sequence[Exchange]) -> Dialogue:
    """Return a dialogue of these exchanges, with these images in front."""
    first = replace(pairs[0].question, parts=(*images, *pairs[0].question.parts))
    rest = [turn for pair in pairs[1:] for turn in (pair.question, pair.answer)]
    return Dialogue((first, pairs[0].answer, *rest))
