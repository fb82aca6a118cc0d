"""Checkpoints that are whole or not there: sealed when every process has written its part, unsealed ones swept.

    checkpoint-N/   adapter files · optimizer.pt · scheduler.pt · rng_state*.pth · trainer_state.json
                    sealed.json    name -> bytes and hash of every file; written last, after all are on the disk

A process may be killed, and a machine lose its power, at any moment: what has no seal, or not what its seal says, is no
checkpoint. Large files, weights and the optimiser's state, are looked into when a run goes on from them, and only then.
"""

import json
import re
import shutil
from pathlib import Path

import xxhash

from finetune.console import log, show_size
from modeling.errors import UserError
from modeling.files import flush, write_json

SEAL = "sealed.json"
NAME = re.compile(r"checkpoint-\d+")

HASHED_BYTES = 2**20
"""Largest file that is looked into wherever checkpoints are listed: larger ones would take seconds."""


def mark_complete(checkpoint: Path) -> None:
    """Everything in the folder is flushed to the disk, then listed."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        flush(path)
    write_json(checkpoint / SEAL, {str(path.relative_to(checkpoint)): _as_it_is(path) for path in files})
    flush(checkpoint.parent)


def _as_it_is(path: Path) -> list[int | str]:
    """Its size, and a hash that finds damage, as fast as a disk reads (XXH3, 128 bits)."""
    digest, piece = xxhash.xxh3_128(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return [path.stat().st_size, digest.hexdigest()]


def what_is_not_whole(checkpoint: Path) -> str | None:
    """The file that is not there as it was sealed (deleting an old checkpoint may have been interrupted, too)."""
    try:
        files = dict(json.loads((checkpoint / SEAL).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return SEAL
    for name, sealed in files.items():
        try:
            path = checkpoint / name
            size = path.stat().st_size
            known = sealed if isinstance(sealed, list) else [sealed]  # seals of earlier versions hold sizes alone
            if size != known[0] or (len(known) > 1 and size <= HASHED_BYTES and _as_it_is(path) != known):
                return str(name)
        except (OSError, ValueError, TypeError, LookupError):
            return str(name)
    return None


def what_has_changed_inside(checkpoint: Path) -> str | None:
    """The file of a whole checkpoint whose content is not what was sealed."""
    sealed = json.loads((checkpoint / SEAL).read_bytes())
    hashed = {name: known for name, known in sealed.items() if isinstance(known, list)}
    return next((name for name, known in hashed.items() if _as_it_is(checkpoint / name) != known), None)


def is_complete(checkpoint: Path) -> bool:
    return what_is_not_whole(checkpoint) is None


def checkpoints(folder: Path) -> list[Path]:
    """The folders checkpoint-STEP of a run folder, in order; others, such as a copy made by hand, are left alone."""
    found = (path for path in folder.glob("checkpoint-*") if path.is_dir() and NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    return next(filter(is_complete, reversed(checkpoints(folder))), None)


def remove_incomplete(folder: Path) -> None:
    """Delete what is left of interrupted writing or deleting, and say what it was."""
    for checkpoint in checkpoints(folder):
        if broken := what_is_not_whole(checkpoint):
            log(f"{checkpoint}: deleted; it is not whole: {broken} is not as it was when the checkpoint was complete")
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


def is_trained(folder: Path) -> bool:
    """Return whether a training left anything that another one would lose: a checkpoint, or an adapter."""
    return any((folder / "adapter").glob("*.safetensors")) or last_checkpoint(folder) is not None
