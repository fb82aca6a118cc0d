"""Files of a shared cache that live runs use: no other run deletes them.

<cache>/.<run>.in-use    the files, or whole folders, that a run uses, one a line, relative to the cache
<cache>/.<run>.lock      locked by the run's main process for as long as it lives, however it ends
<cache>/.files.lock      locked while files are chosen: to be used, or to be deleted
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from modeling.atomic_files import atomic_write


class FilesInUse:
    """What this process uses of one cache."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.list = cache / f".{uuid.uuid4().hex}.in-use"
        self.paths: set[Path] = set()
        self._lock = FileLock(self.list.with_suffix(".lock"), thread_local=False)
        self._lock.acquire()

    def add(self, paths: Iterable[Path]) -> None:
        """Add files, or folders with all that is written into them."""
        self.paths |= set(paths)
        names = sorted(os.fsencode(path.relative_to(self.cache)) for path in self.paths)
        atomic_write(self.list, b"".join(name + b"\n" for name in names))

    def of_others(self) -> Callable[[Path], bool]:
        """Return whether another live process uses a file, as a function. The lists of dead processes are removed."""
        used: set[Path] = set()
        for path in self.cache.glob(".*.in-use"):
            if path == self.list:
                continue
            try:
                with FileLock(path.with_suffix(".lock"), timeout=0):
                    path.unlink()
                path.with_suffix(".lock").unlink(missing_ok=True)
            except Timeout:
                used |= {self.cache / os.fsdecode(name) for name in path.read_bytes().splitlines()}
        return lambda path: path in used or path.parent in used


_of_this_process: dict[Path, FilesInUse] = {}
"""One for each cache, until this process ends."""


@contextmanager
def choosing_files(cache: Path) -> Iterator[FilesInUse]:
    """Yield what this process uses of a cache; meanwhile no other process chooses files there."""
    with FileLock(cache / ".files.lock"):
        if cache not in _of_this_process or not _of_this_process[cache].list.exists():
            _of_this_process[cache] = FilesInUse(cache)
            _of_this_process[cache].add(())
        yield _of_this_process[cache]
