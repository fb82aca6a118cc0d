"""Several processes of one run: accelerate's launcher, which is torchrun, in this process; and how they end.

    finetune run RECIPE --processes 2   -> launch: accelerate/ddp.yaml -> torchrun -> 2 x finetune run RECIPE
    accelerate launch, torchrun         -> the same processes, started by hand

Of several processes that fail, the first one says why and the others are silent. They find out in the folder that
torchrun makes for each start of its processes, in which it gives each of them an error file:

    LOGS/RUN_*/final                      every start after this one ends at once, with the status in here
    LOGS/RUN_*/attempt_0/first            made by the first process that failed
    LOGS/RUN_*/attempt_0/told             its status; it has said why
    LOGS/RUN_*/attempt_0/RANK/error.json  an error that some other process caused, in torchrun's form
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

from finetune.console import log, log_error
from modeling.cores import available_cores
from modeling.errors import UserError

CONFIGS = Path(__file__).parent / "accelerate"
"""Configurations of accelerate's launcher, one a way to share the work: ddp.yaml, fsdp2.yaml, single.yaml."""

SECONDS_TO_SAVE = 600
"""What processes that are told to stop have to save their state, before they are killed."""

SECONDS_TO_TELL = 5
"""How long a process that has nothing to say waits for the one that has: when it ends, torchrun ends that one, too."""

GOES_ON = "what is complete is kept, and the same command goes on from the last checkpoint"


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

    with TemporaryDirectory(prefix="finetune-") as logs, patch_environment(**_environment(processes)), _quietly():
        options = ["--config_file", str(CONFIGS / f"{parallel}.yaml"), "--num_processes", str(processes)]
        options += ["--max_restarts", str(restarts), "--log_dir", logs, "--module", module, *arguments]
        try:
            launch_command(launch_command_parser().parse_args(options))
        except ChildFailedError as error:
            told = _told(Path(logs))
            return told if told is not None else _tell_failure(error.failures, processes)
        except SignalException as error:
            told = _told(Path(logs))
            if told is None:
                log(f"stopped by {error.sigval.name}; {GOES_ON}")
            return told or 128 + error.sigval
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
    """What torchrun and the processes read; what the user has set stays."""
    wanted = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torchrun's own log lines, and with this process's own signal handlers again afterwards."""
    logs = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher", "run")]
    propagating = [logger.propagate for logger in logs]
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
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


_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that torchrun passes on to its processes."""


def _told(logs: Path) -> int | None:
    """The status of the process that has said why all ended, in the last start; None where none has."""
    starts = sorted(logs.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    told = [*logs.glob("*/final"), *(path / "told" for path in starts[-1:] if (path / "told").is_file())]
    return int(told[0].read_text()) if told else None


def _tell_failure(failures: Mapping[int, Any], processes: int) -> int:
    """Say what no process could: that one was killed, or lost the others. `failures`: torchrun's, by rank."""
    rank, failure = _cause(failures)
    if failure.exitcode < 0:
        why = ", most likely for want of memory" if -failure.exitcode == signal.SIGKILL else ""
        log(f"process {rank} of {processes} was killed by {failure.signal_name()}{why}; {GOES_ON}")
        return 128 - failure.exitcode
    message = failure.error_file_data["message"]
    if isinstance(message, dict):
        log(message["extraInfo"]["py_callstack"])
    log(f"process {rank} of {processes} ended with status {failure.exitcode}; {GOES_ON}")
    return failure.exitcode


def _cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The process that ended first. Others were then ended by torchrun: SIGTERM, and SIGKILL half a minute later; or
    they lost it in the middle of a message."""
    first = min(failure.timestamp for failure in failures.values())
    killed = [
        (rank, failure)
        for rank, failure in failures.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM and failure.timestamp < first + 10
    ]
    return killed[0] if killed else min(failures.items(), key=lambda item: item[1].timestamp)


def is_first() -> bool:
    """Whether this process is the one that speaks, by the launcher's word; cheap, and true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def is_started() -> bool:
    """Whether torchrun started this process."""
    return _start_folder() is not None


def begin() -> None:
    """In a process of several: end at once if an earlier start's end was final, and whenever the launcher dies."""
    folder = _start_folder()
    if folder is None:
        return
    _end_with_launcher()
    final = folder.parent / "final"
    if final.is_file():
        raise SystemExit(int(final.read_text()))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if is_first() and restarts != "0":
        log(f"a process died; all were started again ({restarts} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']})")


def tell(show: Callable[[], None], status: int, *, final: bool) -> None:
    """Show why this process ends with `status`, if it is the first to fail; else wait until that one has done so.

    `final`: starting again would end the same way.
    """
    folder = _start_folder()
    if folder is None:
        show()
        return
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        _wait_for(folder / "told")
        return
    show()
    if final:
        (folder.parent / "final").write_text(str(status))
    (folder / "told").write_text(str(status))


def tell_unforeseen(error: Exception) -> None:
    """Show the traceback of what is no mistake of the user's.

    That another process is gone is only a consequence: the launcher knows more, and shows this if nobody explains it.
    """
    if _lost_another(error):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        folder = _start_folder()
        assert folder is not None
        _wait_for(folder / "told")
    else:
        tell(lambda: log_error(traceback.format_exc()), 1, final=False)


def _lost_another(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "/gloo/" in str(error)


def _wait_for(told: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_TELL
    while not told.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)


def leave() -> None:
    """Out of the group, if this process made one: before it says that all is over."""
    if ranks := sys.modules.get("finetune.distributed.collectives"):
        ranks.leave()


def end() -> None:
    """End a process that torchrun started, its work done, without taking its libraries down.

    Threads of theirs that are alive then make a few such processes in a hundred abort ("terminate called without an
    active exception"), and the launcher would report a run that is complete as failed.
    """
    if is_started():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _start_folder() -> Path | None:
    """What the processes that torchrun started here at once have in common; None where it did not start this one."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def _end_with_launcher() -> None:
    """Have this process told to stop when the launcher is gone. Nobody else would, and the same command given again
    would meet it in the run's folder."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


if __name__ == "__main__":  # the path for `accelerate launch --config_file`
    print(CONFIGS / f"{sys.argv[1]}.yaml")
