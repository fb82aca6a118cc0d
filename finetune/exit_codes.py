"""How a verb ends: its result, or one message, and the exit status."""

import errno
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from finetune.distributed import launcher as launch
from modeling.errors import Interrupted, UserError

DOES_NOT_FIT = 3
"""Status of `finetune plan` for a recipe that does not fit the GPU."""

NOT_ALL_ANSWERED = 4
"""Status of `finetune generate` where a record could not be asked."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
_PATH_ERRORS = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EINVAL)


def guarded(
    work: Callable[[], dict[str, Any]], *, interrupted: str = "the same command goes on from the last checkpoint"
) -> dict[str, Any]:
    """Return what `work` returns; a user's mistake ends with its message and status 1, a signal with 128 + its number.

    `interrupted` says what Ctrl-C leaves behind. Of several processes that fail, one prints the reason.
    """
    try:
        _hush()
        launch.begin_process()
        return work()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; {interrupted}", status=130)
    except Interrupted as error:
        fail(str(error), status=128 + error.signal)
    except (typer.Exit, BrokenPipeError):  # typer ends quietly where nobody reads on
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            what = error.filename or "writing"
            fail(f"{what}: {error.strerror}; what is complete is kept, and the same command goes on")
        if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
            fail(f"{error.filename}: {error.strerror}")
        launch.report_unexpected(error)
        raise typer.Exit(1) from error
    finally:
        launch.leave_group()


def fail(message: str, status: int = 1) -> NoReturn:
    """End with a message and a status; of several processes, one prints it."""
    from finetune.console import log_error

    launch.report_failure(lambda: log_error(message), status, final=True)
    raise typer.Exit(status)


def finish(result: dict[str, Any], as_json: bool, *, status: int = 0) -> None:
    """Print the result as JSON, where it is asked for, and end with the status."""
    if as_json:
        from finetune.console import print_json

        print_json(result)
    if status:
        raise typer.Exit(status)


def _hush() -> None:
    """Log only the errors of libraries, without importing one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "trl", "accelerate", "datasets", "peft", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|trl|transformers|torch|accelerate)\b.*")


def quiet() -> None:
    """Log only the errors of libraries, also of transformers, which sets its own level when it is imported."""
    _hush()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
