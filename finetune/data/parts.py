"""Work in numbered parts, each an Arrow file that is whole or not there, with an account of its records."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from finetune.data.account import Account
from finetune.data.arrow import ArrowFile
from finetune.data.team import Team

PART_RECORDS = 512
"""Most records of a part."""

DIALOGUES = "dialogues.arrow"
DIALOGUE_SCHEMA = pa.schema(
    {"place": pa.string(), "dialogues": pa.string(), "images": pa.list_(pa.int32()), "opens": pa.bool_()}
)
"""Between the passes of preparing, a record a row. dialogues: a line each, several where a document was cut at an image
that is lost; opens: whether it opens with its images, so that its turns can be moved."""


class Unfinished:
    """Numbered tasks of one share of a team's, without those whose part is there already; counts all."""

    def __init__(self, parts: Path, tasks: Iterable[Any], team: Team):
        self.parts, self.tasks, self.team, self.count = parts, tasks, team, 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(self.tasks):
            self.count = number + 1
            if number % self.team.of == self.team.which and not part_path(self.parts, number).is_file():
                yield number, task


def part_path(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.arrow"


def account_text(account: Account) -> str:
    return json.dumps(account.partial())


def account_of(part: ArrowFile) -> Account:
    return Account.from_json(json.loads(part.schema.metadata[b"account"]))
