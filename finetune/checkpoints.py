"""Checkpoints that are whole or not there: sealed when every process has written its part, unsealed ones swept.

    checkpoint-N/   adapter files · optimizer.pt · scheduler.pt · rng_state*.pth · trainer_state.json
                    sealed.json    name -> bytes of every file, and SHA-256 of small ones; written last, after all are
                                   on the disk

A process may be killed, and a machine lose its power, at any moment: what has no seal, or not what its seal says, is no
checkpoint. A byte that changes inside a large file is not noticed.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

from finetune.progress import say
from finetune.sizes import show_size
from modeling.errors import UserError
from modeling.files import flush, write_json

SEAL = "sealed.json"
NAME = re.compile(r"checkpoint-\d+")

HASHED_BYTES = 2**20
"""Largest file whose content is sealed, too: larger ones, the weights and the optimiser's state, would take seconds."""


def seal(checkpoint: Path) -> None:
    """Everything in the folder is flushed to the disk, then listed."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        flush(path)
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): _as_it_is(path) for path in files})
    flush(checkpoint.parent)


def _as_it_is(path: Path) -> int | list[int | str]:
    """Its bytes; of a small file, their hash, too."""
    size = path.stat().st_size
    return size if size > HASHED_BYTES else [size, hashlib.sha256(path.read_bytes()).hexdigest()]


def what_is_not_whole(checkpoint: Path) -> str | None:
    """The file that is not there as it was sealed (deleting an old checkpoint may have been interrupted, too)."""
    try:
        files = dict(json.loads((checkpoint / SEAL).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return SEAL
    for name, sealed in files.items():
        try:
            path = checkpoint / name
            if (path.stat().st_size if isinstance(sealed, int) else _as_it_is(path)) != sealed:
                return str(name)
        except (OSError, ValueError):
            return str(name)
    return None


def is_whole(checkpoint: Path) -> bool:
    return what_is_not_whole(checkpoint) is None


def checkpoints(folder: Path) -> list[Path]:
    """The folders checkpoint-STEP of a run folder, in order; others, such as a copy made by hand, are left alone."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    return next(filter(is_whole, reversed(checkpoints(folder))), None)


def sweep(folder: Path) -> None:
    """Delete what is left of interrupted writing or deleting, and say what it was."""
    for checkpoint in checkpoints(folder):
        if broken := what_is_not_whole(checkpoint):
            say(f"{checkpoint}: deleted; it is not whole: {broken} is not as it was when the checkpoint was complete")
            shutil.rmtree(checkpoint)


def require_room(folder: Path, needed: int) -> None:
    """Raises UserError where a checkpoint of so many bytes has no room."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        last = last_checkpoint(folder)
        raise UserError(
            f"{folder}: a checkpoint takes {show_size(needed)}, and {show_size(free)} are free\n"
            f"  make room; the same command then goes on from {last.name if last else 'the beginning'}"
        )
