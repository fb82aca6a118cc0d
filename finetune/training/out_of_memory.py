"""Memory ran out -> a message: what was planned, what there was, and the least changes that need less."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from finetune.console import show_size
from finetune.distributed import collectives
from finetune.distributed.device import device
from finetune.planning.estimate import Memory, Planner
from finetune.planning.suggest import Change
from finetune.recipe.schema import MAY_CHANGE, Recipe
from finetune.training.checkpoints import is_trained
from modeling.errors import UserError

CHANGES = 2
"""How many are proposed."""

LESS = 0.9
"""Of what the plan says, where it said too little: how much a proposal may need by the same plan."""


@dataclass(frozen=True)
class Held:
    """Bytes, at the moment when there was no more."""

    on_gpu: bool
    highest: int
    """What this process held at most: on a GPU in tensors, without one as resident memory."""
    kept: int
    """The same, with what the GPU's allocator keeps for later."""
    free: int
    total: int
    room: int
    """What this process could have had: all but what others hold."""


@contextmanager
def explain_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """What allocators raise inside becomes a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(explain(recipe, _first_line(error), held())) from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error has a class of its own for GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].split(". GPU ")[0] or type(error).__name__


def held() -> Held:
    if torch.cuda.is_available():
        gpu = device()
        free, total = torch.cuda.mem_get_info(gpu)
        highest, kept = torch.cuda.max_memory_allocated(gpu), torch.cuda.max_memory_reserved(gpu)
        return Held(True, highest, kept, free, total, free + torch.cuda.memory_reserved(gpu))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    main = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss
    return Held(False, highest, highest, main.available, main.total, main.available + resident)


def explain(recipe: Recipe, what: str, held: Held) -> str:
    """The whole message. Changes are proposed by the plan; where it was wrong, by what it says in proportion."""
    planner = Planner(recipe, on_gpu=held.on_gpu, processes=collectives.world_size())
    needed, place = planner.needed(recipe), "GPU" if held.on_gpu else "machine"
    who = f"process {collectives.rank() + 1} of {collectives.world_size()}: " if collectives.world_size() > 1 else ""
    lines = [f"{who}out of memory while training: {what}", f"  planned: {_planned(planner.estimate(recipe), needed)}"]
    if held.on_gpu:
        lines.append(f"  held at most: {show_size(held.highest)} in tensors, {show_size(held.kept)} by the allocator")
    else:
        lines.append(f"  held at most: {show_size(held.highest)} of resident memory, the libraries included")
    lines.append(f"  of the {place}: {show_size(held.total)} in all, {show_size(held.free)} free")
    wrong = needed <= held.room
    if wrong:
        budget = int(LESS * needed)
        lines.append(
            f"by the plan it should have fitted into the {show_size(held.room)} that this process could have; the plan "
            f"is wrong here, and what follows needs at most {LESS:.0%} of what it says of this recipe"
        )
    else:
        budget = held.room
        lines.append(f"by the plan it does not fit into the {show_size(held.room)} that this process could have")
    changes = planner.changes(budget, number=CHANGES)
    if not changes:
        return "\n".join([*lines, "and no change or pair of changes of the recipe makes it fit; a larger GPU does"])
    lines.append("what would fit by the plan, the cheapest first; behind the same command:")
    return "\n".join([*lines, *(f"  {_pasted(recipe, change)}" for change in changes)])


def _planned(memory: Memory, needed: int) -> str:
    """Fixed parts by name, and all that a row makes as activations."""
    parts = dict(memory.parts)
    gathered = parts.pop("gathered")
    named = {part: parts.pop(part) for part in ("weights", "adapters", "optimizer", "gradients")}
    named |= {"gathered": gathered} if gathered else {}
    named["activations"] = sum(parts.values())
    return f"{', '.join(f'{part} {show_size(size)}' for part, size in named.items())}; {show_size(needed)} needed"


def _pasted(recipe: Recipe, change: Change) -> str:
    """As overrides; the run goes on in its folder where it stays the same run, else it needs another."""
    same = change.values.keys() <= set(MAY_CHANGE) or not is_trained(Path(recipe.output))
    return " ".join([*change.overrides, *[f"output={recipe.output}-2"] * (not same)])
