"""Remote files, fetched whole into a cache of bounded size when they are first opened.

<cache>/s3/bucket/d/a.jsonl              the place of s3://bucket/d/a.jsonl, see finetune/recipe/urls.py
<cache>/.versions/s3/bucket/d/a.jsonl    the version of it that was fetched, as its storage names it
<cache>/.unfinished/                     files that are being fetched
<cache>/.locks/                          locks of these, and of the choice of files that leave

An open file is locked (flock), and stays. Of the others, the least recently opened ones leave when room is needed; they
are fetched again when they are opened again.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune.console import parse_size, show_size
from finetune.data.io import object_storage
from finetune.data.io.download import Downloader
from finetune.data.io.object_storage import PAUSES_S, Entry
from finetune.recipe.urls import CACHE, cache_folder, is_in_storage, is_remote, path_of, shown, url_of
from modeling.atomic_files import open_regular, put_in_place
from modeling.errors import UserError

CACHE_SIZE = "FINETUNE_REMOTE_CACHE_SIZE"
"""Environment variable: the largest size of the cache."""

DEFAULT_SIZE = "50GB"

FILLED = 0.9
"""Share of the cache's size that is left when files leave it, so that not every file that is fetched makes room."""

PROCESSES = 8
"""About how many processes may fetch files at once: each fills its share of the free room, and then looks again."""

LEFTOVER_S = 3600
"""A file half fetched into which nothing was written for so long is one that a killed process left."""

_listed: dict[Path, Entry] = {}
"""What this process knows of remote files and folders: it asks once, and sees one version to its end."""


def open_local(path: Path) -> BufferedReader:
    """Open a file to read its bytes, a remote one after fetching it.

    Raises OSError: a local path does not exist, or is not a regular file. Raises UserError: a remote file cannot be
    fetched, or is larger than the cache.
    """
    if not is_remote(path):
        return open_regular(path)
    while True:
        _fetch(path)
        with suppress(FileNotFoundError):  # it has left between the two
            file = open_regular(path)
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            return file


def entry_of(place: Path) -> Entry:
    """Return what is at a remote path. Raises UserError: nothing, no permission, no connection."""
    if place not in _listed:
        url = url_of(place)
        _remember({place: object_storage.find(url) if is_in_storage(url) else _web(url).find(url)})
    return _listed[place]


def is_there(place: Path) -> bool:
    """Return whether a storage has something at a place. On the web, nothing is known of what was not asked for."""
    try:
        return place in _listed or (is_in_storage(url_of(place)) and entry_of(place) is not None)
    except object_storage.NothingThereError:
        return False


def expand_remote(place: Path) -> list[Path]:
    """Return the place itself, or those of all files and folders that a pattern matches, sorted; none if none does.

    A name that exists is not read as a pattern, and on the web none is. Raises UserError as `entry_of`.
    """
    url = url_of(place)
    fixed = place
    while any(sign in fixed.name for sign in "*?["):
        fixed = fixed.parent
    if fixed != place and is_in_storage(url):
        with suppress(object_storage.NothingThereError):
            _remember({place: object_storage.find(url)})
            return [place]
        return _places(object_storage.match(url), below=fixed)
    entry_of(place)
    return [place]


def files_below_remote(folder: Path) -> list[Path]:
    """Return the places of all files below a folder except hidden ones, sorted. Raises UserError as `entry_of`."""
    found = _places(object_storage.find_below(url_of(folder)), below=folder)
    return [place for place in found if not _listed[place].is_folder]


def _places(entries: Mapping[str, Entry], *, below: Path) -> list[Path]:
    """Keep in mind what was listed. Return the places below a folder, sorted, except hidden ones."""
    listed = {path_of(url): entry for url, entry in entries.items()}
    _remember(listed)
    names = {place: place.relative_to(below).parts for place in listed}
    return sorted(place for place, parts in names.items() if parts and not any(part[0] == "." for part in parts))


def _remember(entries: Mapping[Path, Entry]) -> None:
    """Keep entries in mind, and drop what was fetched of other versions."""
    for place, entry in entries.items():
        _listed[place] = entry
        if place.is_file() and _version_of(place) != entry.version:
            place.unlink(missing_ok=True)


def _version_of(place: Path) -> str | None:
    """Return the version of the file that was fetched, None if that is not known."""
    try:
        return _version_file(place).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _version_file(place: Path) -> Path:
    return cache_folder() / ".versions" / place.relative_to(cache_folder())


def _fetch(place: Path) -> None:
    """Bring a remote file to its place, unless it is there. Raises UserError."""
    if place.is_file():
        return
    name = hashlib.sha256(os.fsencode(place)).hexdigest()
    unfinished = cache_folder() / ".unfinished" / name
    try:
        with _lock(name[:2]):
            if place.is_file():  # another process was faster
                return
            entry = entry_of(place)
            if entry.is_folder:
                raise UserError(f"{shown(place)}: expected a file, found a folder")
            _make_room(place, entry.size)
            for path in (place, unfinished, _version_file(place)):
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _save(place, entry, unfinished)
                _version_file(place).write_text(entry.version, encoding="utf-8")
                put_in_place(unfinished, place)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        detail = f"cannot be kept in {cache_folder()}: {error.strerror}; {CACHE} names another folder"
        raise UserError(f"{shown(place)}: {detail}") from error


def _save(place: Path, entry: Entry, path: Path) -> None:
    url = url_of(place)
    if is_in_storage(url):
        object_storage.save(url, path)
    else:
        _web(url).save(url, path)
    size = path.stat().st_size
    if entry.size and size != entry.size:
        raise UserError(f"{shown(place)}: got {size:,} bytes, expected {entry.size:,}; did it change meanwhile?")


def _web(url: str) -> Downloader:
    """Return a downloader for data files, each of which may be as large as the cache."""
    options: dict[str, Any] = {"timeout_s": 24 * 3600, "idle_s": 60, "pauses_s": PAUSES_S}
    return Downloader(cache_folder(), http=url.startswith("http:"), max_bytes=_cache_size(), **options)


_room: dict[Path, int] = {}
"""Cache -> number of bytes that this process writes into it before it looks again whether files have to leave."""


def _make_room(place: Path, needed: int) -> None:
    """Delete the least recently opened files until one of `needed` bytes fits. Raises UserError: it never will."""
    cache, limit = cache_folder(), _cache_size()
    if needed > limit:
        detail = f"{show_size(needed)}, and the cache of remote files may hold {show_size(limit)}"
        raise UserError(f"{shown(place)}: {detail}; set {CACHE_SIZE}")
    if needed <= _room.get(cache, 0):
        _room[cache] -= needed
        return
    with _lock("room"):
        files = sorted(_cached_files(cache))
        total = sum(size for _, _, size in files)
        if total + needed > limit:
            for _, path, size in files:
                if total + needed <= FILLED * limit:
                    break
                total -= size if _leaves(path) else 0
    _room[cache] = max(0, limit - total - needed) // PROCESSES


def _cached_files(cache: Path) -> Iterator[tuple[int, Path, int]]:
    """Yield (time of the last use in ns, path, bytes) of each file; those that a killed process left are deleted."""
    for folder, folders, names in os.walk(cache):
        if Path(folder) == cache:
            folders[:] = [name for name in folders if name not in (".versions", ".locks")]
        for path in (Path(folder, name) for name in names if name != ".url"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.parent.name == ".unfinished" and time.time() - status.st_mtime > LEFTOVER_S:
                    path.unlink()
                else:
                    yield status.st_atime_ns, path, status.st_size


def _leaves(path: Path) -> bool:
    """Delete a file of the cache unless it is in use. Return whether it is gone."""
    if path.parent.name == ".unfinished":
        return False
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    _version_file(path).unlink(missing_ok=True)
    return True


def _cache_size() -> int:
    return parse_size(CACHE_SIZE, os.environ.get(CACHE_SIZE) or DEFAULT_SIZE)


def _lock(name: str) -> FileLock:
    folder = cache_folder() / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name)
