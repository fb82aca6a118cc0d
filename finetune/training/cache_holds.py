"""Files of a shared cache that runs which are alive use: nobody deletes them.

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

from modeling.files import atomic_write


class Hold:
    """What this process uses of one cache."""

    def __init__(self, cache: Path):
        self.cache = cache
        self.list = cache / f".{uuid.uuid4().hex}.in-use"
        self.kept: set[Path] = set()
        self._lock = FileLock(self.list.with_suffix(".lock"), thread_local=False)
        self._lock.acquire()

    def keep(self, paths: Iterable[Path]) -> None:
        """Add files, or folders with all that is written into them."""
        self.kept |= set(paths)
        names = sorted(os.fsencode(path.relative_to(self.cache)) for path in self.kept)
        atomic_write(self.list, b"".join(name + b"\n" for name in names))

    def others(self) -> Callable[[Path], bool]:
        """Whether a file is used by another process that is alive. What is left of dead ones is removed."""
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


_holds: dict[Path, Hold] = {}
"""One for each cache, until this process ends."""


@contextmanager
def holding(cache: Path) -> Iterator[Hold]:
    """The hold of this process on a cache; meanwhile no other process chooses files there."""
    with FileLock(cache / ".files.lock"):
        if cache not in _holds or not _holds[cache].list.exists():
            _holds[cache] = Hold(cache)
            _holds[cache].keep(())
        yield _holds[cache]
