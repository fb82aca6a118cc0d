"""Questions about one image, from records wherever they are in a source, joined into dialogues: the second pass.

The first pass, `prepare_shards`, has left the dialogues of all records, and digests of their images.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from finetune.console import Track
from finetune.data.arrow import ArrowFile, to_batches, write_arrow
from finetune.data.chunking import Outcomes, Splitter
from finetune.data.conversation import Dialogue, Image
from finetune.data.prepare_shards import DIALOGUES
from finetune.data.prepared import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    IMAGES,
    dialogue_from_json,
    example_metadata,
    example_row,
    image_from_row,
    is_undamaged,
    stats_in,
)
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Example
from finetune.data.worker_pool import run_all
from finetune.distributed.node_group import NodeGroup
from finetune.recipe.schema import Source

JOINED = "joined"
"""Folder of the parts of a set's examples, until all are written."""

PART_DIALOGUES = 2048
"""Approximate number of dialogues in a part."""


def join_questions(
    source: Source, work: Path, splitter: Splitter, *, workers: int, track: Track, nodes: NodeGroup
) -> None:
    """Turn the dialogues in `work` into examples; nodes divide the parts. The dialogues stay until all is done."""
    parts = work / JOINED

    def share() -> int:
        count = len(_Groups(ArrowFile(work / DIALOGUES), PART_DIALOGUES))
        mine = nodes.share(range(count))
        tasks = [number for number in mine if not is_undamaged(_part_of(parts, number), EXAMPLE_SCHEMA, stats=True)]
        for _ in track(
            run_all(tasks, _Join(work, parts, splitter, PART_DIALOGUES), workers=workers), f"tokenise {source.label}"
        ):
            pass
        return count

    def finish() -> None:
        paths = [_part_of(parts, number) for number in range(count)]
        stats = stats_in(ArrowFile(work / DIALOGUES))
        for path in paths:
            stats.add(stats_in(ArrowFile(path)))
        batches = (batch for path in paths for batch in ArrowFile(path).batches)
        write_arrow(work / EXAMPLES, EXAMPLE_SCHEMA, batches, **example_metadata(splitter.encoder, stats))
        shutil.rmtree(parts)

    nodes.on_main("make room for parts", lambda: parts.mkdir(exist_ok=True))
    count = nodes.each(f"tokenise {source.label}", share)[0]
    nodes.on_main(f"join {source.label}", finish)


def _part_of(parts: Path, number: int) -> Path:
    return parts / f"{number:06}.arrow"


class _Groups:
    """Groups of dialogues (rows of dialogues.arrow) that are joined, in parts of about `size` dialogues.

    A group holds the dialogues that open with the same images; any other dialogue is a group of its own. Groups are
    sorted by their first dialogue.
    """

    def __init__(self, dialogues: ArrowFile, size: int):
        keys = _opening_keys(dialogues)
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        self.rows = np.lexsort((np.arange(len(keys)), first[group]))  # by the group's first row, then by row
        sizes = np.bincount(group, minlength=len(first))[np.argsort(first)]
        self.starts = np.cumsum([0, *sizes])
        steps = np.arange(0, len(dialogues) + size, size)
        self.cuts = np.unique(np.searchsorted(self.starts, steps).clip(max=len(sizes)))

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __getitem__(self, part: int) -> tuple[int, list[list[int]]]:
        """Return (number of the first group, groups) of a part."""
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
class _Join:
    """Writes the examples of one part, some groups of dialogues."""

    work: Path
    parts: Path
    splitter: Splitter
    size: int
    """Approximate number of dialogues in a part."""

    @cached_property
    def _dialogues(self) -> ArrowFile:
        return ArrowFile(self.work / DIALOGUES)

    @cached_property
    def _images(self) -> ArrowFile:
        return ArrowFile(self.work / IMAGES)

    @cached_property
    def _groups(self) -> _Groups:
        return _Groups(self._dialogues, self.size)

    def __call__(self, number: int) -> Iterator[int]:
        """Write part `number`; yield the number of its dialogues."""
        first, groups = self._groups[number]
        stats = SourceStats("")
        numbers: dict[Image, int] = {}
        pieces = [
            piece
            for group_number, group in enumerate(groups, start=first)
            for piece in self.splitter.arrange(self._read(group, numbers), number=group_number)
        ]
        outcomes, rows = Outcomes(stats), []
        for piece, example in self.splitter.fit(pieces, same=numbers.__getitem__):
            outcomes.take(piece, example)
            if isinstance(example, Example):
                shown = [numbers[image] for image in piece.dialogue.images]
                record_id = self._dialogues.text("record_id", piece.origins[0])
                rows.append(example_row(piece.dialogue, example, shown, self._digest, record_id))
        outcomes.count({row: self._dialogues.text("record_id", row) for group in groups for row in group})
        metadata = example_metadata(self.splitter.encoder, stats)
        write_arrow(_part_of(self.parts, number), EXAMPLE_SCHEMA, to_batches(rows, EXAMPLE_SCHEMA), **metadata)
        yield sum(map(len, groups))

    def _digest(self, image: int) -> bytes:
        return self._images.row(image)["digest"]

    def _read(self, group: list[int], numbers: dict[Image, int]) -> list[tuple[int, Dialogue]]:
        """Return (row, dialogue) of every dialogue in these rows; adds the number of each image to `numbers`."""
        dialogues = []
        for row in group:
            shown = self._dialogues.cell("images", row).tolist()
            images = [image_from_row(self._images.row(image), self.work) for image in shown]
            numbers.update(zip(images, shown, strict=True))
            coming = iter(images)
            lines = self._dialogues.text("dialogues", row).split("\n")
            dialogues += [(row, dialogue_from_json(line, coming)) for line in lines]
        return dialogues
