"""A name that leads to nothing -> the nearest one that is there, for a message."""

import os
from bisect import bisect_left
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

MOST_NAMES = 200_000
"""In a larger folder or archive nothing is looked for."""


class Names:
    """Names that are there, asked for those that are written a little differently."""

    def __init__(self, names: Iterable[str]):
        found = list(islice(filter(str.isprintable, names), MOST_NAMES + 1))
        self._sorted = sorted(found) if len(found) <= MOST_NAMES else []
        self._alike = {_plain(name): name for name in reversed(self._sorted)}
        self._without_suffix = {_stem(name): name for name in reversed(self._sorted)}
        self._by_last_part = {_plain(name).rpartition("/")[2]: name for name in reversed(self._sorted)}

    def near(self, name: str) -> str | None:
        """The one that differs in case, percent signs, backslashes, suffix, folder or a few letters; or None."""
        plain = _plain(name)
        found = self._alike.get(plain) or self._without_suffix.get(_stem(name))
        found = found or self._by_last_part.get(plain.rpartition("/")[2])
        if found is None:
            at = bisect_left(self._sorted, name)
            found = next(iter(get_close_matches(name, self._sorted[max(0, at - 20) : at + 20], n=1, cutoff=0.8)), None)
        return found


def _plain(name: str) -> str:
    return unquote(name).replace("\\", "/").casefold()


def _stem(name: str) -> str:
    plain = _plain(name)
    stem, _, suffix = plain.rpartition(".")
    return stem if stem and "/" not in suffix else plain


def near_path(path: Path) -> Path | None:
    """The nearest path that is there to one that is not; or None."""
    try:
        folder = next(folder for folder in path.parents if folder.is_dir())
        parts = _plain_parts(path.relative_to(folder))
        found = folder
        for part in parts:
            name = part if (found / part).exists() else _names(found).near(part)
            if name is None:
                name = _names(folder).near(parts[-1])
                return folder / name if name else None
            found /= name
        return found
    except (OSError, ValueError, StopIteration):  # a name that is too long, or has a NUL
        return None


def _plain_parts(path: Path) -> list[str]:
    parts = unquote(str(path)).replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".", "..")]


def _names(folder: Path) -> Names:
    try:
        return _listed(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return Names(())


@lru_cache(maxsize=4)
def _listed(folder: str, changed_ns: int) -> Names:
    with os.scandir(folder) as entries:
        return Names(entry.name for entry in entries)
