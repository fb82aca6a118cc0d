"""Several processes of one run: accelerate's launcher, which is torchrun, in this process; and how they end.

    finetune run RECIPE --processes 2   -> launch: accelerate/ddp.yaml -> torchrun -> 2 x finetune run RECIPE
    accelerate launch, torchrun         -> the same processes, started by hand

Of several processes that fail, the first one reports why and the others are silent. They know by files in the folder
that torchrun makes for each start of its processes, in which it gives each of them an error file:

    LOGS/RUN_*/final                      every start after this one ends at once, with the status in here
    LOGS/RUN_*/attempt_0/first            made by the first process that failed
    LOGS/RUN_*/attempt_0/reported         its status; it has reported why
    LOGS/RUN_*/attempt_0/RANK/error.json  an error that another process caused, in torchrun's form
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.console import log, log_error, print_text
from modeling.cpu_cores import available_cores
from modeling.errors import UserError

CONFIGS = Path(__file__).parent / "accelerate"
"""Configurations of accelerate's launcher, one a way to share the work: ddp.yaml, fsdp2.yaml, single.yaml."""

SECONDS_TO_SAVE = 600
"""Time that processes have to save their state after a signal to stop, before they are killed."""

SECONDS_TO_REPORT = 5
"""Time that the other processes wait for the one that reports: as soon as one ends, torchrun ends that one, too."""

KEPT = "what is complete is kept, and the same command goes on from the last checkpoint"


def launch(
    arguments: Sequence[str], *, processes: int, parallel: str = "ddp", restarts: int = 0, module: str = "finetune"
) -> int:
    """Run `python -m module *arguments` in so many processes of one group, and return the status to end with.

    `parallel` names the configuration, `restarts` is how often all are started again after one died. Raises UserError
    where they cannot be started.
    """
    _check(processes)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with (
        TemporaryDirectory(prefix="finetune-") as logs,
        patch_environment(**_environment(processes)),
        _quiet_torchrun(),
    ):
        options = ["--config_file", str(CONFIGS / f"{parallel}.yaml"), "--num_processes", str(processes)]
        options += ["--max_restarts", str(restarts), "--log_dir", logs, "--module", module, *arguments]
        try:
            launch_command(launch_command_parser().parse_args(options))
        except ChildFailedError as error:
            status = _reported_status(Path(logs))
            return status if status is not None else _report_death(error.failures, processes)
        except SignalException as error:
            status = _reported_status(Path(logs))
            if status is None:
                log(f"stopped by {error.sigval.name}; {KEPT}")
            return status or 128 + error.sigval
    return 0


def _check(processes: int) -> None:
    if "RANK" in os.environ:
        raise UserError(
            f"--processes {processes}: this is already one of {os.environ.get('WORLD_SIZE', 'several')} processes that "
            f"a launcher started; expected --processes without a launcher, or a launcher without --processes"
        )
    import torch

    if torch.cuda.is_available() and processes > (gpus := torch.cuda.device_count()):
        raise UserError(
            f"--processes {processes}: each needs a GPU of its own, and this machine has {gpus}; expected at most "
            f"{gpus} (several machines: scripts/train.slurm)"
        )


def _environment(processes: int) -> dict[str, str]:
    """Return environment variables for torchrun and the processes; what the user has set stays."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextmanager
def _quiet_torchrun() -> Iterator[None]:
    """Keep torchrun's log lines away, and restore this process's signal handlers afterwards."""
    logs = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher", "run")]
    propagating = [logger.propagate for logger in logs]
    passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in passed_on}
    silent = logging.NullHandler()
    for logger in logs:
        logger.addHandler(silent)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(logs, propagating, strict=True):
            logger.removeHandler(silent)
            logger.propagate = propagate
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _reported_status(logs: Path) -> int | None:
    """Return the status of the process that reported why all ended, in the last start; None where none has."""
    starts = sorted(logs.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    reported = [*logs.glob("*/final"), *(path / "reported" for path in starts[-1:] if (path / "reported").is_file())]
    return int(reported[0].read_text()) if reported else None


def _report_death(failures: Mapping[int, Any], processes: int) -> int:
    """Log what no process could: that one was killed, or lost the others. failures: torchrun's, by rank."""
    first = min(failure.timestamp for failure in failures.values())
    # torchrun ends the others by SIGTERM, and SIGKILL half a minute later; or they lose the connection to the dead one.
    killed = [
        (rank, failure)
        for rank, failure in failures.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp < first + 10
    ]
    rank, failure = killed[0] if killed else min(failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        why = ", most likely because memory ran out" if -failure.exitcode == signal.SIGKILL else ""
        log(f"process {rank} of {processes} was killed by {failure.signal_name()}{why}; {KEPT}")
        return 128 - failure.exitcode
    message = failure.error_file_data["message"]
    if isinstance(message, dict):
        log(message["extraInfo"]["py_callstack"])
    log(f"process {rank} of {processes} ended with status {failure.exitcode}; {KEPT}")
    return failure.exitcode


def is_main_process() -> bool:
    """Return whether this process prints, by the launcher's variables: without torch, and True without a launcher.

    Among processes that work together, `collectives.is_main` says which one writes.
    """
    return os.environ.get("RANK", "0") == "0"


def begin_process() -> None:
    """In a process of several: end at once if an earlier start's end was final, and whenever the launcher dies."""
    folder = _start_folder()
    if folder is None:
        return
    launcher = os.getppid()

    def stop_with_launcher() -> None:  # nobody else would, and the same command given again would meet this process
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_launcher, daemon=True, name="launcher-watch").start()
    final = folder.parent / "final"
    if final.is_file():
        raise SystemExit(int(final.read_text()))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if is_main_process() and restarts != "0":
        log(f"a process died; all were started again ({restarts} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']})")


def report_failure(show: Callable[[], None], status: int, *, final: bool) -> None:
    """Call `show`, which prints why this process ends, if it is the first to fail; else wait for the one that is.

    `final`: starting again would end with the same `status`.
    """
    folder = _start_folder()
    if folder is None:
        show()
        return
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        _wait_for_report(folder)
        return
    show()
    if final:
        (folder.parent / "final").write_text(str(status))
    (folder / "reported").write_text(str(status))


def report_unexpected(error: Exception) -> None:
    """Print the traceback of an error that is not the user's mistake.

    A lost connection to another process is only a consequence: the launcher knows more, and shows it if nobody
    explains it.
    """
    torch = sys.modules.get("torch")
    if torch and (isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        folder = _start_folder()
        assert folder is not None
        _wait_for_report(folder)
    else:
        report_failure(lambda: log_error(traceback.format_exc()), 1, final=False)


def _wait_for_report(folder: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_REPORT
    while not (folder / "reported").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)


def leave_group() -> None:
    """Leave the process group, if this process is in one, before the verb ends."""
    if collectives := sys.modules.get("finetune.distributed.collectives"):
        collectives.leave_group()


def end_process() -> None:
    """End a process that torchrun started, its work done, without taking its libraries down.

    Threads of theirs that are alive then make a few such processes in a hundred abort ("terminate called without an
    active exception"), and the launcher would report a run that is complete as failed.
    """
    if _start_folder() is not None:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _start_folder() -> Path | None:
    """Return the folder of this start, which its processes share; None where torchrun did not start this process."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


if __name__ == "__main__":  # the path for `accelerate launch --config_file`
    print_text(str(CONFIGS / f"{sys.argv[1]}.yaml"))
