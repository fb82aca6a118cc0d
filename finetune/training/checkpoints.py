"""Checkpoints that are complete or not there: a list of all files is written last, and what does not match it is none.

    checkpoint-N/   adapter files · optimizer.pt · scheduler.pt · rng_state*.pth · rows.json · trainer_state.json
                    complete.json    name -> bytes and hash of every file; written when all are on the disk

A process may be killed, and a machine lose its power, at any moment: in writing a checkpoint, and in deleting an old
one. Large files, weights and the optimiser's state, are hashed only when a run goes on from them.
"""

import json
import re
import shutil
from pathlib import Path

import xxhash

from finetune.console import log, show_size
from modeling.atomic_files import flush, write_json
from modeling.errors import UserError

COMPLETE = "complete.json"
NAME = re.compile(r"checkpoint-\d+")

HASHED_BYTES = 2**20
"""Largest file that is hashed wherever checkpoints are listed: larger ones would take seconds."""


def mark_complete(checkpoint: Path) -> None:
    """Flush all files of a checkpoint to the disk, then list them in complete.json."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)
    for path in files:
        flush(path)
    write_json(checkpoint / COMPLETE, {str(path.relative_to(checkpoint)): _size_and_hash(path) for path in files})
    flush(checkpoint.parent)


def find_damage(checkpoint: Path, *, hash_all: bool = False) -> str | None:
    """Return the first file that is not as complete.json lists it, or None.

    Files of more than HASHED_BYTES are judged by their size alone, unless `hash_all`.
    """
    try:
        files = dict(json.loads((checkpoint / COMPLETE).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return COMPLETE
    for name, written in files.items():
        try:
            path = checkpoint / name
            size = path.stat().st_size
            if size != written[0] or ((hash_all or size <= HASHED_BYTES) and _size_and_hash(path) != written):
                return str(name)
        except (OSError, ValueError, TypeError, LookupError):
            return str(name)
    return None


def _size_and_hash(path: Path) -> list[int | str]:
    """Return a file's bytes, and a hash that finds damage as fast as a disk reads (XXH3, 128 bits)."""
    digest, piece = xxhash.xxh3_128(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return [path.stat().st_size, digest.hexdigest()]


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-STEP of a run folder by step; others, such as a copy made by hand, are left out."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    return next((one for one in reversed(checkpoints(folder)) if find_damage(one) is None), None)


def remove_incomplete(folder: Path) -> None:
    """Delete what is left of interrupted writing or deleting, and log what it was."""
    for checkpoint in checkpoints(folder):
        if damaged := find_damage(checkpoint):
            log(f"{checkpoint}: deleted; it is not complete: {damaged} is not there, or not as it was written")
            shutil.rmtree(checkpoint)


def require_room(folder: Path, needed: int) -> None:
    """Raise UserError where a checkpoint of so many bytes has no room."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        last = last_checkpoint(folder)
        raise UserError(
            f"{folder}: a checkpoint takes {show_size(needed)}, and {show_size(free)} are free\n"
            f"  make room; the same command then goes on from {last.name if last else 'the beginning'}"
        )


def is_trained(folder: Path) -> bool:
    """Return whether a training left anything that another one would lose: a checkpoint, or an adapter."""
    return any((folder / "adapter").glob("*.safetensors")) or last_checkpoint(folder) is not None
