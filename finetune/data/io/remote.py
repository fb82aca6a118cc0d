"""Remote files, fetched whole into a cache of bounded size when they are first opened.

<cache>/s3/bucket/d/a.jsonl              the place of s3://bucket/d/a.jsonl, see finetune/recipe/urls.py
<cache>/.versions/s3/bucket/d/a.jsonl    the version of it that was fetched, as its storage names it
<cache>/.listings/                       the latest answers of storages
<cache>/.unfinished/                     files that are being fetched
<cache>/.locks/                          locks of these, and of the choice of files that leave

An open file is locked (flock), and stays. Of the others, the least recently opened ones leave when room is needed; they
are fetched again when they are opened again.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from finetune.console import log, parse_size, show_size
from finetune.data.io import object_storage
from finetune.data.io.download import Downloader
from finetune.data.io.object_storage import PAUSES_S, Entry, NothingThereError
from finetune.recipe.urls import CACHE, cache_folder, is_in_storage, is_remote, path_of, shown, url_of
from modeling.atomic_files import open_regular, put_in_place, read_json
from modeling.errors import UserError

CACHE_SIZE = "FINETUNE_REMOTE_CACHE_SIZE"
"""Environment variable: the size of the cache. Only files that are open, or fetched at the same time, can exceed it."""

DEFAULT_SIZE = "50GB"

FILLED = 0.9
"""Share of the cache's size that is left when files leave it, so that not every file that is fetched makes room."""

PROCESSES = 8
"""About how many processes may fetch files at once: each fills its share of the free room, and then looks again."""

LEFTOVER_S = 3600
"""A file half fetched into which nothing was written for so long is one that a killed process left."""

OFFLINE = "FINETUNE_OFFLINE"
"""Environment variable: if set, no storage is asked; what was listed and fetched before is used."""

LARGE = 2**28
"""Number of bytes from which on a file is named when it is fetched, as that takes a while."""

Question = Literal["find", "below", "match"]

_answers: dict[tuple[Question, Path], Mapping[Path, Entry]] = {}
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
        _ask("find", place)
    return _listed[place]


def is_there(place: Path) -> bool:
    """Return whether a storage has something at a place. On the web, nothing is known of what was not asked for."""
    if place not in _listed and not is_in_storage(url_of(place)):
        return False
    try:
        entry_of(place)
    except NothingThereError:
        return False
    return True


def expand_remote(place: Path) -> list[Path]:
    """Return the place itself, or those of all files and folders that a pattern matches, sorted; none if none does.

    A name that exists is not read as a pattern, and on the web none is. Raises UserError as `entry_of`.
    """
    parts = place.relative_to(cache_folder()).parts
    first = next((number for number, part in enumerate(parts) if any(sign in part for sign in "*?[")), None)
    if first is None or not is_in_storage(url_of(place)):
        entry_of(place)
        return [place]
    return [place] if is_there(place) else _not_hidden(_ask("match", place), cache_folder().joinpath(*parts[:first]))


def files_below_remote(folder: Path) -> list[Path]:
    """Return the places of all files below a folder except hidden ones, sorted. Raises UserError as `entry_of`."""
    found = _ask("below", folder)
    return [place for place in _not_hidden(found, folder) if not found[place].is_folder]


def _not_hidden(places: Iterable[Path], folder: Path) -> list[Path]:
    """Return the places below a folder that no name with a dot in front leads to, sorted."""
    names = {place: place.relative_to(folder).parts for place in places}
    return sorted(place for place, parts in names.items() if parts and not any(part[0] == "." for part in parts))


def _ask(question: Question, place: Path) -> Mapping[Path, Entry]:
    """Return what the storage answers: what is at a place, which files are below, or what matches a pattern.

    Answers are kept on disk, too, for processes that cannot ask. Raises UserError as `entry_of`.
    """
    if (question, place) in _answers:
        return _answers[question, place]
    url, cache = url_of(place), cache_folder()
    kept = cache / ".listings" / f"{hashlib.sha256(f'{question} {url}'.encode()).hexdigest()}.json"
    if os.environ.get(OFFLINE):
        stored = read_json(kept)
        if stored is None:
            raise NothingThereError(f"{shown(place)}: {OFFLINE} is set, and it was not listed here before")
        answer = {cache / name: Entry(*values) for name, values in stored.items()}
    else:
        if not is_in_storage(url):
            found = {url: _web(url).find(url)}
        elif question == "find":
            found = {url: object_storage.find(url)}
        else:
            found = object_storage.find_below(url) if question == "below" else object_storage.match(url)
        answer = {path_of(one): entry for one, entry in found.items()}
        stored = {one.relative_to(cache).as_posix(): astuple(entry) for one, entry in answer.items()}
        with _disk_errors(place):
            kept.parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(stored), encoding="utf-8")
            unfinished.replace(kept)
    _answers[question, place] = answer
    for one, entry in answer.items():
        _listed[one] = entry
        if one.is_file() and _version_of(one) != entry.version:
            one.unlink(missing_ok=True)
    return answer


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
    if os.environ.get(OFFLINE):
        raise UserError(f"{shown(place)}: {OFFLINE} is set, and the file is not in {cache_folder()}")
    name = hashlib.sha256(os.fsencode(place)).hexdigest()
    unfinished = cache_folder() / ".unfinished" / name
    with _disk_errors(place), _lock(name[:2]):
        if place.is_file():  # another process was faster
            return
        entry = entry_of(place)
        if entry.is_folder:
            raise UserError(f"{shown(place)}: expected a file, found a folder")
        if entry.size >= LARGE:
            log(f"fetch {shown(place)} ({show_size(entry.size)})")
        _make_room(place, entry.size)
        for path in (place, unfinished, _version_file(place)):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _save(place, entry, unfinished)
            _version_file(place).write_text(entry.version, encoding="utf-8")
            put_in_place(unfinished, place)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        detail = f"cannot be kept in {cache_folder()}: {error.strerror}; {CACHE} names another folder"
        raise UserError(f"{shown(place)}: {detail}, and {CACHE_SIZE} limits its size") from error


def _save(place: Path, entry: Entry, path: Path) -> None:
    """Fetch into a file. Raises UserError: it fails, or the version is not the one that was listed."""
    url = url_of(place)
    saved = object_storage.save(url, path) if is_in_storage(url) else _web(url).save(url, path)
    if saved != entry:
        raise UserError(f"{shown(place)}: expected version {entry.version}, got {saved.version}; it changed meanwhile")


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
                total -= size if _delete_unless_open(path) else 0
    _room[cache] = max(0, limit - total - needed) // PROCESSES


def _cached_files(cache: Path) -> Iterator[tuple[int, Path, int]]:
    """Yield (time of the last use in ns, path, bytes) of each file; those that a killed process left are deleted."""
    for folder, folders, names in os.walk(cache):
        if Path(folder) == cache:
            folders[:] = [name for name in folders if name not in (".listings", ".versions", ".locks")]
        for path in (Path(folder, name) for name in names if name != ".url"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.parent.name == ".unfinished" and time.time() - status.st_mtime > LEFTOVER_S:
                    path.unlink()
                else:
                    yield status.st_atime_ns, path, status.st_size


def _delete_unless_open(path: Path) -> bool:
    """Delete a file of the cache, unless it is open or being fetched. Return whether it is gone."""
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
