"""Sources read as they are trained on: no preparing, no size, bounded memory.

The rows are the same for every rank and worker: each reads all records, and opens the images of its own rows alone. A
run that goes on reads the stream again up to its row, without opening an image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.account import Account, why_nothing_is_left
from finetune.data.collate import Batch, collate
from finetune.data.convert import read_dialogues
from finetune.data.dialogue import Image, RecordError, Remote
from finetune.data.fit import Fates, Fitter
from finetune.data.images import Augmentation, Preprocessing, open_image
from finetune.data.packing import pack
from finetune.data.prepared import PreparedSet
from finetune.data.schedule import Unit
from finetune.data.sources.download import Downloader
from finetune.data.sources.source import Source
from finetune.data.tokens import Example
from modeling.errors import UserError

TOKENISED_AT_ONCE = 64
WINDOW_ROWS = 64
"""Rows that are packed together: the more, the fuller, and the more examples are held."""


@dataclass(frozen=True)
class Drawn:
    """An example on its way into a row."""

    example: Example
    images: tuple[Image, ...]
    source: int
    place: str
    epoch: int
    """How often its source has been read before."""


Pass = Callable[[int, Account], Iterator[Drawn]]
"""(number of the pass, where records are counted) -> all examples of a source, once."""


@dataclass
class StreamedRows:
    """The rows of a run, made on the way: what a DataLoader calls with a row's number to get its Batch."""

    passes: Sequence[Pass]
    """For each source, how to go through it once."""
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
    """Examples of each source among which the next one is drawn."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    blank_image: bool = False

    def __post_init__(self) -> None:
        self.accounts: list[Account] = []
        """For each source, what became of its records in the first pass, as far as it has been read."""
        self._coming: Iterator[list[Drawn]] = iter(())
        self._next = self.rows  # nothing has begun
        self._tokens: dict[int, int] = {}
        self._epochs: dict[int, int] = {}

    def __len__(self) -> int:
        return self.rows

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        """`features` is one `{"row": number}`: a micro-batch is one pack."""
        (feature,) = features
        return self.at(feature["row"])

    def tokens(self, number: int) -> int:
        """Tokens of a row that has been made."""
        return self._tokens.get(number, 0)

    def epoch(self, number: int) -> int:
        return self._epochs.get(number, 0)

    def at(self, number: int) -> Batch:
        """Rows are made in order; asking for an earlier one begins again."""
        if number < self._next:
            self._coming, self._next = self._stream(), 0
        row = next(islice(self._coming, number - self._next, None))
        self._next = number + 1
        batch = self._collate(row, number)
        self._tokens[number] = batch["input_ids"].shape[1] if row else 0
        self._epochs[number] = min((drawn.epoch for drawn in row), default=0)
        return batch

    def _collate(self, row: Sequence[Drawn], number: int) -> Batch:
        """An image that cannot be opened takes its example out of the row, and is counted."""
        rng = np.random.default_rng([self.seed, number, 8]) if self.augmentation != Augmentation() else None
        pixels: dict[Image, np.ndarray] = {}
        usable = []
        for drawn in row:
            try:
                pixels |= {image: self._pixels(image, rng) for image in drawn.images if image not in pixels}
                usable.append(drawn)
            except RecordError as error:
                account = self.accounts[drawn.source]
                account.kept -= 1
                account.reject(drawn.place, error)
        numbers = {image: index for index, image in enumerate(pixels)}
        levels = list(pixels.values())
        return collate(
            [drawn.example for drawn in usable],
            [[numbers[image] for image in drawn.images] for drawn in usable],
            pixels=lambda index: levels[index],
            image_size=self.preprocessing.size,
            filler=self.filler,
            blank_image=self.blank_image,
        )

    def _pixels(self, image: Image, rng: np.random.Generator | None) -> np.ndarray:
        if isinstance(image.source, Remote):
            assert self.downloader is not None
            image = Image(self.downloader.fetch(image.source.url))
        return self.preprocessing.pixels(open_image(image), augmentation=self.augmentation, rng=rng)

    def _stream(self) -> Iterator[list[Drawn]]:
        """Rows without end: examples mixed by weight, gathered in windows, packed, and the window's rows shuffled."""
        self.accounts = [Account(name) for name in self.names]
        examples = self._mix([self._endless(number) for number in range(len(self.passes))])
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

    def _mix(self, streams: Sequence[Iterator[Drawn]]) -> Iterator[Drawn]:
        """Always from the source furthest behind its share: any stretch has the ratio, to one example."""
        given = [0.0] * len(streams)
        while True:
            number = min(range(len(streams)), key=lambda index: given[index])
            drawn = next(streams[number])
            amount = len(drawn.example) if self.unit == "tokens" else 1
            given[number] += amount / (self.weights[number] or 1.0)
            yield drawn

    def _endless(self, number: int) -> Iterator[Drawn]:
        """One pass after the other, through a shuffle buffer."""
        for epoch in count():
            account = self.accounts[number] if epoch == 0 else Account(self.names[number])
            rng = np.random.default_rng([self.seed, epoch, number, 7])
            held: list[Drawn] = []
            empty = True
            for drawn in self.passes[number](epoch, account):
                empty = False
                held.append(drawn)
                if len(held) > self.buffer:
                    place = int(rng.integers(len(held)))
                    held[place], held[-1] = held[-1], held[place]
                    yield held.pop()
            if empty:
                raise UserError(why_nothing_is_left([account]))
            yield from (held[place] for place in rng.permutation(len(held)))


def read_pass(source: Source, fitter: Fitter, number: int) -> Pass:
    """A streamed source."""

    def one_pass(epoch: int, account: Account) -> Iterator[Drawn]:
        dialogues = read_dialogues(source, account)
        for start in count(step=TOKENISED_AT_ONCE):
            chunk = list(islice(dialogues, TOKENISED_AT_ONCE))
            if not chunk:
                return
            account.dialogues += len(chunk)
            fates = Fates(account)
            for origin, (_, dialogue) in enumerate(chunk):
                pieces = fitter.arrange([(origin, dialogue)], number=start + origin)
                for piece, example in fitter.fit(pieces, same=lambda image: image):
                    fates.take(piece, example)
                    if isinstance(example, Example):
                        yield Drawn(example, piece.dialogue.images, number, chunk[origin][0], epoch)
            fates.tell({origin: place for origin, (place, _) in enumerate(chunk)})

    return one_pass


def prepared_pass(found: PreparedSet, number: int, seed: int) -> Pass:
    """A prepared source among streamed ones."""

    def one_pass(epoch: int, account: Account) -> Iterator[Drawn]:
        for row in np.random.default_rng([seed, epoch, number]).permutation(len(found)).tolist():
            images = found.dialogue(row).images
            yield Drawn(found.example(row), images, number, found.examples.text("place", row), epoch)

    return one_pass


def downloads(folder: Path, sources: Sequence[Source]) -> Downloader | None:
    """What fetches the images of sources that allow it."""
    allowed: list[Any] = [source for source in sources if source.download]
    return Downloader(folder, http=any(source.download_http for source in allowed)) if allowed else None
