"""Dialogues -> dialogues of the wanted size: questions joined, long ones divided, documents cut between their texts.

IDEFICS's text sees one image: the last one before it. Whatever is joined, divided or cut here, every text sees the
image that it saw before, and a text that saw none sees none.

A dialogue *opens with its images* when all of them stand before the words of its first question. Its turns can then be
put into other dialogues, with the images in front again.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import NamedTuple, TypeVar

import numpy as np

from finetune.data.conversation import Dialogue, Image, Part, Turn

Item = TypeVar("Item", bound=Hashable)


class Exchange(NamedTuple):
    """A question, its answer, and which of the joined dialogues they are from."""

    question: Turn
    answer: Turn
    origin: int


@dataclass(frozen=True)
class Piece:
    """A dialogue that may still be divided."""

    dialogue: Dialogue
    origins: tuple[int, ...]
    """For each exchange (or for the document) the dialogue it is from."""

    def halves(self) -> "tuple[Piece, Piece] | None":
        """A conversation divided in the middle, between turns; None if it has but one question."""
        middle = len(self.origins) // 2
        if not middle:
            return None
        first, second = divide(self.dialogue, [middle])
        return Piece(first, self.origins[:middle]), Piece(second, self.origins[middle:])


def opening_images(dialogue: Dialogue) -> tuple[Image, ...] | None:
    """The images a dialogue opens with; None if it does not: another role, later images, a question without words."""
    if dialogue.turns[0].role != "user":
        return None
    first = takewhile(lambda part: isinstance(part, Image), dialogue.turns[0].parts)
    images = tuple(part for part in first if isinstance(part, Image))
    if images != dialogue.images or not all(turn.text for turn in dialogue.turns):
        return None
    return images


def join(dialogues: Sequence[tuple[int, Dialogue]], *, turns: int, rng: np.random.Generator | None) -> list[Piece]:
    """(origin, dialogue) that open with the same images -> dialogues of at most `turns` turns, shuffled by `rng`."""
    images = dialogues[0][1].images
    all_exchanges = [exchange for origin, dialogue in dialogues for exchange in exchanges(dialogue, origin)]
    if rng is not None:
        all_exchanges = [all_exchanges[index] for index in rng.permutation(len(all_exchanges))]
    chunks = [all_exchanges[start : start + turns] for start in range(0, len(all_exchanges), turns)]
    return [Piece(_with_images(images, chunk), tuple(exchange.origin for exchange in chunk)) for chunk in chunks]


def bound(origin: int, dialogue: Dialogue, *, turns: int) -> list[Piece]:
    """Consecutive dialogues of at most `turns` turns; a system message, and images shown before, stand in each."""
    count = len(exchanges(dialogue, origin))
    pieces = divide(dialogue, range(turns, count, turns))
    return [Piece(piece, (origin,) * len(exchanges(piece, origin))) for piece in pieces]


def exchanges(dialogue: Dialogue, origin: int) -> list[Exchange]:
    """Questions with their answers, without the images a dialogue opens with."""
    opening = opening_images(dialogue)
    spoken = [turn for turn in dialogue.turns if turn.role != "system"]
    pairs = [Exchange(question, answer, origin) for question, answer in zip(spoken[::2], spoken[1::2], strict=True)]
    if opening:
        question = replace(pairs[0].question, parts=pairs[0].question.parts[len(opening) :])
        pairs[0] = pairs[0]._replace(question=question)
    return pairs


def divide(dialogue: Dialogue, places: Sequence[int]) -> list[Dialogue]:
    """Cut before these exchanges (counted from 0); what a later part needs to be understood is repeated in it."""
    opening = opening_images(dialogue) or ()
    system = tuple(turn for turn in dialogue.turns if turn.role == "system")
    pairs = exchanges(dialogue, 0)
    parts = []
    for start, stop in pairwise([0, *places, len(pairs)]):
        images = opening if start == 0 else _repeated(opening, pairs, start)
        parts.append(Dialogue((*system, *_with_images(images, pairs[start:stop]).turns)))
    return parts


def by_last_appearance(images: Iterable[Item]) -> tuple[Item, ...]:
    """Each image once, in the order in which they were last shown: A, B, A -> B, A."""
    return tuple(dict.fromkeys(reversed(list(images))))[::-1]


def without_images(document: Dialogue, lost: Sequence[bool]) -> list[Dialogue]:
    """A document without those of its images that are lost, by their order.

    A text that saw a lost image sees none. Where an earlier image would be seen in its place, the document is cut.

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
    """A document's texts, each with the images before it; images after the last text are a unit without text."""
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
    """These units of a document; the image that the first text saw in the whole is repeated before it."""
    before = [part for unit in units[:start] for part in unit if isinstance(part, Image)]
    repeated = before[-1:] if not _leading_images(units[start]) else []
    return document_of([tuple(repeated), *units[start:stop]], goes_on=document.goes_on or stop < len(units))


def document_of(units: Sequence[tuple[Part, ...]], *, goes_on: bool) -> Dialogue:
    return Dialogue((Turn("document", tuple(part for unit in units for part in unit)),), goes_on)


def fill(sizes: Sequence[int], *, most: int, fits: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """(start, stop) of parts, each as full as it can be; what fits in none is a part by itself.

    `fits` decides of a start and a stop; `sizes`, about what each unit takes of `most`, tell where to look first.

    sizes (3, 3, 3), most 7 -> [(0, 2), (2, 3)]
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


def _repeated(opening: Sequence[Image], pairs: Sequence[Exchange], start: int) -> tuple[Image, ...]:
    """Images shown before an exchange, the last one last, but for those with which its question begins itself."""
    before = [turn for pair in pairs[:start] for turn in (pair.question, pair.answer)]
    shown = by_last_appearance([*opening, *(image for turn in before for image in turn.images)])
    own = _leading_images(pairs[start].question.parts)
    return tuple(image for image in shown if image not in own)


def _leading_images(parts: Sequence[Part]) -> tuple[Image, ...]:
    """Those before the first words."""
    words = (index for index, part in enumerate(parts) if isinstance(part, str) and part.strip())
    return tuple(part for part in parts[: next(words, len(parts))] if isinstance(part, Image))


def _with_images(images: Sequence[Image], pairs: Sequence[Exchange]) -> Dialogue:
    """Exchanges with these images in front."""
    first = replace(pairs[0].question, parts=(*images, *pairs[0].question.parts))
    rest = [turn for pair in pairs[1:] for turn in (pair.question, pair.answer)]
    return Dialogue((first, pairs[0].answer, *rest))
