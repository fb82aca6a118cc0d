"""Processes that prepare data together: which parts are whose, and when all have done theirs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Item = TypeVar("Item")


class NodeGroup:
    """One process, which is the whole team. Of several, all come to the same steps in the same order."""

    def __init__(self, which: int | None = 0, of: int = 1):
        self.which, self.of = which, of
        """Which of `of` shares is this process's; the first is the main one's. None: it takes no part, but waits."""

    def on_main(self, step: str, work: Callable[[], Item]) -> Item:
        """What the main process makes of `work`, on every one."""
        return work()

    def each(self, step: str, work: Callable[[], Item]) -> list[Item]:
        """`work` in every process that takes part; what each made of it, the main one's first."""
        return [work()]

    def lock(self, path: Path) -> AbstractContextManager[object]:
        """Keeps other teams out; the main process holds it for all."""
        return FileLock(path) if self.which == 0 else nullcontext()


ALONE = NodeGroup()
