"""Work in numbered parts, each an Arrow file that is whole or not there, with a source's statistics of its records."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.data.arrow import ArrowFile, DamagedError
from finetune.data.stats import SourceStats
from finetune.data.team import Team

PART_RECORDS = 512
"""Most records of a part."""

STATS_KEY = b"stats"
"""Of a part's metadata."""

DIALOGUES = "dialogues.arrow"
DIALOGUE_SCHEMA = pa.schema(
    {"record_id": pa.string(), "dialogues": pa.string(), "images": pa.list_(pa.int32()), "opens": pa.bool_()}
)
"""Between the passes of preparing, a record a row. dialogues: a line each, several where a document was cut at an image
that is lost; opens: whether it opens with its images, so that its turns can be moved."""


class Unfinished:
    """Numbered tasks of one share of a team's, without those whose part is there already; counts all."""

    def __init__(self, parts: Path, tasks: Iterable[Any], team: Team, *, schemas: Mapping[str, pa.Schema]):
        self.parts, self.tasks, self.team, self.count = parts, tasks, team, 0
        self.schemas = schemas
        """Suffix of a file of each part -> its columns."""

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(self.tasks):
            self.count = number + 1
            if number % self.team.of == self.team.which and not self._is_whole(part_path(self.parts, number)):
                yield number, task

    def _is_whole(self, part: Path) -> bool:
        """What is damaged is made anew."""
        return part.is_file() and all(
            is_whole(part.with_suffix(suffix), schema) for suffix, schema in self.schemas.items()
        )


def is_whole(path: Path, schema: pa.Schema) -> bool:
    """Whether an Arrow file is there as it was written."""
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
    """The stats in a file's metadata. Raises DamagedError."""
    try:
        return SourceStats.from_json(json.loads(part.schema.metadata[STATS_KEY]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DamagedError(part.path, "no stats") from error
