"""Paths and patterns -> the files and folders that they mean."""

import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from modeling.errors import UserError


def expand(path: Path, *, into_files: bool = False) -> list[Path]:
    """The path itself, or all that a pattern fits, sorted: s/*/d.jsonl, s/**/*.jsonl, s/[ab].jsonl.

    A name that is there is no pattern. `into_files`: what follows a file is the name of something inside of it.

    Raises UserError: nothing is there, or a folder that cannot be read.
    """
    places = [Path(path.anchor)]
    for part in path.parts[bool(path.anchor) :]:
        places = list(dict.fromkeys(found for place in places for found in _step(place, part, into_files)))
    if not places:
        raise _missing(path)
    lost = next((place for place in places if place.is_symlink() and not place.exists()), None)
    if lost:
        raise UserError(f"{lost}: a link to {lost.readlink()}, where nothing is")
    return places


def _step(place: Path, part: str, into_files: bool) -> list[Path]:
    if os.path.lexists(place / part) or (into_files and any(outer.is_file() for outer in (place, *place.parents))):
        return [place / part]
    if part == "**":
        return [place, *sorted(folder for folder, _ in _folders_below(place) if folder != place)]
    if not any(sign in part for sign in "*?["):
        return []
    hidden = part.startswith(".")
    return sorted(
        Path(entry.path)
        for entry in _entries(place)
        if fnmatchcase(entry.name, part) and (hidden or not entry.name.startswith("."))
    )


def folders_of(paths: Iterable[Path]) -> list[Path]:
    """The folders that paths lead to, or whose files they lead to, absolute. Raises UserError: nothing is there."""
    places = [place.absolute() for path in paths for place in expand(path)]
    return list(dict.fromkeys(place if place.is_dir() else place.parent for place in places))


def locate(path: Path) -> list[tuple[Path, str]]:
    """(file or folder, "." or the folder meant inside of that file) for each place that a path means.

    images/train2017.zip/train2017 -> (images/train2017.zip, train2017)

    Raises UserError: nothing is there.
    """
    found = []
    for place in expand(path, into_files=True):
        outer = next((outer for outer in (place, *place.parents) if outer.is_file()), place)
        found.append((outer, place.relative_to(outer).as_posix()))
    return found


def files_below(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, sorted.

    A link to a folder elsewhere is followed, once; one to a folder below or above names nothing new.
    """
    return sorted(
        Path(entry.path) for _, entries in _folders_below(folder) for entry in entries if not _is(entry, folder=True)
    )


def _folders_below(folder: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """(folder, its entries that are files or folders and not hidden) for a folder and those below it."""
    top = folder.resolve()
    linked: set[Path] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        entries = []
        for entry in _entries(place):
            if entry.name.startswith("."):
                continue
            if not _is(entry, folder=True):
                entries += [entry] if _is(entry, folder=False) else []
                continue
            if entry.is_symlink():
                target = Path(entry.path).resolve()
                if target.is_relative_to(top) or top.is_relative_to(target) or _inside(target, linked):
                    continue
                linked.add(target)
            entries.append(entry)
            waiting.append(Path(entry.path))
        yield place, entries


def _inside(place: Path, folders: set[Path]) -> bool:
    return any(place.is_relative_to(each) for each in folders)


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


def _missing(path: Path) -> UserError:
    if any(sign in str(path) for sign in "*?["):
        return UserError(f"{path}: nothing is there that fits this pattern")
    folder = next(folder for folder in path.parents if folder.is_dir())
    if folder != path.parent:
        return UserError(f"{path}: nothing is there: {path.parent} is no folder")
    near = get_close_matches(path.name, sorted(entry.name for entry in _entries(folder)), n=3)
    return UserError(f"{path}: nothing is there" + (f"; did you mean {' or '.join(near)}?" if near else ""))
