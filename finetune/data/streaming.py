"""Rows of sources that are read during training: nothing is prepared, and memory is bounded whatever their size.

The rows are the same on every rank: each rank reads all records, and opens only the images of its own rows. A resumed
run reads the stream again up to its row, without opening images.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np

from finetune.data.chat_template import render
from finetune.data.chunking import Origin, Splitter, fit_records, without_images
from finetune.data.collate import Batch, collate, stack_pixels
from finetune.data.conversation import Dialogue, Image, RecordError, Remote
from finetune.data.images import Preprocessing, open_image
from finetune.data.io.download import Downloader
from finetune.data.packing import pack
from finetune.data.prepared import PreparedSet
from finetune.data.read_dialogues import read_dialogues
from finetune.data.sampling import Unit
from finetune.data.stats import SourceStats, why_nothing_is_left
from finetune.data.tokenize import Example, tokenize_all
from finetune.recipe.schema import Augment, Source
from modeling.errors import UserError

TOKENISED_AT_ONCE = 64
"""Number of records that are tokenised at once."""

WINDOW_ROWS = 64
"""Number of rows that are packed together. A larger window fills rows better, and keeps more examples in memory."""


@dataclass(frozen=True)
class Drawn:
    """An example on its way into a row."""

    example: Example
    images: tuple[Image, ...]
    source: int
    epoch: int
    """Number of times that its source was read to the end before."""
    record_id: str
    """The id of its record."""
    origin: Origin | None = None
    """Its record; None where the source is prepared, so that its images are known to open."""
    document: Dialogue | None = None
    """The document, if it is a streamed one: images that cannot be opened are left out of it."""

    def without(self, lost: Sequence[bool]) -> "list[Drawn]":
        """Return the examples of a document without its lost images; `lost` has one value per image, in order."""
        assert self.document is not None
        assert self.origin is not None
        documents = without_images(self.document, lost)
        examples = tokenize_all([render(document) for document in documents], self.origin.encoder)
        return [
            replace(self, example=example, images=document.images, document=document)
            for document, example in zip(documents, examples, strict=True)
            if isinstance(example, Example) and document.turns[0].text
        ]


ReadEpoch = Callable[[int, SourceStats], Iterator[Drawn]]
"""(epoch, statistics to count records in) -> all examples of a source, once."""


@dataclass(frozen=True)
class Lost:
    """An example (or only one image of a document) that is left out because an image cannot be opened."""

    row: int
    index: int
    """Index in its row."""
    source: int
    record_id: str
    of: int
    """Number of examples of its record."""
    reason: str
    detail: str
    goes_on: bool = False


@dataclass
class StreamedRows:
    """The rows of a run, made in order. Asking for an earlier row restarts the stream."""

    readers: Sequence[ReadEpoch]
    """The function that reads each source once."""
    names: Sequence[str]
    weights: Sequence[float | None]
    rows: int
    row_tokens: int
    row_images: int
    seed: int
    preprocessing: Preprocessing
    filler: int
    downloader: Downloader | None = None
    unit: Unit = "examples"
    buffer: int = 1000
    """Size of each source's shuffle buffer, in examples."""
    augment: Augment = field(default_factory=Augment)
    blank_image: bool = False
    skipped: Collection[tuple[str, str]] = frozenset()
    """(source, record_id) of records that are left out."""
    remembered: int = 0
    """Number of latest rows whose dialogues are kept, so that `dialogues` need not restart the stream."""

    def __post_init__(self) -> None:
        # Rows are made in a thread, and who logs asks for their sizes: that never waits for images, which may be
        # downloads.
        self._reading, self._opening = RLock(), Lock()
        self._tokens: dict[int, int] = {}
        self._epochs: dict[int, int] = {}
        self._last: dict[int, list[Drawn]] = {}
        self._lost: set[Lost] = set()
        self._begin()

    def _begin(self) -> None:
        self._stats = [SourceStats(name) for name in self.names]
        self._coming = self._stream()
        self._next = 0

    @property
    def source_stats(self) -> list[SourceStats]:
        """Return the statistics of each source in its first epoch, as far as it has been read.

        Each process counts only images that could not be opened in its own rows, and in restored ones.
        """
        with self._reading:
            return [self._stats_of(number) for number in range(len(self.names))]

    def _stats_of(self, source: int) -> SourceStats:
        stats = SourceStats(self.names[source])
        stats.add(self._stats[source])
        lost = sorted((one for one in self._lost if one.source == source), key=lambda one: (one.row, one.index))
        left = {one.record_id: one.of for one in lost}
        for one in lost:
            left[one.record_id] -= not one.goes_on
            error = RecordError(one.reason, one.detail)
            if one.goes_on or left[one.record_id]:
                stats.reject_part(one.record_id, error)
            else:
                stats.kept -= 1
                stats.reject(one.record_id, error)
        return stats

    def state(self, rows: int) -> list[Any]:
        with self._reading:
            return [list(astuple(one)) for one in self._lost if one.row < rows]

    def restore(self, state: Sequence[Any]) -> None:
        with self._reading:
            self._lost |= {Lost(*values) for values in state}

    def __len__(self) -> int:
        return self.rows

    def tokens(self, number: int) -> int:
        with self._reading:
            if number not in self._tokens:
                self._go_on(number)
        return self._tokens[number]

    def epoch(self, number: int) -> int:
        with self._reading:
            if number not in self._epochs:
                self._go_on(number)
        return self._epochs[number]

    def dialogues(self, number: int) -> list[tuple[tuple[str, str], Batch]]:
        with self._reading:
            row = self._last[number] if number in self._last else self._go_on(number)
        with self._opening:
            alone = [(drawn, self._opened([drawn], number, lose=lambda *_: None)) for drawn in row]
        return [(self._origin(drawn), self._collate(*opened)) for drawn, opened in alone if opened[0]]

    def empty(self) -> Batch:
        return self._collate([], {})

    def _origin(self, drawn: Drawn) -> tuple[str, str]:
        return self.names[drawn.source], drawn.record_id

    def at(self, number: int) -> Batch:
        with self._reading:
            coming = self._go_on(number)
        with self._opening:
            row, pixels = self._opened(coming, number, lose=self._lose)
        with self._reading:
            self._tokens[number] = sum(len(drawn.example) for drawn in row)
        return self._collate(row, pixels)

    def _collate(self, row: Sequence[Drawn], pixels: Mapping[Image, np.ndarray]) -> Batch:
        numbers = {image: index for index, image in enumerate(pixels)}
        levels, size = list(pixels.values()), self.preprocessing.size
        return collate(
            [drawn.example for drawn in row],
            [[numbers[image] for image in drawn.images] for drawn in row],
            show=lambda images: {
                "pixel_values": stack_pixels(images, lambda image: levels[image], size=size, blank=self.blank_image)
            },
            filler=self.filler,
        )

    def _go_on(self, number: int) -> list[Drawn]:
        """Return row `number`. Rows are made in order, so an earlier row restarts the stream."""
        if number < self._next:
            self._begin()
        row: list[Drawn] = []
        while self._next <= number:
            row = [drawn for drawn in next(self._coming) if self._origin(drawn) not in self.skipped]
            self._tokens[self._next] = sum(len(drawn.example) for drawn in row)
            self._epochs[self._next] = min((drawn.epoch for drawn in row), default=self._epochs.get(self._next - 1, 0))
            self._last[self._next] = row
            self._last.pop(self._next - self.remembered, None)
            self._next += 1
        return row

    def _opened(
        self, row: Sequence[Drawn], number: int, *, lose: Callable[[Drawn, int, int, RecordError, bool], None]
    ) -> tuple[list[Drawn], dict[Image, np.ndarray]]:
        """Return (examples whose images can be opened, the pixels of these images); `lose` counts the others.

        As in preparing, a document leaves out lost images, if at least one is left.
        """
        rng = np.random.default_rng([self.seed, number, 8]) if self.augment != Augment() else None
        urls = [image.source.url for drawn in row for image in drawn.images if isinstance(image.source, Remote)]
        fetched: dict[str, Path | RecordError] = {}
        if urls:
            assert self.downloader is not None
            fetched = self.downloader.fetch_all(urls)
        pixels = dict[Image, np.ndarray]()
        usable: list[Drawn] = []
        for index, drawn in enumerate(row):
            found = {image: self._pixels(image, fetched, rng) for image in drawn.images if image not in pixels}
            errors = [one for one in found.values() if isinstance(one, RecordError)]
            gone = [isinstance(found.get(image), RecordError) for image in drawn.images]
            goes_on = drawn.document is not None and not all(gone)
            for error in errors if goes_on else errors[:1]:
                lose(drawn, number, index, error, goes_on)
            if not errors or goes_on:
                usable += drawn.without(gone) if errors else [drawn]
                pixels |= {image: one for image, one in found.items() if not isinstance(one, RecordError)}
        return usable, pixels

    def _pixels(
        self, image: Image, fetched: Mapping[str, Path | RecordError], rng: np.random.Generator | None
    ) -> np.ndarray | RecordError:
        if isinstance(image.source, Remote):
            found = fetched[image.source.url]
            if isinstance(found, RecordError):
                return found
            image = Image(found)
        try:
            return self.preprocessing.pixels(open_image(image), augment=self.augment, rng=rng)
        except RecordError as error:
            return error

    def _lose(self, drawn: Drawn, row: int, index: int, error: RecordError, goes_on: bool) -> None:
        """Record a lost example or image in the first epoch. Raises the error if the source is prepared."""
        if drawn.origin is None:
            raise error
        if not drawn.epoch:
            lost = Lost(
                row, index, drawn.source, drawn.record_id, drawn.origin.examples, error.reason, error.detail, goes_on
            )
            with self._reading:
                self._lost.add(lost)

    def _stream(self) -> Iterator[list[Drawn]]:
        """Yield rows without end: mix examples by weight, collect a window, pack it, and shuffle its rows."""
        streams = [self._endless(number) for number in range(len(self.readers))]
        examples = mix(streams, [weight or 1.0 for weight in self.weights], unit=self.unit)
        for window in count():
            gathered: list[Drawn] = []
            tokens = images = 0
            while tokens < WINDOW_ROWS * self.row_tokens and images < WINDOW_ROWS * self.row_images:
                drawn = next(examples)
                gathered.append(drawn)
                tokens, images = tokens + len(drawn.example), images + len(set(drawn.images))
            lengths, pictures = zip(*((len(one.example), len(set(one.images))) for one in gathered), strict=True)
            packs = pack(lengths, pictures, row_tokens=self.row_tokens, row_images=self.row_images)
            order = np.random.default_rng([self.seed, window, 6]).permutation(len(packs))
            yield from ([gathered[index] for index in packs[row]] for row in order)

    def _endless(self, number: int) -> Iterator[Drawn]:
        """Yield epoch after epoch of a source. Raises UserError after an epoch without any usable record."""
        first = self._stats[number]
        for epoch in count():
            stats = first if epoch == 0 else SourceStats(self.names[number])
            rng = np.random.default_rng([self.seed, epoch, number, 7])
            yield from shuffle(self.readers[number](epoch, stats), rng, buffer=self.buffer)
            for one in (stats, self._stats_of(number)):
                if not one.kept:
                    raise UserError(f"{one.source}: {why_nothing_is_left([one])}")


def downloads(folder: Path, sources: Sequence[Source]) -> Downloader | None:
    """Return a downloader for the sources that allow downloads, or have images at URLs; None if none does."""
    allowed: list[Any] = [source for source in sources if source.download or source.is_remote]
    return Downloader(folder, http=any(source.download == "http" for source in allowed)) if allowed else None


def streamed_epochs(source: Source, splitter: Splitter, number: int) -> ReadEpoch:
    """Return the function that reads a streamed source once."""

    def one_epoch(epoch: int, stats: SourceStats) -> Iterator[Drawn]:
        dialogues = read_dialogues(source, stats, seed=splitter.seed)
        for start in count(step=TOKENISED_AT_ONCE):
            chunk = list(islice(dialogues, TOKENISED_AT_ONCE))
            if not chunk:
                return
            stats.dialogues += len(chunk)
            for piece, example, origin in fit_records(chunk, splitter, stats, start=start):
                document = piece.dialogue if piece.dialogue.is_document else None
                yield Drawn(example, piece.dialogue.images, number, epoch, origin.record_id, origin, document)

    return one_epoch


def prepared_epochs(found: PreparedSet, number: int, seed: int) -> ReadEpoch:
    """Return the function that reads a prepared source once, shuffled, to be mixed with streamed ones."""

    def one_epoch(epoch: int, stats: SourceStats) -> Iterator[Drawn]:
        stats.add(found.stats)
        for row in np.random.default_rng([seed, epoch, number]).permutation(len(found)).tolist():
            record_id = found.examples.text("record_id", row)
            yield Drawn(found.example(row), found.dialogue(row).images, number, epoch, record_id)

    return one_epoch


def shuffle(examples: Iterable[Drawn], rng: np.random.Generator, *, buffer: int) -> Iterator[Drawn]:
    """Yield examples in random order, each drawn from a buffer of at most `buffer` examples."""
    kept: list[Drawn] = []
    for drawn in examples:
        if len(kept) < buffer:
            kept.append(drawn)
        else:
            index = int(rng.integers(buffer))
            yield kept[index]
            kept[index] = drawn
    yield from (kept[index] for index in rng.permutation(len(kept)))


def mix(streams: Sequence[Iterator[Drawn]], weights: Sequence[float], *, unit: Unit) -> Iterator[Drawn]:
    """Merge endless streams into one. At any point, each stream is within one example of its share.

    Among the streams whose next example does not exceed their share, the one that would fall behind first is next
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
