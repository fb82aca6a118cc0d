"""Several processes of one group, forked from the test: what each returns, in the order of ranks."""

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState

CONTEXT = multiprocessing.get_context("fork")

TIMEOUT = 120
"""Seconds after which a group is taken to hang."""


def run_processes(count: int, work: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """`work(*arguments)` in `count` processes with a launcher's environment; raises what the first to fail raised."""
    results = CONTEXT.SimpleQueue()
    processes = start_processes(count, work, *arguments, results=results)
    returned: dict[int, Any] = {}
    try:
        for process in processes:
            process.join(timeout)
            if process.exitcode is None:
                raise TimeoutError(f"a process of {count} hangs")
            while not results.empty():
                rank, value, error = results.get()
                if error:
                    raise AssertionError(f"rank {rank} of {count}:\n{error}")
                returned[rank] = value
    finally:
        for process in processes:
            process.kill()
    return [returned[rank] for rank in range(count)]


def start_processes(count: int, work: Callable[..., Any], *arguments: Any, results: Any = None) -> list[Any]:
    """The same, begun and not waited for."""
    port, results = _free_port(), results or CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_begin, args=(rank, count, port, work, arguments, results)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _begin(
    rank: int, count: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    gc.freeze()  # else each collection in a fork walks through, and so copies, all that the test has imported
    AcceleratorState._reset_state(reset_partial_state=True)  # the test's own is that of one process
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    try:
        results.put((rank, work(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
