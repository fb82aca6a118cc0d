"""Prepared data -> the rows of a run: how many there are, and the largest. Opens what is there, prepares nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.chunking import Limits, splitter
from finetune.data.dataset import Dataset, make_dataset
from finetune.data.prepare import find_set, set_folder
from finetune.data.prepared import STATS, Prepared
from finetune.data.read_dialogues import resolve_source
from finetune.data.sampling import build_schedule
from finetune.data.tokenize import Encoder
from finetune.planning.static_memory import RowSize
from finetune.recipe.schema import Recipe, need_end_of_utterance
from modeling.atomic_files import read_json
from modeling.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """What the prepared data says of a run."""

    steps: int
    largest: RowSize
    """The most tokens, supervised tokens and images that a row of the first epoch has."""
    images: int
    """Distinct images of training and eval data."""


def prepared_lengths(recipe: Recipe) -> Lengths | None:
    """Return the lengths of a recipe's rows; None where its data is not prepared, or its tokenizer is not here yet.

    A fresh base learns its tokenizer in the run. Loading a tokenizer takes seconds, and is done only where sets of the
    recipe's sources exist.
    """
    model, data, training = recipe.model, recipe.data, recipe.training
    prepared = {_source_name(stats) for stats in Path(data.prepared).glob(f"*/{STATS}")}
    if not prepared or model.init or data.streams or not _is_on_this_machine(str(model.base), model.revision):
        return None
    try:
        sources = [resolve_source(one) for one in data.sources]
        every = [*sources, *(resolve_source(one) for one in data.eval_sources)]
        if not {source.name for source in every} <= prepared:
            return None
        from modeling.loading import load_processor

        instruct = need_end_of_utterance(sources)
        tokenizer = load_processor(str(model.base), revision=model.revision, instruct=instruct).tokenizer
        for source in every:
            limits = Limits(data.max_length, training.row_images)
            how = splitter(source, Encoder(tokenizer), limits, seed=training.seed)
            if find_set(set_folder(source, how, Path(data.prepared))).set is None:
                return None
    except UserError:
        return None
    return _lengths(recipe, make_dataset(data, sources, tokenizer, row_images=training.row_images, seed=training.seed))


def _is_on_this_machine(base: str, revision: str | None) -> bool:
    """Whether a base is a folder or in the hub's cache: a plan downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    return Path(base).is_dir() or isinstance(try_to_load_from_cache(base, "config.json", revision=revision), str)


def _source_name(stats: Path) -> str | None:
    """Return the source of a prepared set; None where the file cannot be read: preparing makes such a set anew."""
    try:
        return (read_json(stats) or {}).get("source")
    except UserError:
        return None


def _lengths(recipe: Recipe, dataset: Dataset) -> Lengths:
    training, settings = dataset.train, recipe.training
    rows = build_schedule(
        dataset.mix,
        training.image_counts,
        row_tokens=settings.row_tokens,
        row_images=settings.row_images,
        rows_per_step=settings.rows_per_step,
        seed=settings.seed,
        epochs=1,
    )
    sizes = np.stack([training.lengths, supervised_tokens(training), training.image_counts])
    largest = np.max([sizes[:, list(row.examples)].sum(axis=1) for row in rows], axis=0).tolist()
    steps = len(rows) // settings.rows_per_step * (settings.epochs or 1)
    shown = np.concatenate([prepared.shown_images()[1] for prepared in (training, dataset.eval)])
    return Lengths(settings.steps or steps, RowSize(*largest), len(np.unique(shown)))


def supervised_tokens(prepared: Prepared) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the number of supervised tokens of each example, int64 [examples]."""
    counts = [np.zeros(0, np.int64)]
    for one in prepared.sets:
        ends = np.cumsum(one.examples.lengths("supervised"))
        before = np.concatenate([[0], np.cumsum(one.examples.values("supervised"))])
        counts.append(np.diff(before[np.concatenate([[0], ends])]))
    return np.concatenate(counts)[prepared.chosen]
