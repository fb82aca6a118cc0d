"""Rows of sources that are read during training: nothing is prepared, and memory is bounded whatever their size.

    row       0   1   2   3   4   5   6   7 ...        L = 4 lanes; lane l makes the rows l, l + L, ...
    lane      0   1   2   3   0   1   2   3
    rank      0   1   0   1   0   1   0   1            2 processes that train: each has every other lane
    worker    a   c   b   d   a   c   b   d            2 workers for each: every lane has one process

A lane reads its own shards of each source, mixes the sources by weight, packs a window of rows and shuffles it. Lanes
know nothing of each other, and of who runs them: a row is a function of data, seed and number of lanes. The state of a
lane after each of its rows is a few JSON values; a run that goes on from it reads again the lane's last blocks of
records, and passes over the records before them in their shards.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.collate import Batch, MadeRow, Rows, collate, stack_pixels
from finetune.data.conversation import Image, RecordError, Remote
from finetune.data.images import Preprocessing, open_image
from finetune.data.io.download import Downloader
from finetune.data.packing import pack_window
from finetune.data.sampling import Unit
from finetune.data.stats import SourceStats, add_up, why_nothing_is_left
from finetune.data.stream_sources import Drawn, Place, Reader
from finetune.data.tokenize import Encoder
from finetune.recipe.schema import Augment, Source
from modeling.errors import UserError

WINDOW_ROWS = 8
"""Number of rows that are packed together. A larger window fills them no better, as `pack_window` chooses its end."""

State = dict[str, Any]
"""State of a lane after one of its rows, as JSON values."""


@dataclass
class StreamedRows(Rows):
    """The rows of a run. Each lane makes its rows in order; asking for an earlier one restarts the lane."""

    readers: Sequence[Reader]
    """The reader of each source."""
    names: Sequence[str]
    weights: Sequence[float | None]
    rows: int
    lanes: int
    row_tokens: int
    row_images: int
    seed: int
    preprocessing: Preprocessing
    filler: int
    encoder: Encoder
    downloaders: Sequence[Downloader | None] = ()
    """The downloader of each source whose images may be at URLs."""
    unit: Unit = "examples"
    limits: Sequence[int | None] = ()
    """The `limit` of each source."""
    augment: Augment = field(default_factory=Augment)
    blank_image: bool = False
    skipped: Collection[tuple[str, str]] = frozenset()
    """(source, record_id) of records that are left out."""
    window: int = WINDOW_ROWS

    def __post_init__(self) -> None:
        self._lanes: dict[int, Lane] = {}
        self._states: dict[int, State] = {}
        """Number of a row that was taken -> state after it; the last rows alone."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanes": {}}  # a worker process starts its own

    def __len__(self) -> int:
        return self.rows

    def workers(self, most: int, *, processes: int) -> int:
        """Return the largest number that divides the lanes of a process evenly."""
        lanes = self.lanes // processes
        return max((number for number in range(1, min(most, lanes) + 1) if lanes % number == 0), default=0)

    def make(self, number: int) -> MadeRow:
        lane = self._lanes.get(number % self.lanes)
        if lane is None or lane.number != number:
            lane = self._lanes[number % self.lanes] = self._lane_before(number)
        return lane.make(number)

    def take(self, made: MadeRow) -> Batch:
        assert made.state is not None
        self._states[made.number] = made.state
        for number in [number for number in self._states if number <= made.number - 3 * self.lanes]:
            del self._states[number]
        self._require_usable()
        return made.batch

    def _lane_before(self, number: int) -> "Lane":
        """Return the lane of a row at the last place before the row that is known."""
        lane, states = number % self.lanes, dict(self._states)  # other threads may take rows meanwhile
        known = [row for row in states if row < number and row % self.lanes == lane]
        return Lane(self, lane, states[max(known)] if known else None)

    def _require_usable(self) -> None:
        """Raise UserError where all of a source was read, and no image of it could be opened."""
        last = self._last_states(self.rows)
        for source, name in enumerate(self.names):
            if any(state["usable"][source] for state in last):
                continue
            # In every epoch these lanes have other shares; together they have had all.
            if len(last) * min(state["places"][source]["epoch"] for state in last) >= self.lanes:
                raise UserError(f"{name}: {why_nothing_is_left([self.source_stats[source]])}")

    def tokens(self, number: int) -> int:
        """Return the number of example tokens in a row that was taken lately."""
        return self._states[number]["tokens"]

    def epoch(self, number: int) -> int:
        """Return the epoch of a row that was taken lately: the first of those of its examples."""
        return self._states[number]["epoch"]

    def dialogues(self, number: int) -> list[tuple[tuple[str, str], Batch]]:
        """Return each example of a row that was taken lately as a batch of its own, with its origin."""
        return self._lane_before(number).dialogues(number)

    def empty(self) -> Batch:
        return self.collate([], {})

    @property
    def source_stats(self) -> list[SourceStats]:
        """Return the statistics of each source in its first epoch, as far as the rows that were taken have read it."""
        found = [SourceStats(name) for name in self.names]
        for state in self._last_states(self.rows):
            for stats, more in zip(found, state["stats"], strict=True):
                stats.add(SourceStats.from_json(more))
        for stats, limit in zip(found, self.limits, strict=False):
            stats.limited = stats.read == limit
        return found

    def state(self, rows: int) -> list[State]:
        return self._last_states(rows)

    def restore(self, state: Sequence[Any]) -> None:
        for one in state:
            if not isinstance(one, dict) or one.get("lanes") != self.lanes:
                got = one.get("lanes") if isinstance(one, dict) else "another version's"
                raise UserError(
                    f"the checkpoint's place in the streams: expected that of {self.lanes} lanes, got {got!r:.80}\n"
                    "  start the run again in another folder"
                )
            self._states[one["row"]] = one

    def _last_states(self, rows: int) -> list[State]:
        """Return the state of each known lane after its last row below `rows`."""
        last = {row % self.lanes: row for row in sorted(self._states) if row < rows}
        return [self._states[last[lane]] for lane in sorted(last)]

    def collate(self, row: Sequence[Drawn], pixels: Mapping[Image, np.ndarray]) -> Batch:
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


Lose = Callable[[Drawn, RecordError, bool], None]
"""(an example, why an image of it cannot be opened, whether the example goes on without it)."""


class Lane:
    """Makes every L-th row, in order."""

    def __init__(self, rows: StreamedRows, lane: int, state: State | None):
        """Go on after the row of a state, or begin."""
        self.rows, self.lane = rows, lane
        self.number = state["row"] + rows.lanes if state else lane
        """Number of its next row."""
        self._epoch = state["epoch"] if state else 0
        self._usable = list(state["usable"]) if state else [False] * len(rows.names)
        self._lost = (
            [SourceStats.from_json(one) for one in state["lost"]] if state else list(map(SourceStats, rows.names))
        )
        """What lost images change in the statistics of each source."""
        self._partly_lost = [dict(one) for one in state["partly_lost"]] if state else [{} for _ in rows.names]
        """Record id -> number of its examples that are lost, of each source."""
        self._coming = self._pack_windows(state)

    def make(self, number: int) -> MadeRow:
        """Return row `number`; rows before it are left out, and their images not opened."""
        row, place = self._row(number)
        usable, pixels = self._open(row, number, lose=self._lose)
        for drawn in usable:
            self._usable[drawn.source] = True
        tokens = sum(len(drawn.example) for drawn in usable)
        stats = [add_up(read, lost) for read, lost in zip(self._read, self._lost, strict=True)]
        state = {
            "lanes": self.rows.lanes,
            "row": number,
            "tokens": tokens,
            "epoch": self._epoch,
            **place,
            "usable": list(self._usable),
            "lost": [one.partial() for one in self._lost],
            "partly_lost": [dict(one) for one in self._partly_lost],
            "stats": [one.partial() for one in stats],
        }
        return MadeRow(number, self.rows.collate(usable, pixels), state)

    def dialogues(self, number: int) -> list[tuple[tuple[str, str], Batch]]:
        row, _ = self._row(number)
        alone = [(drawn, self._open([drawn], number, lose=lambda *_: None)) for drawn in row]
        return [(self._origin(drawn), self.rows.collate(*opened)) for drawn, opened in alone if opened[0]]

    def _origin(self, drawn: Drawn) -> tuple[str, str]:
        return self.rows.names[drawn.source], drawn.record_id

    def _row(self, number: int) -> tuple[list[Drawn], State]:
        """Return (the examples of row `number`, the place after it)."""
        assert number >= self.number
        assert number % self.rows.lanes == self.lane
        while True:
            row, place = next(self._coming)
            kept = [drawn for drawn in row if self._origin(drawn) not in self.rows.skipped]
            if len(kept) < len(row):  # a record that is skipped could be opened before
                self._usable = [
                    usable or any(drawn.source == source for drawn in row) for source, usable in enumerate(self._usable)
                ]
            self._epoch = min((drawn.epoch for drawn in kept), default=self._epoch)
            self.number += self.rows.lanes
            if self.number > number:
                return kept, place

    def _pack_windows(self, state: State | None) -> Iterator[tuple[list[Drawn], State]]:
        """Yield (a row's examples, the place after it): mix examples by weight, pack a window, shuffle its rows."""
        rows, given = self.rows, state["given"] if state else 0
        mixture = Mixture(rows.readers, self.lane, [weight or 1.0 for weight in rows.weights], rows.unit, state)
        waiting: list[tuple[Drawn, State]] = []
        for window in count(state["window"] if state else 0):
            tokens = sum(len(drawn.example) for drawn, _ in waiting)
            images = sum(len(set(drawn.images)) for drawn, _ in waiting)
            while max(tokens / rows.row_tokens, images / rows.row_images) < rows.window + 1:
                place = mixture.place()
                drawn = mixture.draw()
                waiting.append((drawn, place))
                tokens, images = tokens + len(drawn.example), images + len(set(drawn.images))
            self._read = [coming.stats for coming in mixture.coming]
            sizes = [(len(drawn.example), len(set(drawn.images))) for drawn, _ in waiting]
            packs = pack_window(
                *zip(*sizes, strict=True), rows=rows.window, row_tokens=rows.row_tokens, row_images=rows.row_images
            )
            place = {"window": window, **waiting[0][1]}
            order = np.random.default_rng([rows.seed, self.lane, window, 6]).permutation(len(packs))
            for number, row in enumerate(order[given:].tolist(), start=given + 1):
                yield [waiting[index][0] for index in packs[row]], {**place, "given": number}
            given = 0
            waiting = waiting[sum(map(len, packs)) :]

    def _open(self, row: Sequence[Drawn], number: int, *, lose: Lose) -> tuple[list[Drawn], dict[Image, np.ndarray]]:
        """Return (examples whose images can be opened, the pixels of these images); `lose` counts the others.

        As in preparing, a document leaves out lost images, if at least one is left.
        """
        rows = self.rows
        rng = np.random.default_rng([rows.seed, number, 8]) if rows.augment != Augment() else None
        urls: defaultdict[int, list[str]] = defaultdict(list)
        for drawn in row:
            urls[drawn.source] += [image.source.url for image in drawn.images if isinstance(image.source, Remote)]
        fetched: dict[str, Path | RecordError] = {}
        for source, named in urls.items():
            if named:
                downloader = rows.downloaders[source]
                assert downloader is not None
                fetched |= downloader.fetch_all(named)
        pixels = dict[Image, np.ndarray]()
        usable: list[Drawn] = []
        for drawn in row:
            found = {image: self._pixels(image, fetched, rng) for image in drawn.images if image not in pixels}
            errors = [one for one in found.values() if isinstance(one, RecordError)]
            gone = [isinstance(found.get(image), RecordError) for image in drawn.images]
            goes_on = drawn.document is not None and not all(gone)
            for error in errors if goes_on else errors[:1]:
                lose(drawn, error, goes_on)
            if not errors or goes_on:
                usable += drawn.without(gone, rows.encoder) if errors else [drawn]
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
            return self.rows.preprocessing.pixels(open_image(image), augment=self.rows.augment, rng=rng)
        except RecordError as error:
            return error

    def _lose(self, drawn: Drawn, error: RecordError, goes_on: bool) -> None:
        """Count a lost example or image of the first epoch. Raises the error if the source is prepared."""
        if drawn.parts is None:
            raise error
        if drawn.epoch:
            return
        stats, partly_lost = self._lost[drawn.source], self._partly_lost[drawn.source]
        lost = 0 if goes_on else partly_lost.pop(drawn.record_id, 0) + 1
        if lost == drawn.parts:
            stats.kept -= 1
            stats.reject(drawn.record_id, error)
            return
        stats.reject_part(drawn.record_id, error)
        if lost:
            partly_lost[drawn.record_id] = lost


class Mixture:
    """The examples of all sources in one order. At any point, each source is within one example of its share.

    Among the sources whose next example does not exceed their share, the one that would fall behind first is next
    (earliest deadline first, as in proportionate scheduling: Baruah et al. 1996).
    """

    def __init__(
        self, readers: Sequence[Reader], lane: int, weights: Sequence[float], unit: Unit, state: State | None = None
    ):
        """Go on where a state's window began, or begin."""
        places = [Place(**place) for place in state["places"]] if state else [Place()] * len(readers)
        self._streams = [reader.read(lane, place) for reader, place in zip(readers, places, strict=True)]
        self._shares, self._unit = [weight / sum(weights) for weight in weights], unit
        self._given = list(state["mixed"]) if state else [0] * len(readers)
        self.coming = [next(stream) for stream in self._streams]

    def place(self) -> State:
        """Return the place of the next example, as JSON values."""
        return {"mixed": list(self._given), "places": [asdict(coming.place) for coming in self.coming]}

    def draw(self) -> Drawn:
        amounts = [len(coming.drawn.example) if self._unit == "tokens" else 1 for coming in self.coming]
        total = sum(self._given)
        due = [
            number
            for number, share in enumerate(self._shares)
            if self._given[number] < share * (total + amounts[number])
        ]
        chosen = min(due, key=lambda number: (self._given[number] + amounts[number]) / self._shares[number])
        drawn = self.coming[chosen].drawn
        self._given[chosen] += amounts[chosen]
        self.coming[chosen] = next(self._streams[chosen])
        return drawn


def downloaders(folder: Path, sources: Sequence[Source]) -> list[Downloader | None]:
    """Return the downloader of each source, None for one that allows no downloads and has no images at URLs.

    Each follows its own source: where one allows plain http, no image of another is redirected to it.
    """
    return [
        Downloader(folder, http=source.download == "http") if source.download or source.is_remote else None
        for source in sources
    ]
