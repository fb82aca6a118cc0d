"""The work of a verb -> what it prints, and the status it ends with."""

import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from finetune import launch
from modeling.errors import Interrupted, UserError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work; a user's mistake ends with its message and status 1, an interruption with 128 + its signal.

    Of several processes that fail, one says why.
    """
    try:
        launch.begin()
        return work()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint", status=130)
    except Interrupted as error:
        fail(str(error), status=128 + error.signal)
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            what = error.filename or "writing"
            fail(f"{what}: {error.strerror}; what is complete is kept, and the same command goes on")
        if not launch.is_started():
            raise
        launch.tell_unforeseen(error)
        raise typer.Exit(1) from error
    finally:
        launch.leave()


def fail(message: str, status: int = 1) -> NoReturn:
    """End with a message; of several processes, one says it."""
    from rich.text import Text

    from finetune.progress import console

    def show() -> None:
        console.quiet = False
        console.print(Text(message, style="red"))

    launch.tell(show, status, final=True)
    raise typer.Exit(status)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """End with the figures on stdout, where they are asked for."""
    if as_json:
        json.dump(result, sys.stdout, indent=2, ensure_ascii=False)
        sys.stdout.write("\n")


def quiet() -> None:
    """Keep the libraries' notices out of our output; their errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "trl", "accelerate", "datasets", "peft", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|trl|transformers|torch|accelerate)\b.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
