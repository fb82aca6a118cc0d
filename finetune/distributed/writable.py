"""Places to write to, looked at before the work that fills them."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from modeling.errors import UserError
from modeling.files import partial_of

LONGEST_NAME = 255
"""Bytes of a file's name, on all file systems in use."""


def check_place(name: str, path: Path, *, folder: bool = False) -> None:
    """Raise UserError where no file, or no `folder`, can be written; `name` is the option or key that says where.

    Nothing is left behind. Missing parents are no mistake where they can be made.
    """
    try:
        problem = _problem(path.absolute(), folder=folder)
    except (OSError, ValueError) as error:  # a loop of links, a NUL, what the file system's encoding does not have
        problem = f"is no name of a place: {error.strerror if isinstance(error, OSError) else error}"
    if problem:
        raise UserError(f"{name}: {str(path)!r:.200} {problem}")


def _problem(path: Path, *, folder: bool) -> str | None:
    longest = max(len(os.fsencode(part)) for part in (*path.parts, path.name if folder else partial_of(path).name))
    if longest > LONGEST_NAME:
        return f"is no name of a place: a part of it has {longest} bytes, and {LONGEST_NAME} is the most"
    if _exists(path):
        if folder and not path.is_dir():
            return "is a file; expected a folder"
        if not folder and not path.is_file():
            return "is a folder; expected a file" if path.is_dir() else "is a pipe or a device; expected a file"
        if not os.access(path, os.W_OK):
            return "is read-only; choose another place"
    parent = path if folder and path.is_dir() else next(parent for parent in path.parents if _exists(parent))
    if not parent.is_dir():
        return f"cannot be written: {parent} is a file, and no folder; choose another place"
    try:
        with TemporaryFile(dir=parent):  # permissions alone say nothing of a disk that another machine keeps
            return None
    except OSError as error:
        return f"cannot be written: no file can be made in {parent}: {error.strerror}; choose another place"


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
