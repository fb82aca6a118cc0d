"""Several processes of one run: accelerate's launcher, which is torchrun, in this process; and how they end.

    finetune run RECIPE --processes 2   -> launch: recipes/accelerate/ddp.yaml -> torchrun -> 2 x finetune run RECIPE
    accelerate launch, torchrun         -> the same processes, started by hand

Of several processes that fail, the first one says why and the others are silent. They find out in the folder that
torchrun makes for each start of its processes, where each is told its error file:

    LOGS/RUN_*/final                    every start after this one ends at once, with the status in here
    LOGS/RUN_*/attempt_0/told           the status of the process that has said why
    LOGS/RUN_*/attempt_0/RANK/error.json  an error that some other process caused, in torchrun's form
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.progress import say
from modeling.errors import UserError

CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate"

SECONDS_TO_SAVE = 600
"""What processes that are told to stop have to save their state, before they are killed."""

GOES_ON = "what is complete is kept, and the same command goes on from the last checkpoint"


def launch(
    arguments: Sequence[str], *, processes: int, parallel: str = "ddp", restarts: int = 0, module: str = "finetune"
) -> int:
    """Run `python -m module *arguments` in so many processes of one group, and return the status to end with.

    `parallel` names the configuration, `restarts` is how often all are started again after one died. Raises UserError
    where they cannot be started.
    """
    _check(processes, parallel)
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
                say(f"stopped by {error.sigval.name}; {GOES_ON}")
            return told or 128 + error.sigval
    return 0


def _check(processes: int, parallel: str) -> None:
    if "RANK" in os.environ:
        raise UserError(
            f"--processes {processes}: this is already one of {os.environ.get('WORLD_SIZE', 'several')} processes that "
            f"a launcher started; expected --processes without a launcher, or a launcher without --processes"
        )
    if not (CONFIGS / f"{parallel}.yaml").is_file():
        raise UserError(
            f"{CONFIGS / parallel}.yaml: nothing is there; it comes with the repository: install it with pip install "
            f"--editable, or start accelerate launch with a configuration of your own"
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
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_SAVE),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torchrun's own log lines, and with this process's own signal handlers again afterwards."""
    logs = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher", "run")]
    propagating = [log.propagate for log in logs]
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    silent = logging.NullHandler()
    for log in logs:
        log.addHandler(silent)
        log.propagate = False
    try:
        yield
    finally:
        for log, propagate in zip(logs, propagating, strict=True):
            log.removeHandler(silent)
            log.propagate = propagate
        for number, handler in handlers.items():
            signal.signal(number, handler)


_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that torchrun passes on to its processes."""


def _told(logs: Path) -> int | None:
    """The status of the process that has said why all ended, in the last start; None where none has."""
    final = list(logs.glob("*/final"))
    starts = sorted(logs.glob("*/attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    told = final or [path / "told" for path in starts[-1:] if (path / "told").is_file()]
    return int(told[0].read_text() or 1) if told else None


def _tell_failure(failures: Mapping[int, Any], processes: int) -> int:
    """Say what no process could: that one was killed, or lost the others. `failures`: torchrun's, by rank."""
    rank, failure = _cause(failures)
    if failure.exitcode < 0:
        why = ", most likely for want of memory" if -failure.exitcode == signal.SIGKILL else ""
        say(f"process {rank} of {processes} was killed by {failure.signal_name()}{why}; {GOES_ON}")
        return 128 - failure.exitcode
    message = failure.error_file_data["message"]
    if isinstance(message, dict):
        say(message["extraInfo"]["py_callstack"].rstrip())
    say(f"process {rank} of {processes} ended with status {failure.exitcode}; {GOES_ON}")
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


def begin() -> None:
    """In a process of several: end at once if an earlier start's end was final, and whenever the launcher dies."""
    folder = _start_folder()
    if folder is None:
        return
    _end_with_launcher()
    final = folder.parent / "final"
    if final.is_file():
        raise SystemExit(int(final.read_text() or 1))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if is_first() and restarts != "0":
        say(f"a process died; all were started again ({restarts} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']})")


def tells(status: int = 1, *, final: bool) -> bool:
    """Whether this process, which ends with `status`, is the first to fail and the one to say why.

    `final`: starting again would end the same way.
    """
    folder = _start_folder()
    if folder is None:
        return True
    try:
        with (folder / "told").open("x") as file:
            file.write(str(status))
    except FileExistsError:
        return False
    if final:
        (folder.parent / "final").write_text(str(status))
    return True


def lost_another(error: Exception) -> bool:
    """Whether this process only noticed that another one is gone. Then the launcher knows more, and tells."""
    if _start_folder() is None or "torch" not in sys.modules:
        return False
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if not isinstance(error, DistError) and "/gloo/" not in str(error):
        return False
    get_error_handler().record_exception(error)
    return True


def leave() -> None:
    """Out of the group, if this process made one: threads that still serve it at exit make some processes abort."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


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
