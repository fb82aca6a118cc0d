"""Run work in numbered parts over several processes. A part is an Arrow file, written atomically, with statistics."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from finetune.data.arrow import ArrowFile, DamagedError
from finetune.data.stats import SourceStats
from finetune.distributed.node_group import NodeGroup
from modeling.errors import UserError

PART_RECORDS = 512
"""Largest number of records in a part."""

STATS_KEY = b"stats"
"""Key of the statistics in a part's metadata."""

DIALOGUES = "dialogues.arrow"
DIALOGUE_SCHEMA = pa.schema(
    {"record_id": pa.string(), "dialogues": pa.string(), "images": pa.list_(pa.int32()), "opens": pa.bool_()}
)
"""The file between the two steps of preparing, one record per row. dialogues: one per line, several where a document
was cut at a lost image; opens: whether the dialogue opens with its images, so that its turns can be moved."""


class Unfinished:
    """The numbered tasks of this node that are not done yet; `count` is the number of tasks of all nodes."""

    def __init__(self, parts: Path, tasks: Iterable[Any], nodes: NodeGroup, *, schemas: Mapping[str, pa.Schema]):
        self.parts, self.tasks, self.nodes, self.count = parts, tasks, nodes, 0
        self.schemas = schemas
        """Suffix of each file of a part -> its schema."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(self.tasks):
            self.count = number + 1
            if number % self.nodes.of != self.nodes.which:
                continue
            part = part_path(self.parts, number)
            files = ((part.with_suffix(suffix), schema) for suffix, schema in self.schemas.items())
            if not (part.is_file() and all(is_whole(file, schema) for file, schema in files)):  # or damaged
                yield number, task


def is_whole(path: Path, schema: pa.Schema) -> bool:
    """Return whether an Arrow file exists and is undamaged."""
    try:
        found = ArrowFile(path).validate(schema)
        if STATS_KEY in (found.schema.metadata or {}):
            stats_of(found)
    except DamagedError:
        return False
    return True


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.arrow"


def stats_text(stats: SourceStats) -> str:
    return json.dumps(stats.partial())


def stats_of(part: ArrowFile) -> SourceStats:
    """Return the statistics in a file's metadata. Raises DamagedError."""
    try:
        return SourceStats.from_json(json.loads(part.schema.metadata[STATS_KEY]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedError(part.path, "no stats") from error


Task = TypeVar("Task")


def run_all(tasks: Iterable[Task], work: Callable[[Task], None], *, workers: int) -> None:
    """Call work(task) for each task; `work` is sent once to each worker. With one task or worker, no process starts.

    Workers are spawned, never forked: the caller may have threads.
    """
    coming = iter(tasks)
    first = list(islice(coming, 2))
    if workers < 2 or len(first) < 2:
        for task in chain(first, coming):
            work(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work,))
    waiting = chain(first, coming)
    try:
        running = {pool.submit(_do, task) for task in islice(waiting, 3 * workers)}  # no more tasks are read ahead
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            running |= {pool.submit(_do, task) for task in islice(waiting, len(finished))}
    except BrokenProcessPool as error:
        raise UserError("a worker process died, most likely out of memory; try fewer: data.workers=1") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], None] | None = None


def _start(work: Callable[[Any], None]) -> None:
    """Initialise a worker: it ignores Ctrl-C, which the parent handles, and uses one thread."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(task: Any) -> None:
    assert _work is not None
    _work(task)
