"""Which of a run's processes this is, and what they do together. With one process, all of it does nothing.

Launchers (`accelerate launch`, torchrun, `finetune run --processes`) set RANK, WORLD_SIZE and LOCAL_RANK; accelerate
makes the process group of them: nccl on GPUs, gloo without.

A step that all processes come to has a name: one does `on_main` for all, one does `main_first` before the others, all
do `each`, `share_out` divides the work. A user's mistake (UserError) or a full disk (OSError) that one process meets is
raised on all, so that none waits for one that has given up. Inside a step a process is alone: rank 0 of 1, and it waits
for no other.
"""

import atexit
import platform
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from finetune.console import Track, silently
from finetune.distributed.node_group import NodeGroup
from modeling.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=2)
"""How long a process waits for the others, who may be preparing data. If one dies, the launcher ends them all."""


def state() -> PartialState:
    """Return accelerate's state, which is one for the process; the first call makes the process group."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@atexit.register
def leave_group() -> None:
    """Leave a gloo group: its threads, alive at exit, make some processes abort. nccl would wait for dead processes."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def rank() -> int:
    return 0 if _inside.get() else state().process_index


def world_size() -> int:
    """Return how many processes wait for each other: inside a step, one."""
    return 1 if _inside.get() else state().num_processes


def is_main() -> bool:
    """Return whether this is the process that writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        state().wait_for_everyone()


def gather(items: list[Item]) -> list[Item]:
    """Return the items of all processes in the order of ranks, on every process."""
    return gather_object(items) if world_size() > 1 else items


def broadcast(value: Item) -> Item:
    """Return the main process's value, on every process."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def gather_numbers(values: list[float]) -> list[list[float]]:
    """Return the numbers of all processes in the order of ranks; one small tensor, for every training step."""
    if world_size() == 1:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=state().device)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, mine)
    return torch.stack(gathered).tolist()


_inside: ContextVar[bool] = ContextVar("inside", default=False)
"""True while this process is inside a step."""


def on_main(step: str, work: Callable[[], Item]) -> Item:
    """Return what `work` returns in the main process, on every process."""
    if world_size() == 1:
        return work()
    outcome: tuple[Any, Exception | None] = _try(work) if is_main() else (None, None)
    named, *received = broadcast((step, outcome[0], _as_raised(outcome[1])))
    _require_same({named, step})
    value, error = outcome if is_main() else received
    if error:
        raise error
    return value


def main_first(step: str, work: Callable[[], Item]) -> Item:
    """Call `work` in every process, in the main one before the others, which find what it has made."""
    made: list[Item] = []
    on_main(step, lambda: made.append(work()))
    return made[0] if made else work()


def each(step: str, work: Callable[[], Item]) -> list[Item]:
    """Call `work` in every process at once; return what each returned in the order of ranks, on every process."""
    if world_size() == 1:
        return [work()]
    value, error = _try(work)
    gathered = gather([(step, value, _as_raised(error))])
    _require_same({named for named, _, _ in gathered})
    if error:
        raise error
    for _, _, other in gathered:
        if other:
            raise other
    return [made for _, made, _ in gathered]


def share_out(
    step: str, items: Sequence[Item], work: Callable[[Item], Result], *, track: Track = silently
) -> list[Result]:
    """Return work(item) of every item in order, on every process; each of n processes does every n-th item."""
    ranks, mine = world_size(), items[rank() :: world_size()]
    shares = each(step, lambda: [work(item) for item in track(mine, step)])
    return [shares[number % ranks][number // ranks] for number in range(len(items))]


def nodes() -> NodeGroup:
    """Return the group of the first process of each machine: the others would take the cores of its workers."""
    if world_size() == 1:
        return NodeGroup()
    first = each("find the nodes", lambda: state().local_process_index == 0)
    leaders = [number for number, leads in enumerate(first) if leads]
    return _Nodes(leaders, leaders.index(rank()) if rank() in leaders else None)


class _Nodes(NodeGroup):
    def __init__(self, leaders: list[int], which: int | None):
        super().__init__(which, len(leaders))
        self._leaders = leaders

    def on_main(self, step: str, work: Callable[[], Item]) -> Item:
        return on_main(step, work)

    def each(self, step: str, work: Callable[[], Item]) -> list[Item]:
        values: list[Any] = each(step, lambda: work() if self.which is not None else None)
        return [values[leader] for leader in self._leaders]


def require_shared(key: str, folder: Path) -> None:
    """Raise UserError where a process does not see the folder that the main one has."""
    number = rank()

    def look() -> None:
        if not folder.is_dir():
            raise UserError(
                f"{key}: {folder} is there for the main process, and not for process {number} on {platform.node()}; "
                f"name a folder that all nodes share"
            )

    each("look for a folder", look)


def _try(work: Callable[[], Item]) -> tuple[Any, Exception | None]:
    """Return (what `work` returned, None), or (None, the mistake it raised); meanwhile this process is alone."""
    token = _inside.set(True)
    try:
        return work(), None
    except (UserError, OSError) as error:
        return None, error
    finally:
        _inside.reset(token)


def _as_raised(error: Exception | None) -> Exception | None:
    """Return the error as the other processes raise it: a library's own class may not survive pickling."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return UserError(str(error)) if error else None


def _require_same(steps: set[str]) -> None:
    assert len(steps) == 1, f"processes came to different steps: {', '.join(sorted(steps))}"
