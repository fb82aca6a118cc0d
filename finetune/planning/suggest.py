"""Recipe -> the least changes that make it fit: candidates are tried, in the order of what they cost the result."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from finetune.recipe.schema import Recipe
from modeling.towers import LORA_TOWERS, TOWERS

CHECKPOINTING = "training.checkpointing"
PARALLEL = "training.parallel"
SMALLEST_RANK = 4
SMALLEST_ROW = 128
"""Tokens."""


@dataclass(frozen=True)
class Change:
    """Keys of a recipe and their new values."""

    price: float
    """Below 2 it costs time, or rounding; from 2 on, what is trained, or on what."""
    values: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """As they stand behind `finetune run RECIPE`."""
        return [f"{key}={str(value).lower()}" for key, value in self.values.items()]


def cheapest_changes(
    recipe: Recipe, fits: Callable[[Recipe], bool], *, layers: int, number: int = 1, divisible: bool = False
) -> list[Change]:
    """At most `number` changes, or pairs of changes, with which the recipe is valid and `fits`, the cheapest first.

    None has all the keys of a cheaper one. Checkpointing is asked of as few of the decoder's `layers` as will do.
    `divisible`: there are several processes, which the model may be divided over.
    """
    singles = single_changes(recipe, divisible=divisible)
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
    if CHECKPOINTING not in change.values:
        return change

    def of(number: int) -> Change:
        return Change(change.price, {**change.values, CHECKPOINTING: number})

    def enough(number: int) -> bool:
        changed = apply_change(recipe, of(number))
        return changed is not None and fits(changed)

    fewest = bisect_left(range(1, layers), True, key=enough) + 1
    return of(fewest) if fewest < layers else change


def apply_change(recipe: Recipe, change: Change) -> Recipe | None:
    """The changed recipe; None where it would contradict itself."""
    document = recipe.model_dump()
    for key, value in change.values.items():
        section, name = key.split(".")
        document[section][name] = value
    try:
        return Recipe.model_validate(document)
    except ValidationError:
        return None


def single_changes(recipe: Recipe, *, divisible: bool = False) -> list[Change]:
    """Every change that is tried, alone and in pairs."""
    return list(_changes(recipe, divisible))


def _changes(recipe: Recipe, divisible: bool) -> Iterator[Change]:
    training, model = recipe.training, recipe.model
    if training.checkpointing is not True:
        yield Change(1, {CHECKPOINTING: True})
    if divisible and training.parallel == "ddp" and model.quantize is None:
        whole_moments = {} if training.optimizer == "adamw" else {"training.optimizer": "adamw"}
        yield Change(1.25, {PARALLEL: "fsdp2", **whole_moments})
    if training.optimizer == "adamw":
        yield Change(1.5, {"training.optimizer": "adamw_8bit"})
    if model.dtype == "fp32":
        yield Change(1.5, {"model.dtype": "bf16"})
    if model.quantize is None:
        yield Change(2, {"model.quantize": "nf4"})
    yield from _smaller_rows(recipe)
    for halvings, rank in _halved(recipe.adapter.rank, SMALLEST_RANK):
        if "lora" in model.modes.values():
            yield Change(2 + halvings, {"adapter.rank": rank})
    yield from _trained_less(model.modes)


def _smaller_rows(recipe: Recipe) -> Iterator[Change]:
    """Shorter rows of the same examples cost nothing but speed; shorter examples, or fewer images, cost examples."""
    training, longest = recipe.training, recipe.data.max_length
    for halvings, tokens in _halved(training.row_tokens, SMALLEST_ROW):
        if tokens >= longest:
            yield Change(0.5 * halvings, {"training.row_tokens": tokens})
        else:
            yield Change(2 + halvings, {"training.row_tokens": tokens, "data.max_length": tokens})
    for halvings, images in _halved(training.row_images, 1):
        yield Change(1.5 + halvings, {"training.row_images": images})


def _trained_less(modes: Mapping[str, str]) -> Iterator[Change]:
    full = [tower for tower in TOWERS if modes[tower] == "full" and tower not in ("gates", "added_tokens")]
    lighter = {f"model.{tower}": "lora" if tower in LORA_TOWERS else "frozen" for tower in full}
    if len(full) > 1:
        yield Change(5, lighter)
    for tower in full:
        key = f"model.{tower}"
        yield Change(4, {key: lighter[key]})
    for tower in LORA_TOWERS:
        if modes[tower] != "frozen":
            yield Change(6, {f"model.{tower}": "frozen"})


def _halved(number: int, least: int) -> Iterator[tuple[int, int]]:
    """(1, half), (2, a quarter), ... down to `least`."""
    halvings = 1
    while number >> halvings >= least:
        yield halvings, number >> halvings
        halvings += 1
