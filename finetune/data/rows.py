"""Examples -> the rows of a run: in order for evaluation, sampled and shuffled for training, or streamed."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.chunking import Limits, splitter
from finetune.data.collate import Features, Origin, RowCollator, Rows
from finetune.data.dataset import Dataset
from finetune.data.images import Preprocessing
from finetune.data.packing import pack_in_order
from finetune.data.prepared import Prepared
from finetune.data.sampling import Row, build_schedule
from finetune.data.shards import shards_of
from finetune.data.stream_sources import PreparedReader, StreamReader
from finetune.data.streaming import StreamedRows, downloaders
from finetune.data.tokenize import Encoder
from finetune.recipe.schema import Data, Source, Training

LANES = 16
"""Least number of lanes of a stream (see streaming.py), if that is a multiple of the rows of a step."""

LEAST_BLOCK = 32
"""Least number of records that a lane reads and shuffles at once."""


def eval_rows(
    prepared: Prepared,
    training: Training,
    *,
    preprocessing: Preprocessing,
    tokenizer: Any,
    features: Features | None = None,
) -> RowCollator:
    """Return the rows of every example, once and in order. Without `features`, images are opened as rows are made."""
    packs = pack_in_order(
        prepared.lengths.tolist(),
        prepared.image_ids,
        row_tokens=training.row_tokens,
        row_images=training.row_images,
    )
    rows = [Row(0, tuple(pack)) for pack in packs]
    return _collator(prepared, rows, preprocessing=preprocessing, tokenizer=tokenizer, features=features)


def train_rows(
    dataset: Dataset,
    sources: Sequence[Source],
    data: Data,
    training: Training,
    *,
    preprocessing: Preprocessing,
    tokenizer: Any,
    features: Features | None = None,
    blank_image: bool = False,
    skipped: Collection[Origin] = frozenset(),
) -> Rows:
    """Return all rows of a run, a multiple of the rows of a step: a function of data and seed alone.

    sources: the training sources, their formats resolved. blank_image: a row without images gets a blank one, for
    trained image towers. skipped: (source, record id) of records that are left out.
    """
    varied: dict[str, Any] = {
        "augment": data.augment,
        "seed": training.seed,
        "blank_image": blank_image,
        "skipped": skipped,
    }
    if data.streams:
        return _streamed_rows(dataset, sources, data, training, preprocessing, tokenizer, **varied)
    rows = build_schedule(
        dataset.mix,
        dataset.train.image_counts,
        row_tokens=training.row_tokens,
        row_images=training.row_images,
        rows_per_step=training.rows_per_step,
        seed=training.seed,
        epochs=training.epochs,
        steps=training.steps,
    )
    collator = _collator(dataset.train, rows, preprocessing=preprocessing, tokenizer=tokenizer, features=features)
    return replace(collator, **varied)


def _streamed_rows(
    dataset: Dataset,
    sources: Sequence[Source],
    data: Data,
    training: Training,
    preprocessing: Preprocessing,
    tokenizer: Any,
    **varied: Any,
) -> StreamedRows:
    assert training.steps
    lanes = training.rows_per_step * max(1, LANES // training.rows_per_step)
    limits = Limits(data.max_length, training.row_images)
    encoder, prepared_sets = Encoder(tokenizer), iter(dataset.train.sets)
    return StreamedRows(
        readers=[
            StreamReader(
                source,
                shards_of(source, multiple_of=lanes),
                splitter(source, encoder, limits, seed=training.seed),
                number,
                training.seed,
                lanes,
                max(LEAST_BLOCK, math.ceil(data.shuffle_buffer / lanes)),
            )
            if source.stream
            else PreparedReader(next(prepared_sets), number, training.seed, lanes)
            for number, source in enumerate(sources)
        ],
        names=[source.name for source in sources],
        weights=[source.weight for source in data.sources],
        unit=data.weigh,
        limits=[source.limit if source.stream else None for source in sources],
        rows=training.steps * training.rows_per_step,
        lanes=lanes,
        row_tokens=training.row_tokens,
        row_images=training.row_images,
        preprocessing=preprocessing,
        filler=tokenizer.bos_token_id,
        encoder=encoder,
        downloaders=downloaders(Path(data.prepared) / "downloads", sources),
        **varied,
    )


def _collator(
    prepared: Prepared,
    rows: Sequence[Row],
    *,
    preprocessing: Preprocessing,
    tokenizer: Any,
    features: Features | None,
) -> RowCollator:
    return RowCollator(
        rows=rows,
        examples=prepared.examples,
        image_ids=prepared.image_ids,
        images=prepared.images,
        origins=prepared.origins,
        preprocessing=preprocessing,
        filler=tokenizer.bos_token_id,
        features=features,
    )
