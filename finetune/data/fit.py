"""Dialogues -> examples that fit: joined, bounded, tokenised, and divided while they are too long."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, RecordError
from finetune.data.formats import FORMATS
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder, Example, tokenize_all
from finetune.data.turns import Piece, bound, document_part, document_units, fill, join, opening_images
from finetune.recipe.schema import Source

TOO_LONG, TOO_MANY_IMAGES = "too long", "too many images"


@dataclass(frozen=True)
class Limits:
    """What an example may hold."""

    max_length: int
    """Tokens."""
    max_images: int
    """Distinct ones."""


@dataclass(frozen=True)
class Fitter:
    """How the dialogues of one source become examples."""

    encoder: Encoder
    limits: Limits
    turns: int | None
    """Most turns of a dialogue; None: as the records have it."""
    ordered: bool
    """Whether turns build on each other; if not, they are shuffled by `seed`."""
    seed: int

    def arrange(self, group: Sequence[tuple[int, Dialogue]], *, number: int) -> list[Piece]:
        """(origin, dialogue) that open with the same images, joined and bounded; the group's number seeds its order."""
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
        """Each piece's example, or why it has none; one that is too long is divided where it may be, and tried again.

        `same` gives equal values for images that count as one.
        """
        tokenised = tokenize_all([render(piece.dialogue) for piece in pieces], self.encoder)
        for piece, example in zip(pieces, tokenised, strict=True):
            error = self._crowd(piece.dialogue, same) or self._misfit(piece.dialogue, example)
            parts = self._divide(piece, same) if error and error.reason in (TOO_LONG, TOO_MANY_IMAGES) else ()
            if parts:
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

    def _divide(self, piece: Piece, same: Callable[[Image], Any]) -> Sequence[Piece]:
        """Smaller ones; none where it may not, or cannot, be divided."""
        if piece.dialogue.is_document:
            parts = self._cut(piece.dialogue, same)
            return [Piece(part, piece.origins) for part in parts] if len(parts) > 1 else ()
        return piece.halves() or () if self.turns is not None else ()

    def _cut(self, document: Dialogue, same: Callable[[Image], Any]) -> list[Dialogue]:
        """Between texts, each part as full as it can be. Only the last says that the document ends."""
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
    """What became of the dialogues that were fitted together, each by its origin."""

    def __init__(self, stats: SourceStats):
        self.stats = stats
        self._kept: Counter[int] = Counter()
        self._lost: defaultdict[int, list[RecordError]] = defaultdict(list)
        self._documents: Counter[int] = Counter()

    def take(self, piece: Piece, example: Example | RecordError) -> None:
        """Count a piece: its example, and for each of its turns the dialogue it is from."""
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

    def tell(self, record_ids: Mapping[int, str]) -> None:
        """Origin -> record_id: count each as one record, kept or rejected, and the parts that kept ones lost."""
        for origin, record_id in record_ids.items():
            if self._kept[origin]:
                self.stats.documents_cut += self._documents[origin] > 1
                self.stats.kept += 1
                for error in self._lost[origin]:
                    self.stats.reject_part(record_id, error)
            else:
                self.stats.reject(record_id, self._lost[origin][0])


def fitter(source: Source, encoder: Encoder, limits: Limits, *, seed: int) -> Fitter:
    """As the source says, or its format where the source is silent."""
    ordered = FORMATS[source.format].ordered if source.ordered is None else source.ordered
    return Fitter(encoder, limits, source.turns, ordered, seed)
