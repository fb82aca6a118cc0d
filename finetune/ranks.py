"""Which of a run's processes this is, and what they do together. With one process, everything here is nothing.

Launchers (`accelerate launch`, torchrun, `finetune run --processes`) set RANK, WORLD_SIZE and LOCAL_RANK; accelerate
makes the process group of them: nccl on GPUs, gloo without.
"""

from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Item = TypeVar("Item")

PATIENCE = timedelta(days=2)
"""How long a process waits for the others, who may be preparing data. One that died is the launcher's business, which
ends them all."""


def state() -> PartialState:
    """accelerate's, which all share; the group is made when it is first asked for."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def rank() -> int:
    return state().process_index


def count() -> int:
    return state().num_processes


def is_main() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    state().wait_for_everyone()


def gather(items: list[Item]) -> list[Item]:
    """The items of all processes, on every one of them, in the order of ranks."""
    return gather_object(items) if count() > 1 else items


def broadcast(value: Item) -> Item:
    """The main process's value, on every one."""
    return broadcast_object_list([value])[0] if count() > 1 else value


def gather_numbers(values: list[float]) -> torch.Tensor:
    """float64 [processes, values], on the CPU: a small tensor, for every step."""
    mine = torch.tensor(values, dtype=torch.float64, device=state().device)
    if count() == 1:
        return mine.cpu()[None]
    gathered = [torch.empty_like(mine) for _ in range(count())]
    torch.distributed.all_gather(gathered, mine)
    return torch.stack(gathered).cpu()
