"""Rows of streams: of examples that are numbers, and of records in a file."""

import json
from itertools import count, pairwise

import numpy as np
import torch
from sources import make_source

from finetune.data.images import Preprocessing
from finetune.data.shards import shards_of
from finetune.data.stats import SourceStats
from finetune.data.stream_sources import Coming, Drawn, Place, StreamReader
from finetune.data.streaming import StreamedRows
from finetune.data.tokenize import Example

LANES, ASKED = 4, 40

PIXELS = Preprocessing((4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FILLER = 1


def drawn(number, length=1, *, epoch=0, source=0):
    """An example whose every token is `number`."""
    ids = np.full(length, number, np.int64)
    return Drawn(Example(ids, ids, np.full(length, -1)), (), source, epoch, "a record", 1)


class Counting:
    """A reader of `size` examples, in order: each is 1000 x its epoch + its number from `first` on."""

    def __init__(self, size, *, source=0, first=0, lanes=1, length=lambda number: 1):
        self.size, self.source, self.first, self.lanes, self.length = size, source, first, lanes, length

    def read(self, lane, start):
        stats = SourceStats("counting", read=self.size, kept=self.size)
        for epoch in count(start.epoch):
            share = range(self.first, self.first + self.size)[(lane + epoch) % self.lanes :: self.lanes]
            begun = start.index if epoch == start.epoch else 0
            for index, number in enumerate(share[begun:], start=begun):
                one = drawn(1000 * epoch + number, self.length(number), epoch=epoch, source=self.source)
                yield Coming(one, Place(epoch, index=index), stats)


def rows_of(*readers, **changes):
    names = [f"source {number}" for number in range(len(readers))]
    settings = {"rows": 10_000, "lanes": 1, "row_tokens": 8, "row_images": 2, "seed": 0, "encoder": None}
    settings |= {"weights": [None] * len(readers)}
    return StreamedRows(readers=readers, names=names, preprocessing=PIXELS, filler=FILLER, **{**settings, **changes})


def sequences(batch):
    """The token ids of each example of a row."""
    starts = batch["layout"].sequence_starts
    return [batch["input_ids"][0, start:stop].tolist() for start, stop in pairwise(starts)]


def reader_of(source, how, number=0, *, lanes=1, block=5, seed=0):
    return StreamReader(source, shards_of(source, multiple_of=lanes), how, number, seed, lanes, block)


def messages(*images, question="what color is it?", answer="red"):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def written(folder, *records, name="data.jsonl"):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return make_source("messages", (folder / name,), stream=True)


def equal(one, other):
    tensors = [key for key in one if key != "layout"]
    assert one.keys() == other.keys()
    return one["layout"] == other["layout"] and all(torch.equal(one[key], other[key]) for key in tensors)
