"""Recipe with training.auto_fit -> the recipe that is run: on a GPU too small for it, with the cheapest change.

Decided once, when the run folder is new, and written there: recipe.yaml says what is run, auto_fit.json what of it was
not asked for. Later the same command finds it there.
"""

from pathlib import Path
from typing import Any

from finetune.console import log, show_size
from finetune.distributed import collectives
from finetune.planning.estimate import Planner, gpu_memory
from finetune.planning.suggest import Change, apply_change, single_changes
from finetune.recipe.schema import Recipe
from modeling.errors import UserError
from modeling.files import read_json, write_json

FILE = "auto_fit.json"
REPAIR = "delete it; where the run differs from the recipe then, the message names the keys to give"


def apply_auto_fit(recipe: Recipe) -> Recipe:
    """The recipe itself where nothing is asked or needed. Every process of a group calls this, and gets the same.

    Raises UserError, in every process, where nothing makes it fit.
    """
    if not recipe.training.auto_fit:
        return recipe
    gpu = _smallest_gpu()
    values, problem = collectives.broadcast(_decided(recipe, gpu) if collectives.is_main() else ({}, ""))
    if problem:
        raise UserError(problem)
    changed = apply_change(recipe, Change(0, values))
    if changed is None:
        raise UserError(f"{Path(recipe.output) / FILE}: {values} does not fit this recipe; {REPAIR}")
    return changed


def _smallest_gpu() -> int | None:
    """Bytes, over the machines of all processes; None where none has one."""
    return min((size for size in collectives.gather([gpu_memory()]) if size is not None), default=None)


def _decided(recipe: Recipe, gpu: int | None) -> tuple[dict[str, Any], str]:
    """(keys and their new values, what is wrong if nothing makes it fit)."""
    folder = Path(recipe.output)
    if (folder / "recipe.yaml").is_file():
        return _as_before(recipe, folder), ""
    (folder / FILE).unlink(missing_ok=True)  # of one that did not get as far as to begin
    if gpu is None:
        log("training.auto_fit: there is no GPU here, and nothing is done")
        return {}, ""
    planner = Planner(recipe, on_gpu=True, processes=collectives.world_size())
    if planner.fits(recipe, gpu):
        return {}, ""
    needed = f"{show_size(planner.needed(recipe))} needed, {show_size(gpu)} there"
    changes = planner.changes(gpu, may_shard=False)
    if not changes:
        tried = ", ".join(" ".join(change.overrides) for change in single_changes(recipe))
        return {}, f"training.auto_fit: {needed}, and nothing makes it fit; tried, alone and in pairs: {tried}"
    (change,) = changes
    changed = apply_change(recipe, change)
    assert changed is not None
    log(f"training.auto_fit: {needed}; runs with {' '.join(change.overrides)}")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "gpu": gpu,
        "needed": planner.needed(recipe),
        "needed_changed": planner.needed(changed),
        "changed": {key: {"asked": _value(recipe, key), "run": value} for key, value in change.values.items()},
    }
    write_json(folder / FILE, record)
    return dict(change.values), ""


def _as_before(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the folder's run began with, but for keys of which the recipe now says something else than it did."""
    record = read_json(folder / FILE, repair=REPAIR) or {"changed": {}}
    try:
        values = {key: one["run"] for key, one in record["changed"].items() if _value(recipe, key) == one["asked"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / FILE}: not as this toolkit writes it ({error!r:.200}); {REPAIR}") from error
    if values:
        log(f"training.auto_fit: as this run began, with {' '.join(Change(0, values).overrides)}")
    return values


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
