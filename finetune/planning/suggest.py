"""Recipe -> the smallest changes that make it fit: candidates are tried in the order of what they cost the result."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from finetune.recipe.schema import Recipe
from modeling.towers import LORA_TOWERS, matrices_trained_in_full

CHECKPOINTING = "training.checkpointing"
SMALLEST_RANK = 4
SMALLEST_ROW = 128
"""Tokens."""


@dataclass(frozen=True)
class Change:
    """Keys of a recipe and their new values."""

    price: float
    """Below 2 a change costs time, or rounding; from 2 on it changes what is trained, or on which data."""
    values: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The arguments to add to `finetune run RECIPE`."""
        return [f"{key}={str(value).lower()}" for key, value in self.values.items()]


def cheapest_changes(
    recipe: Recipe, fits: Callable[[Recipe], bool], *, layers: int, number: int = 1, may_shard: bool = False
) -> list[Change]:
    """Return the cheapest changes, or pairs of changes, with which the recipe is valid and `fits`; at most `number`.

    No change contains a cheaper one. Checkpointing is set for as few of the decoder's `layers` as are enough.
    `may_shard`: there are several processes, over which the model may be sharded.
    """
    singles = single_changes(recipe, may_shard=may_shard)
    pairs = [
        Change(one.price + other.price, {**one.values, **other.values})
        for one, other in combinations(singles, 2)
        if one.values.keys().isdisjoint(other.values)
    ]
    found: list[Change] = []
    for change in sorted([*singles, *pairs], key=lambda change: (change.price, len(change.values))):
        if len(found) == number:
            break
        if any(cheaper.values.keys() <= change.values.keys() for cheaper in found):
            continue
        changed = apply_change(recipe, change)
        if changed is not None and fits(changed):
            found.append(_with_fewest_layers(recipe, change, fits, layers))
    return found


def _with_fewest_layers(recipe: Recipe, change: Change, fits: Callable[[Recipe], bool], layers: int) -> Change:
    """Return the change with checkpointing in as few layers as are enough, where it has checkpointing."""
    if CHECKPOINTING not in change.values:
        return change

    def with_layers(number: int) -> Change:
        return Change(change.price, {**change.values, CHECKPOINTING: number})

    def is_enough(number: int) -> bool:
        changed = apply_change(recipe, with_layers(number))
        return changed is not None and fits(changed)

    fewest = bisect_left(range(1, layers), True, key=is_enough) + 1
    return with_layers(fewest) if fewest < layers else change


def apply_change(recipe: Recipe, change: Change) -> Recipe | None:
    """Return the changed recipe; None where its keys would contradict each other."""
    document = recipe.model_dump()
    for key, value in change.values.items():
        section, name = key.split(".")
        document[section][name] = value
    try:
        return Recipe.model_validate(document)
    except ValidationError:
        return None


def single_changes(recipe: Recipe, *, may_shard: bool = False) -> list[Change]:
    """Return every change that is tried, alone and in pairs."""
    training, model = recipe.training, recipe.model
    changes = [] if training.checkpointing is True else [Change(1, {CHECKPOINTING: True})]
    if may_shard and training.parallel == "ddp" and model.quantize is None:
        optimizer = {} if training.optimizer == "adamw" else {"training.optimizer": "adamw"}
        changes.append(Change(1.25, {"training.parallel": "fsdp2", **optimizer}))
    if training.optimizer == "adamw":
        changes.append(Change(1.5, {"training.optimizer": "adamw_8bit"}))
    if model.dtype == "fp32":
        changes.append(Change(1.5, {"model.dtype": "bf16"}))
    if model.quantize is None:
        changes.append(Change(2, {"model.quantize": "nf4"}))
    changes += _smaller_rows(recipe)
    if "lora" in model.modes.values():
        halves = _halves(recipe.adapter.rank, SMALLEST_RANK)
        changes += [Change(2 + halvings, {"adapter.rank": rank}) for halvings, rank in halves]
    return [*changes, *_trained_less(model.modes)]


def _smaller_rows(recipe: Recipe) -> Iterator[Change]:
    """Shorter rows of the same examples cost only speed; shorter examples, or fewer images, cost examples."""
    training, longest = recipe.training, recipe.data.max_length
    for halvings, tokens in _halves(training.row_tokens, SMALLEST_ROW):
        if tokens >= longest:
            yield Change(0.5 * halvings, {"training.row_tokens": tokens})
        else:
            yield Change(2 + halvings, {"training.row_tokens": tokens, "data.max_length": tokens})
    for halvings, images in _halves(training.row_images, 1):
        yield Change(1.5 + halvings, {"training.row_images": images})


def _trained_less(modes: Mapping[str, str]) -> Iterator[Change]:
    """LoRA, or nothing, in place of a tower trained in full; and LoRA towers frozen."""
    full = matrices_trained_in_full(modes)
    lighter = {f"model.{tower}": "lora" if tower in LORA_TOWERS else "frozen" for tower in full}
    if len(full) > 1:
        yield Change(5, lighter)
    for key, mode in lighter.items():
        yield Change(4, {key: mode})
    for tower in LORA_TOWERS:
        if modes[tower] != "frozen":
            yield Change(6, {f"model.{tower}": "frozen"})


def _halves(number: int, least: int) -> Iterator[tuple[int, int]]:
    """Yield (1, half), (2, a quarter), ... down to `least`."""
    halvings = 1
    while number >> halvings >= least:
        yield halvings, number >> halvings
        halvings += 1
