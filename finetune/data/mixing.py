"""A source -> its examples, pass after pass, shuffled in a buffer; several sources -> one stream of examples.

No source has to have a size, and no more of it is read than is asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image
from finetune.data.fit import Fitter, Outcomes
from finetune.data.prepared import PreparedSet
from finetune.data.records import read_dialogues
from finetune.data.sampling import Unit
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder, Example, tokenize_all
from finetune.data.turns import Piece, without_images
from finetune.recipe.schema import Source

TOKENISED_AT_ONCE = 64


@dataclass(eq=False)
class Origin:
    """A record of a streamed source."""

    record_id: str
    examples: int
    """Those it gave."""
    encoder: Encoder


@dataclass(frozen=True)
class Drawn:
    """An example on its way into a row."""

    example: Example
    images: tuple[Image, ...]
    source: int
    epoch: int
    """How often its source has been read before."""
    record_id: str
    """Of its record."""
    origin: Origin | None = None
    """None where the source is prepared, so that its images have been opened before."""
    document: Dialogue | None = None
    """Of a streamed document: itself, which goes on without an image that does not open."""

    def without(self, lost: Sequence[bool]) -> "list[Drawn]":
        """The examples of a document without those of its images that are lost, by their order."""
        assert self.document is not None
        assert self.origin is not None
        documents = without_images(self.document, lost)
        examples = tokenize_all([render(document) for document in documents], self.origin.encoder)
        return [
            replace(self, example=example, images=document.images, document=document)
            for document, example in zip(documents, examples, strict=True)
            if isinstance(example, Example) and document.turns[0].text
        ]


Pass = Callable[[int, SourceStats], Iterator[Drawn]]
"""(number of the pass, where records are counted) -> all examples of a source, once."""


def read_pass(source: Source, fitter: Fitter, number: int) -> Pass:
    """A streamed source."""

    def one_pass(epoch: int, stats: SourceStats) -> Iterator[Drawn]:
        dialogues = read_dialogues(source, stats, seed=fitter.seed)
        for start in count(step=TOKENISED_AT_ONCE):
            chunk = list(islice(dialogues, TOKENISED_AT_ONCE))
            if not chunk:
                return
            stats.dialogues += len(chunk)
            for piece, example, origin in fit_records(chunk, fitter, stats, start=start):
                document = piece.dialogue if piece.dialogue.is_document else None
                yield Drawn(example, piece.dialogue.images, number, epoch, origin.record_id, origin, document)

    return one_pass


def fit_records(
    chunk: Sequence[tuple[str, Sequence[Dialogue]]],
    fitter: Fitter,
    stats: SourceStats,
    *,
    start: int = 0,
    same: Callable[[Image], object] = lambda image: image,
) -> list[tuple[Piece, Example, Origin]]:
    """The examples of (record_id, dialogues), the first of which is number `start` of its source; all are counted.

    `same` gives equal values for images that count as one.
    """
    arranged = [
        fitter.arrange([(index, dialogue) for dialogue in dialogues], number=start + index)
        for index, (_, dialogues) in enumerate(chunk)
    ]
    fitted = list(fitter.fit([piece for pieces in arranged for piece in pieces], same=same))
    outcomes = Outcomes(stats)
    for piece, example in fitted:
        outcomes.take(piece, example)
    outcomes.tell({number: record_id for number, (record_id, _) in enumerate(chunk)})
    kept = [(piece, example) for piece, example in fitted if isinstance(example, Example)]
    examples = Counter(piece.origins[0] for piece, _ in kept)
    origins = {number: Origin(chunk[number][0], amount, fitter.encoder) for number, amount in examples.items()}
    return [(piece, example, origins[piece.origins[0]]) for piece, example in kept]


def prepared_pass(found: PreparedSet, number: int, seed: int) -> Pass:
    """A prepared source among streamed ones."""

    def one_pass(epoch: int, stats: SourceStats) -> Iterator[Drawn]:
        stats.add(found.stats)
        for row in np.random.default_rng([seed, epoch, number]).permutation(len(found)).tolist():
            record_id = found.examples.text("record_id", row)
            yield Drawn(found.example(row), found.dialogue(row).images, number, epoch, record_id)

    return one_pass


def shuffle(examples: Iterable[Drawn], rng: np.random.Generator, *, buffer: int) -> Iterator[Drawn]:
    """Each a random one of those held, at most `buffer`."""
    held: list[Drawn] = []
    for drawn in examples:
        if len(held) < buffer:
            held.append(drawn)
        else:
            place = int(rng.integers(buffer))
            yield held[place]
            held[place] = drawn
    yield from (held[place] for place in rng.permutation(len(held)))


def mix(streams: Sequence[Iterator[Drawn]], weights: Sequence[float], *, unit: Unit) -> Iterator[Drawn]:
    """Endless streams -> one. However many are taken, each stream has its share of them, to one example.

    Of the streams whose next example would not lead them beyond their share, the one that would fall behind first
    (earliest deadline first, as in proportionate scheduling: Baruah et al. 1996).
    """
    shares = [weight / sum(weights) for weight in weights]
    coming = [next(stream) for stream in streams]
    given = [0] * len(streams)
    while True:
        amounts = [len(drawn.example) if unit == "tokens" else 1 for drawn in coming]
        total = sum(given)
        due = [number for number, share in enumerate(shares) if given[number] < share * (total + amounts[number])]
        chosen = min(due, key=lambda number: (given[number] + amounts[number]) / shares[number])
        yield coming[chosen]
        given[chosen] += amounts[chosen]
        coming[chosen] = next(streams[chosen])
