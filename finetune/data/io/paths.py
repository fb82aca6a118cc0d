"""Paths and patterns -> the files and folders that they mean; for one that leads to nothing, the nearest name.

Remote files and folders are listed as local ones are; what is found is their places, see finetune/recipe/urls.py.
"""

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from finetune.data.io.remote import entry_of, expand_remote, files_below_remote, is_there
from finetune.recipe.urls import is_in_storage, is_remote, shown, url_of
from modeling.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

ARCHIVES = (".zip", ".tar")
"""Suffixes of archives into which a path of `image_root` may lead."""

NO_FOLDERS = (*ARCHIVES, ".json", ".parquet", ".tgz", ".gz", ".zst")
"""Suffixes by which a remote image root is known to be a file."""

MAX_NAMES = 200_000
"""Largest number of names in a folder or archive in which the nearest name is searched."""


def expand(path: Path, *, into_files: bool = False) -> list[Path]:
    """Return the path itself, or all paths that a pattern matches, sorted: s/*/d.jsonl, s/**/*.jsonl, s/[ab].jsonl.

    A name that exists is not read as a pattern. With `into_files`, what follows a file is a name inside that file.

    Raises UserError: the path leads to nothing, or through a folder that cannot be read, or to no answer.
    """
    if is_remote(path):
        return expand_remote(path) or _none_fits(path)
    found = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor) :]:
        found = list(dict.fromkeys(match for folder in found for match in _matches(folder, part, into_files)))
    if not found:
        raise _missing(path)
    broken = next((match for match in found if match.is_symlink() and not match.exists()), None)
    if broken:
        raise UserError(f"{broken}: a link to {broken.readlink()}, where nothing is")
    return found


def _matches(folder: Path, part: str, into_files: bool) -> list[Path]:
    """Return what one part of a path, a name or a pattern, means in a folder."""
    if os.path.lexists(folder / part) or (into_files and any(outer.is_file() for outer in (folder, *folder.parents))):
        return [folder / part]
    if part == "**":
        return [folder, *sorted(below for below, _ in _folders_below(folder) if below != folder)]
    if not any(sign in part for sign in "*?["):
        return []
    hidden = part.startswith(".")
    return sorted(
        Path(entry.path)
        for entry in _entries(folder)
        if fnmatchcase(entry.name, part) and (hidden or not entry.name.startswith("."))
    )


def _none_fits(pattern: Path) -> NoReturn:
    raise UserError(f"{shown(pattern)}: nothing is there that fits this pattern")


def is_folder(path: Path) -> bool:
    """Return whether a path leads to a folder. Raises UserError: a remote one leads to nothing, or to no answer."""
    return entry_of(path).is_folder if is_remote(path) else path.is_dir()


def exists(path: Path) -> bool:
    """Return whether a path leads to a file or a folder."""
    return is_there(path) if is_remote(path) else path.exists()


def size_of(path: Path) -> int:
    """Return the number of bytes of a file; a remote one is not fetched for that."""
    return entry_of(path).size if is_remote(path) else path.stat().st_size


def is_image_folder(root: Path) -> bool:
    """Return whether an image root is a folder, not a file; of a remote one, its suffix says so."""
    return root.suffix.lower() not in NO_FOLDERS if is_remote(root) else root.is_dir()


def _missing(path: Path) -> UserError:
    if any(sign in str(path) for sign in "*?["):
        _none_fits(path)
    folder = next(folder for folder in path.parents if folder.is_dir())
    if folder != path.parent:
        return UserError(f"{path}: nothing is there: {path.parent} is no folder")
    near = get_close_matches(path.name, sorted(entry.name for entry in _entries(folder)), n=3)
    return UserError(f"{path}: nothing is there" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def folders_of(paths: Iterable[Path]) -> list[Path]:
    """Return the absolute folders that paths lead to, of a file its folder. Raises UserError as `expand`."""
    found = [match.absolute() for path in paths for match in expand(path)]
    return list(dict.fromkeys(match if is_folder(match) else match.parent for match in found))


def locate(path: Path) -> list[tuple[Path, str]]:
    """Return (file or folder, folder inside that file or ".") for each match of a path that may lead into archives.

    images/train2017.zip/train2017 -> (images/train2017.zip, train2017)

    Of remote ones, archives are known by their suffix alone. Raises UserError as `expand`.
    """
    if is_remote(path):
        outer = next((outer for outer in (path, *path.parents) if outer.suffix.lower() in ARCHIVES), path)
        if is_image_folder(outer) and not is_in_storage(url_of(outer)):
            if "?" in url_of(outer):
                raise UserError(f"{shown(outer)}: expected the URL of a folder without a query, or of an archive")
            return [(outer, ".")]  # a folder on the web is known by its files alone
        return [(match, path.relative_to(outer).as_posix()) for match in expand(outer)]
    found = []
    for match in expand(path, into_files=True):
        outer = next((outer for outer in (match, *match.parents) if outer.is_file()), match)
        found.append((outer, match.relative_to(outer).as_posix()))
    return found


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder except hidden ones, sorted.

    A link to a folder outside is followed once; a link to a folder below or above names no new files.
    """
    if is_remote(folder):
        return files_below_remote(folder)
    return sorted(
        Path(entry.path) for _, entries in _folders_below(folder) for entry in entries if not _is(entry, folder=True)
    )


def files_at(path: Path) -> list[Path]:
    """Return the file that a path leads to, or all files below the folder, as `files_below`."""
    return files_below(path) if is_folder(path) else [path]


def _folders_below(folder: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """Yield (folder, its files and folders that are not hidden) for a folder and all folders below it."""
    top = folder.resolve()
    linked: set[Path] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        entries = []
        for entry in _entries(current):
            if entry.name.startswith("."):
                continue
            if not _is(entry, folder=True):
                entries += [entry] if _is(entry, folder=False) else []
                continue
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                seen = any(target.is_relative_to(each) for each in linked)
                if seen or target.is_relative_to(top) or top.is_relative_to(target):
                    continue
                linked.add(target)
            entries.append(entry)
            waiting.append(Path(entry.path))
        yield current, entries


def _is(entry: os.DirEntry[str], *, folder: bool) -> bool:
    try:
        return entry.is_dir() if folder else entry.is_file()
    except OSError:  # a loop of links
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: a folder that cannot be read: {error.strerror}") from error


class Names:
    """The names in a folder or archive, searched for one that is spelled a little differently."""

    def __init__(self, names: Iterable[str]):
        found = list(islice(filter(str.isprintable, names), MAX_NAMES + 1))
        self._sorted = sorted(found) if len(found) <= MAX_NAMES else []
        self._alike = {_plain(name): name for name in reversed(self._sorted)}
        self._without_suffix = {_stem(name): name for name in reversed(self._sorted)}
        self._by_last_part = {_plain(name).rpartition("/")[2]: name for name in reversed(self._sorted)}

    def near(self, name: str) -> str | None:
        """Return the name that differs only in case, escapes, backslashes, suffix, folder or a few letters, or None."""
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
    """Return the existing path that is nearest to one that does not exist, or None."""
    try:
        folder = next(folder for folder in path.parents if folder.is_dir())
        rest = unquote(str(path.relative_to(folder))).replace("\\", "/").split("/")
        parts = [part for part in rest if part not in ("", ".", "..")]
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


def _names(folder: Path) -> Names:
    try:
        return _names_at(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return Names(())


@lru_cache(maxsize=4)
def _names_at(folder: str, changed_ns: int) -> Names:
    """Return a folder's names; they are listed again only if its modification time changes."""
    with os.scandir(folder) as entries:
        return Names(entry.name for entry in entries)
