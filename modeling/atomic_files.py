"""Write files atomically (safe against a power cut), and read JSON with errors that name the file."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from modeling.errors import UserError

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes; never wait for a pipe, a socket or a device.

    Raises OSError: the path does not exist, or is not a regular file.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:  # never open a device: opening alone can rewind a tape
        raise OSError(errno.EINVAL, f"expected a file, found {KINDS.get(kind, 'something else')}", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced between the two calls
        os.close(descriptor)
        raise OSError(errno.EINVAL, "expected a file, found something else", str(path))
    return os.fdopen(descriptor, "rb")


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(path: Path) -> Path:
    """Return the temporary name under which a file is written before it is renamed."""
    return path.with_name(f"{path.name}.partial")


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a finished file to its name, after an fsync: else a power cut could leave an empty file of this name."""
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file atomically; lone surrogates in a text are written as escapes."""
    partial = partial_of(path)
    partial.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
    put_in_place(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def digests(files: Iterable[Path]) -> dict[str, str]:
    """Return file name -> SHA-256, or "" for a missing file."""
    found = {}
    for path in files:
        found[path.name] = ""
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_json(path: Path, *, repair: str = "delete it, and give the same command again") -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file does not exist.

    Raises UserError: the file holds something else; `repair` is the advice in the message.
    """
    try:
        with open_regular(path) as file:
            value = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {repair}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); it may be cut short: {repair}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}; {repair}")
    return value


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def is_text(value: Any) -> bool:
    """Return whether a value from a file can be a name or a path: a string, not empty, without NUL."""
    return isinstance(value, str) and value != "" and "\0" not in value
