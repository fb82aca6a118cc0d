"""Prepared data -> the rows a run will have: how many, and the largest. Opens what is there, prepares nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.dataset import Dataset, make_dataset
from finetune.data.fit import Limits, fitter
from finetune.data.formats import hold_dialogues
from finetune.data.prepare import find_set, place
from finetune.data.prepared import ACCOUNT, Prepared
from finetune.data.sampling import build_schedule
from finetune.data.source import Source
from finetune.data.tokenize import Encoder
from finetune.planning.setup import RowSize
from finetune.recipe.schema import Recipe
from finetune.recipe.sources import to_source
from modeling.errors import UserError
from modeling.files import read_json


@dataclass(frozen=True)
class Lengths:
    """Of a run."""

    steps: int
    largest: RowSize
    """No row of the first epoch has more of anything."""
    images: int
    """Distinct ones that training and held-out data show."""


def prepared_lengths(recipe: Recipe) -> Lengths | None:
    """None where the data is not prepared, or its tokenizer is not here to tell: a fresh one is learnt in the run.

    Takes the seconds that loading a tokenizer takes, where sets of the recipe's sources are there at all.
    """
    model, data = recipe.model, recipe.data
    if model.init or data.streams or not _has_tokenizer(str(model.base), model.revision):
        return None
    try:
        seed = recipe.training.seed
        sources, held = ([to_source(one, seed=seed) for one in group] for group in (data.sources, data.eval_sources))
        prepared = {_source_of(account) for account in Path(data.prepared).glob(f"*/{ACCOUNT}")}
        if not {source.name for source in (*sources, *held)} <= prepared:
            return None
        tokenizer = _tokenizer(recipe, sources)
        if not all(_is_prepared(source, Encoder(tokenizer), recipe) for source in (*sources, *held)):
            return None
    except UserError:
        return None
    return _lengths(recipe, make_dataset(recipe, sources, tokenizer))


def _source_of(account: Path) -> str | None:
    """None where that cannot be read: preparing makes such a set anew."""
    try:
        return (read_json(account) or {}).get("source")
    except UserError:
        return None


def _has_tokenizer(base: str, revision: str | None) -> bool:
    """Whether it is on this machine: a plan downloads nothing."""
    from huggingface_hub import try_to_load_from_cache

    return Path(base).is_dir() or isinstance(try_to_load_from_cache(base, "config.json", revision=revision), str)


def _tokenizer(recipe: Recipe, sources: Sequence[Source]) -> Any:
    from modeling.loading import load_processor

    instruct = hold_dialogues(sources)
    return load_processor(str(recipe.model.base), revision=recipe.model.revision, instruct=instruct).tokenizer


def _is_prepared(source: Source, encoder: Encoder, recipe: Recipe) -> bool:
    folder = Path(recipe.data.prepared)
    limits = Limits(recipe.data.max_length, recipe.training.row_images)
    how = fitter(source, encoder, limits, seed=recipe.training.seed)
    return find_set(place(source, how, folder)).set is not None


def _lengths(recipe: Recipe, dataset: Dataset) -> Lengths:
    training, settings = dataset.training, recipe.training
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
    shown = np.concatenate([prepared.shown_images()[1] for prepared in (training, dataset.held)])
    return Lengths(settings.steps or steps, RowSize(*largest), len(np.unique(shown)))


def supervised_tokens(prepared: Prepared) -> np.ndarray:
    """int64 [examples]: how many tokens of each are trained on."""
    counts = [np.zeros(0, np.int64)]
    for one in prepared.sets:
        ends = np.cumsum(one.examples.lengths("supervised"))
        before = np.concatenate([[0], np.cumsum(one.examples.values("supervised"))])
        counts.append(np.diff(before[np.concatenate([[0], ends])]))
    return np.concatenate(counts)[prepared.chosen]
