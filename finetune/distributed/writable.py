"""Whether a path can be written to, checked before the work that fills it."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from modeling.atomic_files import partial_of
from modeling.errors import UserError

LONGEST_NAME = 255
"""Most bytes of a file name, on all common file systems."""


def check_place(name: str, path: Path, *, folder: bool = False) -> None:
    """Raise UserError where no file (or, for `folder`, no folder) can be written at `path`; name: its option or key.

    Nothing is left behind. Parents may be missing where they can be made.
    """
    try:
        problem = _problem(path.absolute(), folder=folder)
    except (OSError, ValueError) as error:  # a loop of links, a NUL, what the file system's encoding does not have
        problem = f"is not a valid path: {error.strerror if isinstance(error, OSError) else error}"
    if problem:
        raise UserError(f"{name}: {str(path)!r:.200} {problem}")


def _problem(path: Path, *, folder: bool) -> str | None:
    longest = max(len(os.fsencode(part)) for part in (*path.parts, path.name if folder else partial_of(path).name))
    if longest > LONGEST_NAME:
        return f"is not a valid path: a part of it has {longest} bytes, and {LONGEST_NAME} is the most"
    if _exists(path):
        if folder and not path.is_dir():
            return "is a file; expected a folder"
        if not folder and not path.is_file():
            return "is a folder; expected a file" if path.is_dir() else "is a pipe or a device; expected a file"
        if not os.access(path, os.W_OK):
            return "is read-only; choose another place"
    parent = path if folder and path.is_dir() else next(parent for parent in path.parents if _exists(parent))
    if not parent.is_dir():
        return f"cannot be written: {parent} is a file, not a folder; choose another place"
    try:
        with TemporaryFile(dir=parent):  # permissions do not tell whether a network disk takes files
            return None
    except OSError as error:
        return f"cannot be written: no file can be made in {parent}: {error.strerror}; choose another place"


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
