"""Sources -> the endless examples of one lane, each with the place from which a later run reads on.

A stream's rows are made by L lanes; lane l makes the rows l, l + L, ... and reads every source by itself, 1/L of it in
each epoch: its share. Lane l has share (l + epoch) % L, so after L epochs it has had every example.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune.data.chat_template import render
from finetune.data.chunking import Splitter, fit_records, without_images
from finetune.data.conversation import Dialogue, Image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.prepared import PreparedSet
from finetune.data.read_dialogues import count_records, open_and_count, try_dialogue
from finetune.data.shards import Shard, read_shard
from finetune.data.stats import SourceStats, add_up, why_nothing_is_left
from finetune.data.tokenize import Encoder, Example, tokenize_all
from finetune.recipe.schema import Source
from modeling.errors import UserError

if TYPE_CHECKING:
    import datasets

TOKENISED_AT_ONCE = 64
"""Number of records that are tokenised at once."""


@dataclass(frozen=True)
class Drawn:
    """An example on its way into a row."""

    example: Example
    images: tuple[Image, ...]
    source: int
    epoch: int
    """Number of times that its lane had read its share of the source before."""
    record_id: str
    parts: int | None = None
    """Number of examples of its record; None where the source is prepared, so that its images are known to open."""
    document: Dialogue | None = None
    """The document, if it is a streamed one: images that cannot be opened are left out of it."""

    def without(self, lost: Sequence[bool], encoder: Encoder) -> "list[Drawn]":
        """Return the examples of a document without its lost images; `lost` has one value per image, in order."""
        assert self.document is not None
        documents = without_images(self.document, lost)
        examples = tokenize_all([render(document) for document in documents], encoder)
        return [
            replace(self, example=example, images=document.images, document=document)
            for document, example in zip(documents, examples, strict=True)
            if isinstance(example, Example) and document.turns[0].text
        ]


@dataclass(frozen=True)
class Place:
    """The place of an example in a lane's share of a source, as values for JSON."""

    epoch: int = 0
    block: int = 0
    """Number of its block of records in the epoch."""
    index: int = 0
    """Its index in the order of the block's examples, or of a prepared share."""
    dataset: dict[str, Any] | None = None
    """State of the `datasets` iterator before the block; None before the first one."""
    stats: dict[str, Any] | None = None
    """Statistics of the lane's records of the first epoch before the block."""


@dataclass(frozen=True)
class Coming:
    """The next example of a reader."""

    drawn: Drawn
    place: Place
    stats: SourceStats
    """Statistics of the lane's records of the first epoch, as far as it has been read."""


class Reader(Protocol):
    """Reads one source. It is plain data, so that it can be sent to worker processes."""

    def read(self, lane: int, start: Place) -> Iterator[Coming]:
        """Yield the examples of a lane from a place on, epoch after epoch, without end.

        Raises UserError: nothing in the source is usable, or it cannot be read.
        """


@dataclass(frozen=True)
class StreamReader:
    """Reads a streamed source: its shards through `datasets`, in blocks of records, and shuffles each block."""

    source: Source
    shards: Sequence[Shard]
    """A multiple of `lanes`."""
    splitter: Splitter
    number: int
    """Number of the source among those of the run."""
    seed: int
    lanes: int
    block: int
    """Number of records in a block; a few more where it is tokenised in several parts."""

    def read(self, lane: int, start: Place) -> Iterator[Coming]:
        name = self.source.name
        first = SourceStats.from_json(start.stats) if start.stats else SourceStats(name)
        fruitless: list[SourceStats] = []
        for epoch in count(start.epoch):
            place = start if epoch == start.epoch else Place(epoch, stats=first.partial())
            read, usable = SourceStats(name), False
            for block, (dataset, examples, stats) in enumerate(self._blocks(lane, place), start=place.block):
                read.add(stats)
                place = replace(place, block=block, dataset=dataset, stats=first.partial())
                if epoch == 0:
                    first = add_up(first, stats)
                order = np.random.default_rng([self.seed, epoch, self.number, lane, block]).permutation(len(examples))
                for index in range(place.index, len(order)):
                    usable = True
                    drawn = replace(examples[order[index]], epoch=epoch)
                    yield Coming(drawn, replace(place, index=index), first)
                place = replace(place, index=0)
            fruitless = [] if usable else [*fruitless, read]
            if len(fruitless) == self.lanes:  # the lane has had every share
                raise UserError(f"{name}: {why_nothing_is_left([add_up(*fruitless)])}")

    def _blocks(self, lane: int, start: Place) -> Iterator[tuple[dict[str, Any] | None, list[Drawn], SourceStats]]:
        """Yield (state of the iterator before a block, its examples in order, statistics of its records)."""
        from datasets.distributed import split_dataset_by_node

        share = split_dataset_by_node(self._dataset, rank=(lane + start.epoch) % self.lanes, world_size=self.lanes)
        if start.dataset is not None:
            share.load_state_dict(start.dataset)
        # In a DataLoader's worker, `iter(share)` would yield only a part of the share; `share.iter` yields all of it.
        parts = math.ceil(self.block / TOKENISED_AT_ONCE)
        size = math.ceil(self.block / parts)
        batches, state = share.iter(size), start.dataset
        for block in count(start.block):
            stats, examples = SourceStats(self.source.name), list[Drawn]()
            for part, batch in enumerate(islice(batches, parts), start=block * parts):
                examples += self._examples(batch, stats, start=part * size)
            if not stats.read and not stats.broken:
                return
            yield state, examples, stats
            state = share.state_dict()

    @cached_property
    def _dataset(self) -> "datasets.IterableDataset":
        """The records of all shards, in an order of their own: at any time, the lanes read in different places.

        Of the last shards, which may be parts of a file that is over, each lane has one.
        """
        from datasets import IterableDataset

        rng, first = np.random.default_rng([self.seed, self.number]), len(self.shards) - self.lanes
        order = np.concatenate([rng.permutation(first), first + rng.permutation(self.lanes)])
        shards = [self.shards[index] for index in rng.permutation(order.reshape(-1, self.lanes)).ravel()]
        return IterableDataset.from_generator(_read, gen_kwargs={"shards": shards, "source": self.source})

    @cached_property
    def _root(self) -> ImageRoot:
        return ImageRoot(self.source)

    def _examples(self, batch: Mapping[str, Sequence[Any]], stats: SourceStats, *, start: int) -> list[Drawn]:
        """Return the examples of records {"record_id": [...], "record": [...]}, and count the records in `stats`."""
        dialogues: list[tuple[str, list[Dialogue]]] = []
        records = zip(batch["record_id"], batch["record"], strict=True)
        for record_id, record in count_records(records, self.source, stats):
            dialogue = try_dialogue(record_id, record, self._root, self.seed)
            if opened := open_and_count(record_id, dialogue, None, stats):
                dialogues.append((record_id, opened.dialogues))
        stats.dialogues += len(dialogues)
        return [
            Drawn(
                example,
                piece.dialogue.images,
                self.number,
                0,
                origin.record_id,
                origin.examples,
                piece.dialogue if piece.dialogue.is_document else None,
            )
            for piece, example, origin in fit_records(dialogues, self.splitter, stats, start=start)
        ]


def _read(shards: Sequence[Shard], source: Source) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for record_id, record in read_shard(source, shard):
            yield {"record_id": record_id, "record": record}


@dataclass(frozen=True)
class PreparedReader:
    """Reads a prepared source that is mixed into streams: every lane takes every L-th example of an epoch's order."""

    found: PreparedSet
    number: int
    seed: int
    lanes: int

    def read(self, lane: int, start: Place) -> Iterator[Coming]:
        found = self.found
        if not len(found):
            raise UserError(f"{found.stats.source}: {why_nothing_is_left([found.stats])}")
        stats = found.stats if lane == 0 else SourceStats(found.stats.source)
        for epoch in count(start.epoch):
            order = np.random.default_rng([self.seed, epoch, self.number]).permutation(len(found))
            share = order[(lane + epoch) % self.lanes :: self.lanes].tolist()
            begun = start.index if epoch == start.epoch else 0
            for index, example in enumerate(islice(share, begun, None), start=begun):
                record_id = found.examples.text("record_id", example)
                drawn = Drawn(found.example(example), found.dialogue(example).images, self.number, epoch, record_id)
                yield Coming(drawn, Place(epoch, index=index), stats)
