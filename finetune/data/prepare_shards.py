"""Each shard of a source -> a part, a small prepared set of its own; all parts -> one set.

A part is written aside and renamed when it is whole, so that an interrupted preparing goes on with the shards that have
no part yet, and several nodes can divide the shards. All parts together hold what one reading of the source would have
given, in the same order.
"""

import os
import platform
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import pyarrow as pa

from finetune.console import Track
from finetune.data.arrow import ArrowFile, DamagedError, arrow_writer, to_batches, write_arrow
from finetune.data.chunking import Splitter, fit_records, opening_images
from finetune.data.conversation import Dialogue, Image, RecordError, Remote, Slice
from finetune.data.images import MAX_BYTES, digest, encoded, open_image
from finetune.data.io.byte_streams import Record
from finetune.data.io.download import Downloader
from finetune.data.io.image_roots import ImageRoot
from finetune.data.prepared import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    IMAGE_SCHEMA,
    IMAGES,
    STATS,
    dialogue_to_json,
    example_metadata,
    example_row,
    image_row,
    is_undamaged,
    read_stats,
)
from finetune.data.read_dialogues import count_records, open_and_count, try_dialogue
from finetune.data.shards import Shard, read_shard
from finetune.data.stale_images import FILE_SCHEMA, FILES, File, file_digest, file_now
from finetune.data.stats import SourceStats
from finetune.data.worker_pool import run_all
from finetune.distributed.node_group import ALONE, NodeGroup
from finetune.recipe.schema import Source
from finetune.recipe.urls import is_remote
from modeling.atomic_files import flush, write_json

DIALOGUES = "dialogues.arrow"
DIALOGUE_SCHEMA = pa.schema(
    {"record_id": pa.string(), "dialogues": pa.string(), "images": pa.list_(pa.int32()), "opens": pa.bool_()}
)
"""What a part holds, instead of examples, where questions are joined across records: a record per row. dialogues: one
per line, several where a document was cut at a lost image; opens: whether the dialogue opens with its images, so that
its turns can be moved."""

PARTS, KEPT = "parts", "images"
"""Folder of the parts of a set that is being made; folder, in a part and in a set, of images from inside records."""

CHUNK_BYTES = 16_000_000
"""Approximate number of bytes of records, images inside them included, that a process works on at once."""

REMEMBERED = 4096
"""Number of latest images whose digests a process remembers: neighbouring records often show the same image."""


def make_parts(
    source: Source,
    splitter: Splitter,
    work: Path,
    shards: Sequence[Shard],
    *,
    downloads: Path,
    workers: int,
    track: Track,
    nodes: NodeGroup = ALONE,
) -> None:
    """Make this node's parts of a source that are not there yet: every `nodes.of`-th shard."""
    parts = work / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    mine = nodes.share(list(enumerate(shards)))
    tasks = [(number, shard) for number, shard in mine if not is_whole(part_of(parts, number), splitter)]
    work_on = _PrepareShard(source, splitter, parts, downloads)
    for _ in track(run_all(tasks, work_on, workers=workers), f"prepare {source.label}"):
        pass


def part_of(parts: Path, number: int) -> Path:
    """Return the folder of a shard's part."""
    return parts / f"{number:06}"


def content_of(splitter: Splitter) -> tuple[str, pa.Schema]:
    """Return the file of a part, and of the joined parts, that holds its examples, or dialogues to be joined."""
    return (DIALOGUES, DIALOGUE_SCHEMA) if splitter.joins else (EXAMPLES, EXAMPLE_SCHEMA)


def is_whole(part: Path, splitter: Splitter) -> bool:
    """Return whether a part exists and is undamaged."""
    files = dict([content_of(splitter), (IMAGES, IMAGE_SCHEMA), (FILES, FILE_SCHEMA)])
    try:
        read_stats(part / STATS)
    except DamagedError:
        return False
    return all(is_undamaged(part / name, schema) for name, schema in files.items())


@dataclass(frozen=True)
class _PrepareShard:
    """Makes the part of a shard: its records converted, their images opened and hashed, the dialogues tokenised.

    Where questions are joined across records, their dialogues are tokenised later, by `join_questions`.
    """

    source: Source
    splitter: Splitter
    parts: Path
    downloads: Path

    def __call__(self, task: tuple[int, Shard]) -> Iterator[int]:
        """Make the part of (number, shard); yield the number of records in each block that is done.

        It ends early where another process has made all parts meanwhile, and joined them.
        """
        number, shard = task
        part = part_of(self.parts, number)
        partial = part.with_name(f"{part.name}.{platform.node()}-{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield from self._write(number, shard, partial)
            flush(partial)
            try:
                partial.rename(part)
            except OSError:
                if not is_whole(part, self.splitter):  # else another process has made it meanwhile
                    shutil.rmtree(part)
                    partial.rename(part)
            flush(self.parts)
        except FileNotFoundError:
            if self.parts.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, number: int, shard: Shard, partial: Path) -> Iterator[int]:
        stats, images = SourceStats(self.source.name), _PartImages(partial, f"{number:06}.bin")
        name, schema = content_of(self.splitter)
        rows: list[dict[str, Any]] = []
        with arrow_writer(partial / name, schema) as write:
            for found, ends_block in _chunks(read_shard(self.source, shard), shard.block):
                records = list(count_records(found, self.source, stats))
                rows += self._rows(records, images, stats)
                if ends_block:
                    write(pa.RecordBatch.from_pylist(rows, schema))  # an empty one, too: see `_in_order`
                    rows = []
                yield len(records)
        images.close()
        for name, schema, rows in ((IMAGES, IMAGE_SCHEMA, images.rows), (FILES, FILE_SCHEMA, images.file_rows)):
            write_arrow(partial / name, schema, to_batches(rows, schema))
        write_json(partial / STATS, stats.partial())

    def _rows(self, records: Sequence[Record], images: "_PartImages", stats: SourceStats) -> list[dict[str, Any]]:
        """Return the examples of some records, or their dialogues where these are joined later."""
        dialogues = [
            (record_id, try_dialogue(record_id, record, self._root, self.splitter.seed))
            for record_id, record in records
        ]
        converted = [dialogue for _, dialogue in dialogues if isinstance(dialogue, Dialogue)]
        sources = [image.source for dialogue in converted for image in dialogue.images]
        urls = sorted({source.url for source in sources if isinstance(source, Remote)})
        fetched = Downloader(self.downloads, http=self.source.download == "http").fetch_all(urls)
        look = partial(self._look, images=images, fetched=fetched)
        kept: list[tuple[str, list[Dialogue], list[int]]] = []
        for record_id, dialogue in dialogues:
            opened = open_and_count(record_id, dialogue, look, stats)
            if opened:
                kept.append((record_id, opened.dialogues, [images.add(*located) for located in opened.images]))
        stats.dialogues += len(kept)
        if self.splitter.joins:
            return [
                {
                    "record_id": record_id,
                    "dialogues": "\n".join(map(dialogue_to_json, parts)),
                    "images": numbers,
                    "opens": opening_images(parts[0]) is not None,
                }
                for record_id, parts, numbers in kept
            ]
        number_of: dict[Image, int] = {}
        for _, parts, numbers in kept:
            number_of |= zip((image for part in parts for image in part.images), numbers, strict=True)
        fitted = fit_records(
            [(record_id, parts) for record_id, parts, _ in kept], self.splitter, stats, same=number_of.__getitem__
        )
        return [
            example_row(
                piece.dialogue,
                example,
                [number_of[image] for image in piece.dialogue.images],
                images.digest,
                origin.record_id,
            )
            for piece, example, origin in fitted
        ]

    @cached_property
    def _root(self) -> ImageRoot:
        return ImageRoot(self.source)

    @cached_property
    def _seen(self) -> OrderedDict[Image, tuple[File, bytes | None, bytes | RecordError]]:
        """Cache of results for the most recent images."""
        return OrderedDict()

    def _look(
        self, image: Image, *, images: "_PartImages", fetched: Mapping[str, Path | RecordError]
    ) -> tuple[Image, bytes]:
        """Return (the image where it is stored now, its digest). It is decoded, as a broken one is to be found now.

        Raises RecordError: it cannot be shown.
        """
        source = fetched[image.source.url] if isinstance(image.source, Remote) else image.source
        if isinstance(source, RecordError):
            raise RecordError(source.reason, source.detail)  # a new one: the traceback of a kept error grows
        if isinstance(source, Slice) and is_remote(source.path):
            source = encoded(image)  # the part keeps it, as the archive may leave the cache
        image = Image(source)
        if isinstance(source, bytes | PIL.Image.Image):
            content = _digest(image)
        else:
            if image not in self._seen:
                path = source.path if isinstance(source, Slice) else source
                file = file_now(path.absolute())
                content, whole = _digest(image), None
                if isinstance(source, Path) and file[1] <= MAX_BYTES:
                    whole = file_digest(source) if isinstance(content, RecordError) else content
                self._seen[image] = file, whole, content
                if len(self._seen) > REMEMBERED:
                    self._seen.popitem(last=False)
            file, whole, content = self._seen[image]
            images.files[file] = whole
        if isinstance(content, RecordError):
            raise RecordError(content.reason, content.detail)
        return image, content


def _digest(image: Image) -> bytes | RecordError:
    """Return the digest of an image that can be decoded, or why it cannot."""
    try:
        open_image(image)
        return digest(image)
    except RecordError as error:
        return RecordError(error.reason, error.detail)  # the one caught holds on to all that was read


class _PartImages:
    """The distinct images of a part. Images inside records are stored in a file, in their original encoding."""

    def __init__(self, part: Path, name: str):
        self.rows: list[dict[str, Any]] = []
        self.files: dict[File, bytes | None] = {}
        """File in which an image was looked up -> its digest if the whole file is the image, else None."""
        self._part, self._kept = part, part / KEPT / name
        self._file: BinaryIO | None = None
        self._by_digest: dict[bytes, int] = {}

    def add(self, image: Image, content: bytes) -> int:
        """Return the number of an image with this digest."""
        row = self._by_digest.setdefault(content, len(self.rows))
        if row == len(self.rows):
            if isinstance(image.source, bytes | PIL.Image.Image):
                if self._file is None:
                    self._kept.parent.mkdir(exist_ok=True)
                    self._file = self._kept.open("wb")
                data = encoded(image)
                image = Image(Slice(self._kept, self._file.tell(), len(data)))
                self._file.write(data)
            self.rows.append(image_row(image, content, self._part))
        return row

    def digest(self, row: int) -> bytes:
        return self.rows[row]["digest"]

    @property
    def file_rows(self) -> list[dict[str, Any]]:
        return [
            dict(zip(FILE_SCHEMA.names, (os.fsencode(path), size, time, self.files[path, size, time]), strict=True))
            for path, size, time in sorted(self.files)
        ]

    def close(self) -> None:
        """Flush the file of images to the disk, and list it among the files."""
        if self._file is not None:
            self._file.close()
            flush(self._kept)
            flush(self._kept.parent)
            _, size, time = file_now(self._kept)
            self.files[str(self._kept.relative_to(self._part)), size, time] = file_digest(self._kept)


def _chunks(records: Iterator[Record], block: int) -> Iterator[tuple[list[Record], bool]]:
    """Yield (consecutive records of bounded size, whether a block of `block` records ends with them)."""
    chunk: list[Record] = []
    size = number = 0
    for number, record in enumerate(records, start=1):
        chunk.append(record)
        size += _bytes_of(record[1])
        if number % block == 0 or size >= CHUNK_BYTES:
            yield chunk, number % block == 0
            chunk, size = [], 0
    if number % block:
        yield chunk, True


def _bytes_of(value: object) -> int:
    """Return about how much memory the texts and bytes of a record take."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, list) else 8


def join_parts(source: Source, splitter: Splitter, work: Path, shards: Sequence[Shard]) -> None:
    """Write the parts of all shards as one set into `work`, its statistics as metadata; remove the parts.

    Images become distinct by content over the whole source. Where questions are joined, the set has dialogues.
    """
    parts = [part_of(work / PARTS, number) for number in range(len(shards))]
    stats = SourceStats(source.name)
    digests = [ArrowFile(part / IMAGES).values("digest").astype("S32") for part in parts]
    _, first, inverse = np.unique(
        np.concatenate([np.zeros(0, "S32"), *digests]), return_index=True, return_inverse=True
    )
    kept = np.sort(first)  # numbered as they come, so that neighbours in the data are neighbours here
    numbers = np.searchsorted(kept, first)[inverse]
    starts = np.cumsum([0, *map(len, digests)])
    name, schema = content_of(splitter)

    def images() -> Iterator[pa.RecordBatch]:
        for start, stop, part in zip(starts[:-1], starts[1:], parts, strict=True):
            chosen = kept[(kept >= start) & (kept < stop)] - start
            yield from (batch.take(pa.array(chosen)) for batch in ArrowFile(part / IMAGES).batches)

    def content() -> Iterator[pa.RecordBatch]:
        for number, batch in _in_order(parts, shards, name):
            shown = batch.column("images")
            renumbered = pa.array(numbers[starts[number] + shown.values.to_numpy()], pa.int32())
            lists = pa.ListArray.from_arrays(shown.offsets, renumbered)
            yield batch.set_column(batch.schema.get_field_index("images"), "images", lists)

    for part in parts:
        stats.add(read_stats(part / STATS))
        for kept_images in (part / KEPT).glob("*"):
            (work / KEPT).mkdir(exist_ok=True)
            kept_images.replace(work / KEPT / kept_images.name)
    stats.limited = stats.read == source.limit
    files = pa.Table.from_batches([one for part in parts for one in ArrowFile(part / FILES).batches], FILE_SCHEMA)
    # A file that changed during preparation is listed twice, which marks the set as stale.
    distinct = files.group_by(FILE_SCHEMA.names, use_threads=False).aggregate([])
    write_arrow(work / IMAGES, IMAGE_SCHEMA, images())
    write_arrow(work / FILES, FILE_SCHEMA, distinct.to_batches())
    write_arrow(work / name, schema, content(), **example_metadata(splitter.encoder, stats))
    remove_parts(work)


def remove_parts(work: Path) -> None:
    """Remove the parts of all shards; for another process, which may be writing one in vain, all are gone at once."""
    removed = work / f"{PARTS}.removed"
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(FileNotFoundError):
        (work / PARTS).rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _in_order(parts: Sequence[Path], shards: Sequence[Shard], name: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (number of the part, batch) in the order of the source: shards of the same data take turns."""
    numbered = enumerate(zip(parts, shards, strict=True))
    for _, group in groupby(numbered, key=lambda each: (each[1][1].file, each[1][1].hub)):
        files = [[(number, batch) for batch in ArrowFile(part / name).batches] for number, (part, _) in group]
        for turn in zip_longest(*files):
            yield from (each for each in turn if each is not None)
