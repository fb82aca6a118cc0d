"""A source as shards: parts that are read on their own, by any process on any node. They are known before data is read.

    train.jsonl         byte ranges of 32 MiB; a line belongs to the range in which it begins
    train.parquet       runs of row groups
    a.tar, a.json, ...  a file each
    whole sources       pairs of VQA files, folders of images, datasets on the hub, and all sources with a `limit`

If these are few, each of them becomes several shards: each reads the same data, and takes every n-th block of records.
Reading costs a few per cent of preparing, and with that all workers have work. Shards are a function of the data alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.formats import FORMATS
from finetune.data.formats.read_records import read_records, require_columns
from finetune.data.io import hub
from finetune.data.io.byte_streams import BrokenFileError, Record
from finetune.data.io.parquet_arrow import group_bytes
from finetune.data.io.paths import IMAGE_SUFFIXES, expand, files_at, size_of
from finetune.data.io.source_files import DataFile, data_files
from finetune.data.io.tars import COMPRESSED_TARS
from finetune.recipe.schema import Source
from finetune.recipe.urls import is_remote

SHARD_BYTES = 2**25
"""Approximate number of bytes of a shard of a file that can be cut; more in sources of over MOST_SHARDS such shards."""

MOST_SHARDS = 4096
"""Largest number of parts into which a source is cut; its files may be more."""

STREAM_BYTES, MOST_STREAM_SHARDS = 2**22, 2**14
"""The same for streams: a run that goes on passes over the records of a shard before its place."""

LEAST_SHARDS = 16
"""Number of shards that a source is divided into, if it is large enough: as many processes can work on it."""

LEAST_TAR_SHARDS = 4
"""The same for tar archives, of which every shard reads all headers and texts: that costs a quarter of the work."""

LEAST_BYTES = 2**18
"""A part of a source with fewer bytes is not worth a process."""

SMALL_BYTES, PACKAGED_BYTES = 2**15, 2**23
"""What an image or a text in a folder counts for, and a source that comes with a Python package."""

BLOCK = 512
"""Number of consecutive records that stay in one shard: neighbours often show the same image."""


@dataclass(frozen=True)
class Shard:
    """A part of a source. It is plain data, and can be sent to another process."""

    file: DataFile | None = None
    """A data file, or a part of one; None: the whole source, as its format reads it."""
    hub: tuple[int, int] | None = None
    """(index, number) of a shard of a streamed dataset on the hub, as the datasets library counts them."""
    which: int = 0
    of: int = 1
    """The shard takes every `of`-th block of records, from block `which` on."""
    block: int = BLOCK
    """Number of records in a block."""


def shards_of(source: Source, *, multiple_of: int = 0) -> list[Shard]:
    """Return the shards of a source whose format is known, in the order of its records.

    `multiple_of`: for streams, which are divided into so many equal numbers of shards. Each record is in one shard.

    Raises UserError: a path that leads to nothing, an unknown suffix, a column that no record has.
    """
    parts = _parts(source, multiple_of=multiple_of)
    if multiple_of:
        ways = _even_ways(len(parts), multiple_of)
    else:
        ways = [max(1, min(_wanted_ways(shard, len(parts)), size // LEAST_BYTES)) for shard, size in parts]
    block = 1 if multiple_of else BLOCK
    return [
        replace(shard, which=which, of=of, block=block)
        for (shard, _), of in zip(parts, ways, strict=True)
        for which in range(of)
    ]


def _wanted_ways(shard: Shard, parts: int) -> int:
    """Return into how many shards one of so many parts is divided, if it is large enough."""
    is_tar = shard.file is not None and shard.file.path.name.lower().endswith((".tar", *COMPRESSED_TARS))
    return math.ceil((LEAST_TAR_SHARDS if is_tar else LEAST_SHARDS) / parts)


def _even_ways(parts: int, multiple_of: int) -> list[int]:
    """Return into how many shards each part is divided, so that their number is a multiple, and little is read twice.

    The last parts, which are over, become as many shards as are missing; if there are no others, so many that one part
    is divided into at most a third more than another.

    >>> _even_ways(11, 8)
    [1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 2]
    >>> _even_ways(3, 8)
    [6, 5, 5]
    """
    over = parts % multiple_of
    whole = parts - over
    shards = multiple_of if whole else math.ceil(3 * over / multiple_of) * multiple_of
    return [1] * whole + [shards // over + (number < shards % over) for number in range(over)]


def undivided(shards: list[Shard]) -> list[Shard]:
    """Return shards that hold the same records in the order of the source, each read once."""
    return [replace(shard, of=1) for shard in shards if shard.which == 0]


def read_shard(source: Source, shard: Shard) -> Iterator[Record]:
    """Yield (record id, record) for every record of a shard, of a source with `limit` up to this many in all.

    Raises UserError as `read_records`.
    """
    if shard.file is None and shard.hub is None:
        records = FORMATS[source.format].read(source)
    else:
        records = read_records(source, shard.file, shard.hub)
    left = math.inf if source.limit is None else source.limit
    for number, (record_id, record) in enumerate(records):
        if number // shard.block % shard.of == shard.which:
            yield record_id, record
        left -= not isinstance(record, BrokenFileError)
        if left == 0:
            return


def _parts(source: Source, *, multiple_of: int) -> list[tuple[Shard, int]]:
    """Return parts of a source that no two processes need to read, each with its approximate number of bytes."""
    if source.limit is not None:
        return [(Shard(), source.limit * LEAST_BYTES // BLOCK)]
    if source.hub and source.stream:
        number = hub.count_shards(source)
        require_columns(source)
        return [(Shard(hub=(index, number)), SHARD_BYTES) for index in range(number)]
    if source.hub:
        return [(Shard(), hub.count_rows(source) * LEAST_BYTES // BLOCK)]
    if FORMATS[source.format].whole(source):
        return [(Shard(), _bytes_of(source))]
    require_columns(source)
    files = data_files(source)
    sizes = [size_of(file.path) for file in files]
    least, most = (STREAM_BYTES, MOST_STREAM_SHARDS) if multiple_of else (SHARD_BYTES, MOST_SHARDS)
    bytes_each = max(least, sum(sizes) // most)
    parts: list[tuple[Shard, int]] = []
    for file, size in zip(files, sizes, strict=True):
        count = max(1, size // bytes_each)
        if is_remote(file.path) and (len(files) >= LEAST_SHARDS or file.path.suffix == ".parquet"):
            count = 1  # it is fetched whole by each node that reads a part of it, or knows its row groups
        elif multiple_of and size >= multiple_of * LEAST_BYTES:
            count = math.ceil(count / multiple_of) * multiple_of
        parts += [(Shard(part), size // count) for part in _cut(file, size, count)]
    return parts


def _cut(file: DataFile, size: int, count: int) -> list[DataFile]:
    """Cut a file into about `count` parts, if its format allows it."""
    name = file.path.name.lower()
    starts = [0]
    if count > 1 and name.endswith((".jsonl", ".ndjson")):
        starts = [size * number // count for number in range(count)]
    elif count > 1 and name.endswith(".parquet"):
        ends = np.cumsum(group_bytes(file.path))
        starts = np.unique(np.searchsorted(ends, ends[-1] * np.arange(count) / count, side="right")).tolist()
    return [replace(file, start=start, stop=stop) for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def _bytes_of(source: Source) -> int:
    """Return about how many bytes are read of a source that is read whole; an image counts little."""
    files = [file for path in source.paths for match in expand(path) for file in files_at(match)]
    small = (*IMAGE_SUFFIXES, ".txt")
    sizes = [SMALL_BYTES if file.suffix.lower() in small else size_of(file) for file in files]
    return sum(sizes) if source.path else PACKAGED_BYTES
