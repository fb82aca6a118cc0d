"""Step 1 of preparing: records -> dialogues. Every image is opened once, and identified by its content."""

import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import pyarrow as pa

from finetune.console import Track
from finetune.data.arrow import ArrowFile, to_batches, write_arrow
from finetune.data.chunking import opening_images
from finetune.data.conversation import Dialogue, Image, RecordError, Remote, Slice
from finetune.data.images import MAX_BYTES, digest, encoded, open_image
from finetune.data.io.byte_streams import Record
from finetune.data.io.download import Downloader
from finetune.data.io.image_roots import ImageRoot
from finetune.data.parallel_parts import (
    DIALOGUE_SCHEMA,
    DIALOGUES,
    PART_RECORDS,
    Unfinished,
    is_whole,
    part_path,
    run_all,
    stats_of,
    stats_text,
)
from finetune.data.prepared import IMAGE_SCHEMA, IMAGES, dialogue_to_json, image_row
from finetune.data.read_dialogues import open_and_count, taken, try_dialogue
from finetune.data.stale_images import FILE_SCHEMA, FILES, File, file_digest, file_now
from finetune.data.stats import SourceStats
from finetune.distributed.node_group import NodeGroup
from finetune.recipe.schema import Source
from modeling.atomic_files import flush

PART_BYTES = 16_000_000
"""Approximate number of bytes of records in one part."""

PART_SCHEMAS = {".images": IMAGE_SCHEMA, ".files": FILE_SCHEMA, ".arrow": DIALOGUE_SCHEMA}
"""Suffix of each file of a part -> its schema, in the order in which the files are written."""


def convert(
    source: Source, made: Path, *, seed: int, downloads: Path, workers: int, track: Track, nodes: NodeGroup
) -> SourceStats:
    """Turn records into dialogues.arrow and images.arrow. Return the statistics so far: read, not converted, broken.

    Every node reads all records, and converts only those of its own parts.
    """
    parts = made / "convert"

    def share() -> tuple[int, SourceStats]:
        whole = SourceStats(source.name)
        records = track(taken(source, whole), f"convert {source.label}")
        tasks = Unfinished(parts, _in_parts(records), nodes, schemas=PART_SCHEMAS)
        run_all(tasks, _Convert(source, seed, made, downloads), workers=workers)
        return tasks.count, whole

    written = {DIALOGUES: DIALOGUE_SCHEMA, IMAGES: IMAGE_SCHEMA, FILES: FILE_SCHEMA}
    if not nodes.on_main(
        "look for dialogues", lambda: all(is_whole(made / name, schema) for name, schema in written.items())
    ):
        nodes.on_main("make room for parts", lambda: parts.mkdir(parents=True, exist_ok=True))
        count, whole = nodes.each(f"convert {source.label}", share)[0]
        nodes.on_main(f"join {source.label}", lambda: _merge_converted(made, count, whole))
    return nodes.on_main("read the stats", lambda: stats_of(ArrowFile(made / DIALOGUES)))


def _in_parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield parts of consecutive records; where a part ends depends on the records alone."""
    part: list[Record] = []
    size = 0
    for record in records:
        part.append(record)
        size += _bytes_of(record[1])
        if len(part) == PART_RECORDS or size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _bytes_of(value: object) -> int:
    """Return about how much memory the texts and bytes of a record take."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, list) else 8


@dataclass(frozen=True)
class _Convert:
    """Writes the dialogues and the images of one part, a list of records."""

    source: Source
    seed: int
    made: Path
    downloads: Path

    @cached_property
    def _root(self) -> ImageRoot:
        return ImageRoot(self.source)

    @cached_property
    def _seen(self) -> OrderedDict[Image, tuple[File, bytes | None, bytes | RecordError]]:
        """Cache of results for the most recent images: neighbouring records often show the same image."""
        return OrderedDict()

    def __call__(self, task: tuple[int, list[Record]]) -> None:
        number, records = task
        stats = SourceStats(self.source.name)
        dialogues = [
            (record_id, try_dialogue(record_id, record, self._root, self.seed)) for record_id, record in records
        ]
        converted = [dialogue for _, dialogue in dialogues if isinstance(dialogue, Dialogue)]
        shown = [image.source for dialogue in converted for image in dialogue.images]
        urls = sorted({source.url for source in shown if isinstance(source, Remote)})
        fetched: dict[str, Path | RecordError] = {}
        if urls:
            fetched = Downloader(self.downloads, http=self.source.download == "http").fetch_all(urls)
        images = _PartImages(self.made, number)
        rows = []
        for record_id, dialogue in dialogues:
            opened = open_and_count(record_id, dialogue, lambda image: self._find(image, images, fetched), stats)
            if opened:
                numbers = [images.add(*located) for located in opened.images]
                opens = opening_images(opened.dialogues[0]) is not None
                lines = "\n".join(map(dialogue_to_json, opened.dialogues))
                rows.append({"record_id": record_id, "dialogues": lines, "images": numbers, "opens": opens})
        stats.dialogues = len(rows)
        images.close()
        part = part_path(self.made / "convert", number)
        write_arrow(part.with_suffix(".images"), IMAGE_SCHEMA, to_batches(images.rows, IMAGE_SCHEMA))
        write_arrow(part.with_suffix(".files"), FILE_SCHEMA, to_batches(images.file_rows, FILE_SCHEMA))
        write_arrow(part, DIALOGUE_SCHEMA, to_batches(rows, DIALOGUE_SCHEMA), stats=stats_text(stats))

    def _find(self, image: Image, images: "_PartImages", fetched: dict[str, Path | RecordError]) -> tuple[Image, bytes]:
        """Return (the image where it is stored now, its digest). Raises RecordError: it cannot be shown."""
        found = fetched[image.source.url] if isinstance(image.source, Remote) else image
        located = Image(found) if isinstance(found, Path) else found
        content = located if isinstance(located, RecordError) else self._look(located, images.files)
        if isinstance(located, Image) and isinstance(content, bytes):
            return located, content
        assert isinstance(content, RecordError)
        raise RecordError(content.reason, content.detail)  # a new one: the traceback of a kept error grows

    def _look(self, image: Image, files: dict[File, bytes | None]) -> bytes | RecordError:
        """Return the digest of an image, or the error from decoding it; adds its file to `files`.

        Decoding finds a broken image now, instead of in training.
        """
        if isinstance(image.source, bytes | PIL.Image.Image):
            return _digest(image)
        if image not in self._seen:
            assert isinstance(image.source, Path | Slice)
            path = image.source.path if isinstance(image.source, Slice) else image.source
            file = file_now(path.absolute())
            found, whole = _digest(image), None
            if isinstance(image.source, Path) and file[1] <= MAX_BYTES:
                whole = file_digest(image.source) if isinstance(found, RecordError) else found
            self._seen[image] = file, whole, found
            if len(self._seen) > 8 * PART_RECORDS:
                self._seen.popitem(last=False)
        file, whole, content = self._seen[image]
        files[file] = whole
        return content


def _digest(image: Image) -> bytes | RecordError:
    """Return the digest of an image that can be decoded, or why it cannot."""
    try:
        open_image(image)
        return digest(image)
    except RecordError as error:
        return RecordError(error.reason, error.detail)  # the one caught holds on to all that was read


class _PartImages:
    """The distinct images of one part. Images inside records are stored in a file, in their original encoding."""

    def __init__(self, made: Path, number: int):
        self.rows: list[dict[str, Any]] = []
        self.files: dict[File, bytes | None] = {}
        """File in which an image was looked up -> its digest if the whole file is the image, else None."""
        self._made, self._kept = made, made / "images" / f"{number:06}.bin"
        self._file: BinaryIO | None = None
        self._by_digest: dict[bytes, int] = {}

    def add(self, image: Image, content: bytes) -> int:
        row = self._by_digest.setdefault(content, len(self.rows))
        if row == len(self.rows):
            if isinstance(image.source, bytes | PIL.Image.Image):
                if self._file is None:
                    self._kept.parent.mkdir(exist_ok=True)
                    self._file = self._kept.open("wb")
                data = encoded(image)
                image = Image(Slice(self._kept, self._file.tell(), len(data)))
                self._file.write(data)
            self.rows.append(image_row(image, content, self._made))
        return row

    @property
    def file_rows(self) -> list[dict[str, Any]]:
        return [
            dict(zip(FILE_SCHEMA.names, (os.fsencode(path), size, time, self.files[path, size, time]), strict=True))
            for path, size, time in sorted(self.files)
        ]

    def close(self) -> None:
        """Flush the file of images to the disk."""
        if self._file is not None:
            self._file.close()
            flush(self._kept)
            flush(self._kept.parent)
            _, size, time = file_now(self._kept)
            self.files[str(self._kept.relative_to(self._made)), size, time] = file_digest(self._kept)


def _merge_converted(made: Path, parts: int, stats: SourceStats) -> None:
    """Combine all parts into dialogues.arrow and images.arrow; images are distinct by content over the whole source."""
    paths = [part_path(made / "convert", number) for number in range(parts)]
    by_part = [ArrowFile(path.with_suffix(".images")).values("digest").astype("S32") for path in paths]
    _, first, inverse = np.unique(
        np.concatenate([np.zeros(0, "S32"), *by_part]), return_index=True, return_inverse=True
    )
    kept = np.sort(first)  # numbered as they come, so that neighbours in the data are neighbours here
    rank = np.searchsorted(kept, first)[inverse]
    starts = np.cumsum([0, *map(len, by_part)])

    def images() -> Iterator[pa.RecordBatch]:
        for start, stop, path in zip(starts[:-1], starts[1:], paths, strict=True):
            chosen = kept[(kept >= start) & (kept < stop)] - start
            yield from (batch.take(pa.array(chosen)) for batch in ArrowFile(path.with_suffix(".images")).batches)

    def dialogues() -> Iterator[pa.RecordBatch]:
        for start, path in zip(starts[:-1], paths, strict=True):
            for batch in ArrowFile(path).batches:
                shown = batch.column("images")
                renumbered = pa.array(rank[start + shown.values.to_numpy()], pa.int32())
                lists = pa.ListArray.from_arrays(shown.offsets, renumbered)
                yield batch.set_column(batch.schema.get_field_index("images"), "images", lists)

    for path in paths:
        stats.add(stats_of(ArrowFile(path)))
    files = [batch for path in paths for batch in ArrowFile(path.with_suffix(".files")).batches]
    write_arrow(made / IMAGES, IMAGE_SCHEMA, images())
    # A file that changed during preparation is listed twice, which marks the set as stale.
    distinct = pa.Table.from_batches(files, FILE_SCHEMA).group_by(FILE_SCHEMA.names, use_threads=False).aggregate([])
    write_arrow(made / FILES, FILE_SCHEMA, distinct.to_batches())
    write_arrow(made / DIALOGUES, DIALOGUE_SCHEMA, dialogues(), stats=stats_text(stats))
    shutil.rmtree(made / "convert")
