"""Step 2 of preparing: dialogues -> examples. Questions about one image are joined, long dialogues are divided."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import Track
from finetune.data.arrow import ArrowFile, to_batches, write_arrow
from finetune.data.chunking import Outcomes, Piece, Splitter, by_last_appearance
from finetune.data.conversation import Dialogue, Image
from finetune.data.parallel_parts import (
    DIALOGUES,
    PART_RECORDS,
    Unfinished,
    part_path,
    run_all,
    stats_of,
    stats_text,
)
from finetune.data.prepared import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    IMAGES,
    STATS,
    dialogue_from_json,
    dialogue_to_json,
    image_from_row,
)
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Example
from finetune.distributed.node_group import NodeGroup
from finetune.recipe.schema import Source
from modeling.atomic_files import flush, write_json
from modeling.tokens import IGNORED, IMAGE


def assemble(
    source: Source,
    made: Path,
    splitter: Splitter,
    stats: SourceStats,
    *,
    workers: int,
    track: Track,
    nodes: NodeGroup,
) -> None:
    """Turn dialogues.arrow into examples.arrow and stats.json."""
    parts = made / "assemble"

    def share() -> int:
        groups = _Groups(ArrowFile(made / DIALOGUES), join=source.turns is not None)
        tasks = Unfinished(parts, track(groups, f"tokenise {source.label}"), nodes, schemas={".arrow": EXAMPLE_SCHEMA})
        run_all(tasks, _Assemble(made, splitter), workers=workers)
        return tasks.count

    nodes.on_main("make room for parts", lambda: parts.mkdir(exist_ok=True))
    count = nodes.each(f"tokenise {source.label}", share)[0]
    nodes.on_main(f"finish {source.label}", lambda: _finish(made, parts, count, splitter, stats))


def _finish(made: Path, parts: Path, count: int, splitter: Splitter, stats: SourceStats) -> None:
    """Combine all parts into examples.arrow and stats.json."""
    paths = [part_path(parts, number) for number in range(count)]
    for path in paths:
        stats.add(stats_of(ArrowFile(path)))
    batches = (batch for path in paths for batch in ArrowFile(path).batches)
    write_arrow(made / EXAMPLES, EXAMPLE_SCHEMA, batches, image_token=str(splitter.encoder.specials[IMAGE]))
    stats.images = len(np.unique(ArrowFile(made / EXAMPLES).values("images")))
    flush(made.parent)
    write_json(made / STATS, stats.to_json())
    shutil.rmtree(parts)
    (made / DIALOGUES).unlink()


class _Groups(Sequence[Any]):
    """Groups of dialogues (rows of dialogues.arrow) that are joined, in parts of about PART_RECORDS dialogues.

    A group holds the dialogues that open with the same images; any other dialogue is a group of its own. Groups are
    sorted by their first dialogue.
    """

    def __init__(self, dialogues: ArrowFile, *, join: bool):
        keys = _opening_keys(dialogues) if join else np.arange(len(dialogues))
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        self.rows = np.lexsort((np.arange(len(keys)), first[group]))  # by the group's first row, then by row
        sizes = np.bincount(group, minlength=len(first))[np.argsort(first)]
        self.starts = np.cumsum([0, *sizes])
        steps = np.arange(0, len(dialogues) + PART_RECORDS, PART_RECORDS)
        self.cuts = np.unique(np.searchsorted(self.starts, steps).clip(max=len(sizes)))

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, part: Any) -> tuple[int, list[list[int]]]:
        """Return (number of the first group, groups) of a part."""
        if not 0 <= part < len(self):
            raise IndexError(part)
        first, last = int(self.cuts[part]), int(self.cuts[part + 1])
        bounds = self.starts[first : last + 1]
        return first, [self.rows[start:stop].tolist() for start, stop in pairwise(bounds)]


def _opening_keys(dialogues: ArrowFile) -> np.ndarray:
    """Return int64 [dialogues]: equal keys where dialogues open with the same images, unique keys for the others."""
    counts, opens = dialogues.lengths("images"), dialogues.values("opens").astype(bool)
    keys = -1 - np.arange(len(dialogues))
    ends = np.cumsum(counts)
    shown = dialogues.values("images")
    single = opens & (counts == 1)
    keys[single] = shown[ends[single] - 1]
    several: dict[tuple[int, ...], int] = {}
    for row in np.flatnonzero(opens & (counts > 1)):
        images = tuple(shown[ends[row] - counts[row] : ends[row]].tolist())
        keys[row] = len(shown) + several.setdefault(images, len(several))
    return keys


@dataclass(frozen=True)
class _Assemble:
    """Writes the examples of one part, a list of groups of dialogues."""

    made: Path
    splitter: Splitter

    @cached_property
    def _dialogues(self) -> ArrowFile:
        return ArrowFile(self.made / DIALOGUES)

    @cached_property
    def _images(self) -> ArrowFile:
        return ArrowFile(self.made / IMAGES)

    def __call__(self, task: tuple[int, tuple[int, list[list[int]]]]) -> None:
        number, (first, groups) = task
        stats = SourceStats("")
        numbers: dict[Image, int] = {}
        pieces = [
            piece
            for record_id, group in enumerate(groups, start=first)
            for piece in self.splitter.arrange(self._read(group, numbers), number=record_id)
        ]
        outcomes, rows = Outcomes(stats), []
        for piece, example in self.splitter.fit(pieces, same=numbers.__getitem__):
            outcomes.take(piece, example)
            if isinstance(example, Example):
                rows.append(self._row(piece, example, [numbers[image] for image in piece.dialogue.images]))
        outcomes.count({row: self._dialogues.text("record_id", row) for group in groups for row in group})
        part = part_path(self.made / "assemble", number)
        write_arrow(part, EXAMPLE_SCHEMA, to_batches(rows, EXAMPLE_SCHEMA), stats=stats_text(stats))

    def _read(self, group: list[int], numbers: dict[Image, int]) -> list[tuple[int, Dialogue]]:
        """Return (row, dialogue) of every dialogue in these rows; adds the number of each image to `numbers`."""
        dialogues = []
        for row in group:
            shown = self._dialogues.cell("images", row).tolist()
            images = [image_from_row(self._images.row(image), self.made) for image in shown]
            numbers.update(zip(images, shown, strict=True))
            coming = iter(images)
            lines = self._dialogues.text("dialogues", row).split("\n")
            dialogues += [(row, dialogue_from_json(line, coming)) for line in lines]
        return dialogues

    def _row(self, piece: Piece, example: Example, images: list[int]) -> dict[str, Any]:
        questions, shown = [], 0
        for turn in piece.dialogue.turns:
            shown += len(turn.images)
            if turn.role == "user":  # by last appearance: the same whether its dialogue was divided before it or not
                digests = [self._images.row(image)["digest"] for image in by_last_appearance(images[:shown])]
                questions.append(question_key(digests, turn.text))
        return {
            "input_ids": example.input_ids,
            "supervised": example.labels != IGNORED,
            "images": images,
            "shown": len(set(images)),
            "questions": questions,
            "record_id": self._dialogues.text("record_id", piece.origins[0]),
            "dialogue": dialogue_to_json(piece.dialogue),
        }


def question_key(images: Iterable[bytes], question: str) -> int:
    """Return a 64-bit key: equal for equal questions (ignoring case and spacing) about images with equal digests."""
    words = " ".join(question.lower().split())
    content = b"".join(images) + words.encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
