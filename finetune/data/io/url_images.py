"""Images that img2dataset downloaded, looked up by their URLs, as web documents such as OBELICS's name them.

The first look-up lists all shards of a folder, and leaves a table of 36 bytes per image there, sorted by the hash of
the URL. It is mapped into memory, so that all processes share it. Where a shard is new or has changed, all are listed
again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from finetune.console import log, track
from finetune.data.arrow import ArrowFile, DamagedError, write_arrow
from finetune.data.conversation import Image, RecordError, Slice
from finetune.data.images import encoded
from finetune.data.io.byte_streams import BrokenFileError
from finetune.data.io.img2dataset import ENCODINGS
from finetune.data.io.jsonl_csv import parse_json
from finetune.data.io.parquet_arrow import Checked, Parquet, open_parquet, python_rows, read_group
from finetune.data.io.tars import read_members
from finetune.data.worker_pool import run_all
from modeling.cpu_cores import available_cores
from modeling.errors import UserError

TABLE = ".urls.arrow"
"""File of the table, in the folder of the shards."""

SCHEMA = pa.schema(
    {"high": pa.uint64(), "low": pa.uint64(), "shard": pa.int32(), "start": pa.int64(), "length": pa.int64()}
)
"""high, low: a 128-bit hash of the URL; rows are sorted by high. start, length: first byte and number of bytes in a
tar; in a Parquet file, start is the number of the row, and length is -1."""


class UrlImages:
    """The images of the shards in one folder."""

    def __init__(self, folder: Path, shards: Sequence[Path]):
        self.folder, self.shards = folder, shards
        self._latest: tuple[Path, int, list[Any]] | None = None
        """A Parquet file and the row group of it that was read last, with its images."""
        self._opened: dict[Path, tuple[Parquet, str, np.ndarray]] = {}

    def find(self, url: str) -> Image | None:
        """Return the image of this URL, None if it is not among those downloaded. Raises RecordError: it is damaged."""
        (high,), (low,) = _hashed([url])
        highs, lows = self._table["high"], self._table["low"]
        row = int(np.searchsorted(highs, high))
        while row < len(highs) and highs[row] == high:
            if lows[row] == low:
                shard, start, length = (int(self._table[name][row]) for name in ("shard", "start", "length"))
                path = self.shards[shard]
                return Image(self._image_in(path, start) if length < 0 else Slice(path, start, length))
            row += 1
        return None

    @cached_property
    def _table(self) -> dict[str, np.ndarray]:
        """Return the columns of the table, made now if there is none of these shards.

        Raises UserError: a shard cannot be read.
        """
        table, state = self.folder / TABLE, json.dumps([_state(path) for path in self.shards])
        try:
            with FileLock(table.with_suffix(".lock")):
                found = _open(table, state)
                if found is None:
                    write_arrow(table, SCHEMA, [_make(self.folder, self.shards)], shards=state)
                    found = _open(table, state)
            assert found is not None
        except OSError as error:
            log(
                f"{table}: cannot be written ({error.strerror}): each process lists the images again, in its own memory"
            )
            found = _make(self.folder, self.shards)
        return {name: found.column(name).to_numpy() for name in SCHEMA.names}

    def _image_in(self, path: Path, row: int) -> bytes:
        """Return the image of a row of a Parquet file, of which one row group is in memory at a time."""
        if path not in self._opened:
            opened = open_parquet(path)
            ends = np.cumsum([rows for rows, _ in opened.groups])
            self._opened[path] = opened, _image_column(opened), ends
        opened, column, ends = self._opened[path]
        group = int(np.searchsorted(ends, row, side="right"))
        if self._latest is None or self._latest[:2] != (path, group):
            self._latest = path, group, list(_values(read_group(opened, group, column), column))
        content = self._latest[2][row - int(ends[group - 1] if group else 0)]
        if not isinstance(content, bytes):
            raise RecordError("corrupt image", f"{path}: row {row} has no image")
        return content


def _state(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def _open(table: Path, state: str) -> pa.RecordBatch | None:
    """Return the table of these shards, or None where there is none, or one of others."""
    try:
        file = ArrowFile(table).validate(SCHEMA)
    except DamagedError:
        return None
    return file.batches[0] if (file.schema.metadata or {}).get(b"shards") == state.encode() else None


def _make(folder: Path, shards: Sequence[Path]) -> pa.RecordBatch:
    """List the images of all shards, several shards at a time; return the table. Raises UserError."""
    with TemporaryDirectory() as parts:
        work = partial(_list_shard, Path(parts))
        for _ in track(run_all(list(enumerate(shards)), work, workers=available_cores()), f"list {folder.name}"):
            pass
        found = [ArrowFile(Path(parts) / f"{number}.arrow") for number in range(len(shards))]
        columns = {name: np.concatenate([part.values(name) for part in found]) for name in SCHEMA.names}
    order = np.argsort(columns["high"], kind="stable")
    log(f"{folder}: {len(order):,} images in {len(shards):,} shards")
    return pa.RecordBatch.from_arrays([pa.array(columns.pop(name)[order]) for name in SCHEMA.names], schema=SCHEMA)


def _list_shard(parts: Path, task: tuple[int, Path]) -> Iterator[int]:
    """Write the rows of the table for one shard; yield their number."""
    number, path = task
    try:
        entries = list(_in_tar(path) if path.suffix == ".tar" else _in_parquet(path))
    except BrokenFileError as error:
        raise UserError(f"{path}: a shard of images that cannot be read: {error}") from error
    urls, starts, lengths = zip(*entries, strict=True) if entries else ((), (), ())
    high, low = _hashed(urls)
    columns = [high, low, np.full(len(urls), number), np.array(starts, np.int64), np.array(lengths, np.int64)]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    write_arrow(parts / f"{number}.arrow", SCHEMA, [pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)])
    yield len(urls)


def _in_tar(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (url, first byte, number of bytes) of each image. Its JSON file, which has the URL, is beside it."""
    images: dict[str, Slice] = {}
    urls: dict[str, str] = {}
    for member in read_members(path):
        key, _, suffix = member.name.rpartition(".")
        if not isinstance(member.content, Slice):
            continue
        if suffix in ENCODINGS:
            images[key] = member.content
        elif suffix == "json":
            sample = parse_json(encoded(Image(member.content)))
            if isinstance(sample, dict) and isinstance(sample.get("url"), str):
                urls[key] = sample["url"]
        if key in images and key in urls:
            place = images.pop(key)
            yield urls.pop(key), place.offset, place.length


def _in_parquet(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (url, number of the row, -1) of each row that was downloaded."""
    opened = open_parquet(path)
    _image_column(opened)
    row = 0
    for group in range(len(opened.groups)):
        columns = [_values(read_group(opened, group, name), name) for name in ("url", "status")]
        for url, status in zip(*columns, strict=True):
            if status == "success" and isinstance(url, str):
                yield url, row, -1
            row += 1


def _image_column(opened: Parquet) -> str:
    """Return the name of the column of images. Raises BrokenFileError: there is none."""
    names = opened.file.schema_arrow.names
    found = next((name for name in ENCODINGS if name in names), None)
    if found is None or not {"url", "status"} <= set(names):
        raise BrokenFileError(
            "not a shard", f"expected url, status and {' or '.join(ENCODINGS)}, got {', '.join(names)}"
        )
    return found


def _values(batches: Sequence[Checked], column: str) -> Iterator[Any]:
    for one in batches:
        for row in python_rows(one):
            yield None if isinstance(row, RecordError) else row[column]


def _hashed(urls: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two halves of a 128-bit hash of each URL: uint64 [urls] each."""
    hashes = (hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).digest() for url in urls)
    halves = np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)
    return halves[:, 0].copy(), halves[:, 1].copy()
