"""Checkpoints that are whole or not there: sealed when every process has written its part, unsealed ones swept.

    checkpoint-N/   adapter files · optimizer.pt · scheduler.pt · rng_state*.pth · trainer_state.json
                    sealed.json    name -> bytes of every file; written last, after all are on the disk

A process may be killed, and a machine lose its power, at any moment: what has no seal, or not what its seal says, is no
checkpoint.
"""

import json
import shutil
from pathlib import Path

from finetune.sizes import show_size
from modeling.errors import UserError
from modeling.files import flush, write_json

SEAL = "sealed.json"


def seal(checkpoint: Path) -> None:
    """Everything in the folder is flushed to the disk, then listed."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        flush(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_json(checkpoint / SEAL, sizes)
    flush(checkpoint.parent)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there as it was sealed: deleting an old checkpoint may have been interrupted, too."""
    try:
        sizes: dict[str, int] = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    return max(filter(is_whole, folder.glob("checkpoint-*")), key=step_of, default=None)


def sweep(folder: Path) -> None:
    """Delete what is left of interrupted writing or deleting."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not is_whole(checkpoint):
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
