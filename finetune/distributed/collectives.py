"""Which of a run's processes this is, and what they do together. With one process, everything here is nothing.

Launchers (`accelerate launch`, torchrun, `finetune run --processes`) set RANK, WORLD_SIZE and LOCAL_RANK; accelerate
makes the process group of them: nccl on GPUs, gloo without.

A step that all come to has a name: `on_main` is done by one for all, `main_first` by one before the others, `each` by
each, `share_out` in shares. A user's mistake (UserError) or a full disk (OSError) that one of them meets is raised on
all, so that none waits for one that has given up. Inside a step a process is alone: it waits for nobody.
"""

import atexit
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from finetune.console import Track, silently
from finetune.distributed.nodes import NodeGroup
from modeling.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=2)
"""How long a process waits for the others, who may be preparing data. One that died is the launcher's business, which
ends them all."""


def state() -> PartialState:
    """accelerate's, which all share; the group is made when it is first asked for."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@atexit.register
def leave() -> None:
    """Out of a gloo group: its threads, alive at exit, make some processes abort. nccl's would wait for the dead."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def rank() -> int:
    return 0 if _inside.get() else state().process_index


def world_size() -> int:
    """Of the processes that wait for each other: inside a step, one."""
    return 1 if _inside.get() else state().num_processes


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def barrier() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        state().wait_for_everyone()


def gather(items: list[Item]) -> list[Item]:
    """The items of all processes, on every one of them, in the order of ranks."""
    return gather_object(items) if world_size() > 1 else items


def broadcast(value: Item) -> Item:
    """The main process's value, on every one."""
    return broadcast_object_list([value])[0] if world_size() > 1 else value


def gather_numbers(values: list[float]) -> list[list[float]]:
    """The numbers of all processes, in the order of ranks: one small tensor, for every step."""
    if world_size() == 1:
        return [values]
    mine = torch.tensor(values, dtype=torch.float64, device=state().device)
    gathered = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(gathered, mine)
    return torch.stack(gathered).tolist()


_inside: ContextVar[bool] = ContextVar("inside", default=False)
"""Whether this process is inside a step."""


def on_main(step: str, work: Callable[[], Item]) -> Item:
    """What the main process makes of `work`, on every one."""
    if world_size() == 1:
        return work()
    outcome: tuple[Any, Exception | None] = _try(work) if is_main() else (None, None)
    named, *told = broadcast((step, outcome[0], _told(outcome[1])))
    _require_same({named, step})
    value, error = outcome if is_main() else told
    if error:
        raise error
    return value


def main_first(step: str, work: Callable[[], Item]) -> Item:
    """`work` in every process, in the main one before the others, who find what it has made."""
    made: list[Item] = []
    on_main(step, lambda: made.append(work()))
    return made[0] if made else work()


def each(step: str, work: Callable[[], Item]) -> list[Item]:
    """`work` in every process at once: what each made of it, in the order of ranks, on every one."""
    if world_size() == 1:
        return [work()]
    value, error = _try(work)
    told = gather([(step, value, _told(error))])
    _require_same({named for named, _, _ in told})
    if error:
        raise error
    for _, _, others in told:
        if others:
            raise others
    return [made for _, made, _ in told]


def share_out(
    step: str, items: Sequence[Item], work: Callable[[Item], Result], *, track: Track = silently
) -> list[Result]:
    """work(item) of every item, in their order, on every process; of n processes each does every n-th item."""
    ranks, mine = world_size(), items[rank() :: world_size()]
    shares = each(step, lambda: [work(item) for item in track(mine, step)])
    return [shares[number % ranks][number // ranks] for number in range(len(items))]


def nodes() -> NodeGroup:
    """The machines of a run, of each the first process: the others would take its workers' cores."""
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
    """Raises UserError where a process does not see the folder that the main one has."""
    number = rank()

    def look() -> None:
        if not folder.is_dir():
            raise UserError(
                f"{key}: {folder} is there for the main process, and not for process {number} on {platform.node()}; "
                f"name a folder that all nodes share"
            )

    each("look for a folder", look)


def _try(work: Callable[[], Item]) -> tuple[Any, Exception | None]:
    """(what it made, None), or (None, the mistake it found)."""
    with _alone():
        try:
            return work(), None
        except (UserError, OSError) as error:
            return None, error


@contextmanager
def _alone() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _told(error: Exception | None) -> Exception | None:
    """The error as the other processes raise it: libraries' own may not survive the way there."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return UserError(str(error)) if error else None


def _require_same(steps: set[str]) -> None:
    assert len(steps) == 1, f"processes came to different steps: {', '.join(sorted(steps))}"
