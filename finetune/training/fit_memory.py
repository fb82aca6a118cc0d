"""A recipe that does not fit: changed before the run begins (training.auto_fit), or explained when memory ran out.

`apply_auto_fit` decides once, when the run folder is new: recipe.yaml there says what is run, auto_fit.json which keys
are not as asked. Later the same command finds them there. `explain_out_of_memory` turns an allocator's error into a
message with the plan, what was used, and the least changes that need less.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from finetune.console import log, show_size
from finetune.distributed import collectives
from finetune.distributed.environment import device
from finetune.planning.estimate import Memory, Planner, gpu_memory
from finetune.planning.suggest import Change, apply_change, single_changes
from finetune.recipe.schema import MAY_CHANGE, Recipe
from finetune.training.checkpoints import is_trained
from modeling.atomic_files import read_json, write_json
from modeling.errors import UserError

AUTO_FIT = "auto_fit.json"
REPAIR = "delete it; where the run differs from the recipe then, the message names the keys to give"

CHANGES = 2
"""Number of changes that are proposed when memory ran out."""

LESS = 0.9
"""Where the plan was too low: the share of its figure that a proposal may need by the same plan."""


def apply_auto_fit(recipe: Recipe) -> Recipe:
    """Return the recipe with the cheapest change that makes it fit; itself where that is not asked or not needed.

    Every process calls this, and gets the same. Raises UserError, on every process, where nothing makes it fit.
    """
    if not recipe.training.auto_fit:
        return recipe
    gpu = min((size for size in collectives.gather([gpu_memory()]) if size is not None), default=None)
    processes, folder = collectives.world_size(), Path(recipe.output)

    def decide() -> dict[str, Any]:
        if (folder / "recipe.yaml").is_file():
            return _changes_of_run(recipe, folder)
        (folder / AUTO_FIT).unlink(missing_ok=True)  # of a run that ended before it began
        return _changes_that_fit(recipe, folder, gpu, processes)

    values = collectives.on_main("fit the recipe to the GPU", decide)
    changed = apply_change(recipe, Change(0, values))
    if changed is None:
        raise UserError(f"{folder / AUTO_FIT}: {values} does not fit this recipe; {REPAIR}")
    return changed


def _changes_that_fit(recipe: Recipe, folder: Path, gpu: int | None, processes: int) -> dict[str, Any]:
    """Return the keys to change and their values, after writing auto_fit.json. Raises UserError: nothing makes it fit.

    gpu: bytes of the smallest GPU of all processes; None without one.
    """
    if gpu is None:
        log("training.auto_fit: there is no GPU here, and nothing is done")
        return {}
    planner = Planner(recipe, on_gpu=True, processes=processes)
    if planner.fits(recipe, gpu):
        return {}
    needed = f"{show_size(planner.needed(recipe))} needed, {show_size(gpu)} there"
    changes = planner.changes(gpu, may_shard=False)
    if not changes:
        tried = ", ".join(" ".join(change.overrides) for change in single_changes(recipe))
        raise UserError(f"training.auto_fit: {needed}, and nothing makes it fit; tried, alone and in pairs: {tried}")
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
    write_json(folder / AUTO_FIT, record)
    return dict(change.values)


def _changes_of_run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the changes that the folder's run began with, without keys that the recipe has been given anew since."""
    record = read_json(folder / AUTO_FIT, repair=REPAIR) or {"changed": {}}
    try:
        values = {key: one["run"] for key, one in record["changed"].items() if _value(recipe, key) == one["asked"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / AUTO_FIT}: not as this toolkit writes it ({error!r:.200}); {REPAIR}") from error
    if values:
        log(f"training.auto_fit: as this run began, with {' '.join(Change(0, values).overrides)}")
    return values


def _value(recipe: Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


@contextmanager
def explain_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Raise what allocators raise inside as a UserError that explains it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch has a class of its own for GPUs alone.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).split("\n")[0].split(". GPU ")[0] or type(error).__name__
        raise UserError(explanation(recipe, reason, measure_usage())) from error


@dataclass(frozen=True)
class Usage:
    """Bytes of memory, at the moment when there was no more."""

    on_gpu: bool
    highest: int
    """The most that this process used: on a GPU in tensors, without one as resident memory."""
    allocated: int
    """The same, with what the GPU's allocator keeps for later."""
    free: int
    total: int
    room: int
    """What this process could have used: all but what other processes use."""


def measure_usage() -> Usage:
    if torch.cuda.is_available():
        gpu = device()
        free, total = torch.cuda.mem_get_info(gpu)
        highest, allocated = torch.cuda.max_memory_allocated(gpu), torch.cuda.max_memory_reserved(gpu)
        return Usage(True, highest, allocated, free, total, free + torch.cuda.memory_reserved(gpu))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    main = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    return Usage(False, highest, highest, main.available, main.total, main.available + resident)


def explanation(recipe: Recipe, reason: str, usage: Usage) -> str:
    """Return the message. Changes are proposed by the plan; where it was too low, by its figures in proportion."""
    processes = collectives.world_size()
    planner = Planner(recipe, on_gpu=usage.on_gpu, processes=processes)
    needed, room = planner.needed(recipe), show_size(usage.room)
    who = f"process {collectives.rank() + 1} of {processes}: " if processes > 1 else ""
    lines = [
        f"{who}out of memory while training: {reason}",
        f"  planned: {_planned_parts(planner.estimate(recipe))}; {show_size(needed)} needed",
    ]
    if usage.on_gpu:
        allocated = f"{show_size(usage.highest)} in tensors, {show_size(usage.allocated)} by the allocator"
        lines.append(f"  used at most: {allocated}")
    else:
        lines.append(f"  used at most: {show_size(usage.highest)} of resident memory, the libraries included")
    place = "GPU" if usage.on_gpu else "machine"
    lines.append(f"  of the {place}: {show_size(usage.total)} in all, {show_size(usage.free)} free")
    budget = usage.room
    if needed <= usage.room:
        budget = int(LESS * needed)
        lines.append(
            f"by the plan it should have fitted into the {room} that this process could have; the plan is wrong here, "
            f"and what follows needs at most {LESS:.0%} of what it says of this recipe"
        )
    else:
        lines.append(f"by the plan it does not fit into the {room} that this process could have")
    changes = planner.changes(budget, number=CHANGES)
    if not changes:
        return "\n".join([*lines, "and no change or pair of changes of the recipe makes it fit; a larger GPU does"])
    lines.append("what would fit by the plan, the cheapest first; behind the same command:")
    for change in changes:
        same_run = change.values.keys() <= set(MAY_CHANGE) or not is_trained(Path(recipe.output))
        overrides = change.overrides if same_run else [*change.overrides, f"output={recipe.output}-2"]
        lines.append(f"  {' '.join(overrides)}")
    return "\n".join(lines)


def _planned_parts(memory: Memory) -> str:
    """Return the fixed parts by name, and the sum of the others, which a row makes, as activations."""
    parts = dict(memory.parts)
    gathered = parts.pop("gathered")
    named = {part: parts.pop(part) for part in ("weights", "adapters", "optimizer", "gradients")}
    named |= {"gathered": gathered} if gathered else {}
    named["activations"] = sum(parts.values())
    return ", ".join(f"{part} {show_size(size)}" for part, size in named.items())
