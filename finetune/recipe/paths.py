"""Paths in a recipe -> absolute ones. In the file they are relative to it; in key=value, to where the command is given.

Paths of results (`output`, `data.prepared`) are relative to where the command is given in both, and stay as they are.
"""

import errno
import os
from pathlib import Path
from typing import Any

_SOURCES = (("data", "sources"), ("data", "eval_sources"), ("evaluation", "documents"))
_PATHS = {("model", "continue_from"), *((*source, key) for source in _SOURCES for key in ("path", "image_root"))}
_NAMES = {("model", "base"), *((*source, "hub") for source in _SOURCES)}
"""A folder, or else a name on the hub."""
_RESULTS = {("output",), ("data", "prepared")}


def anchored(value: Any, keys: tuple[str, ...], folder: Path) -> Any:
    """What stands in a recipe at `keys`, with its paths made absolute. Raises OSError: a path that no file can have.

    {"sources": [{"path": "a.jsonl"}]} at ("data",), /home/me -> {"sources": [{"path": "/home/me/a.jsonl"}]}
    """
    if isinstance(value, dict):
        return {
            key: anchored(inner, (*keys, key if isinstance(key, str) else "?"), folder) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [anchored(inner, keys, folder) for inner in value]
    where = tuple(key for key in keys if not key.isdecimal())
    if not isinstance(value, str) or not value or where not in _PATHS | _NAMES | _RESULTS:
        return value
    path = _expanded(value)
    if where in _RESULTS or (where in _NAMES and not (folder / path).is_dir()):
        return str(path) if value.startswith("~") else value
    return str(_absolute(folder / path))


def _expanded(text: str) -> Path:
    """~ is the user's home; a folder may be called ~x where no user is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _absolute(path: Path) -> Path:
    """Without links above: a data file that is one brings the folder that it lies in, not the one that it leads to."""
    try:
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except RuntimeError as error:  # so pathlib calls a loop of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error
