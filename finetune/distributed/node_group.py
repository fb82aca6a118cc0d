"""Machines that prepare data together: which parts are whose, and when all have done theirs. Needs no torch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Item = TypeVar("Item")


class NodeGroup:
    """A single process, which is the whole group. `collectives.nodes` has the group of several machines.

    All processes of a group come to the same steps in the same order.
    """

    def __init__(self, which: int | None = 0, of: int = 1):
        self.which, self.of = which, of
        """This process does share `which` of `of`; the main one does the first. None: it takes no part, but waits."""

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's items: every n-th of all, for n processes that take part."""
        return items[self.which or 0 :: self.of]

    def on_main(self, step: str, work: Callable[[], Item]) -> Item:
        """Return what `work` returns in the main process, on every process."""
        return work()

    def each(self, step: str, work: Callable[[], Item]) -> list[Item]:
        """Call `work` in every process that takes part; return what each returned, the main one's first."""
        return [work()]

    def lock(self, path: Path) -> AbstractContextManager[object]:
        """Return a lock that keeps other groups out; the main process holds it for all."""
        return FileLock(path) if self.which == 0 else nullcontext()


ALONE = NodeGroup()
