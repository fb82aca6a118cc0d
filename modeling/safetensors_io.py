"""Read and write safetensors checkpoints by offset, a part of a tensor at a time, whatever the size of the model.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with each
tensor's dtype, shape and offsets, then the tensors' bytes.
"""

import hashlib
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, TypeVarTuple

import torch

from modeling.atomic_files import partial_of, put_in_place, read_json, write_json
from modeling.cpu_cores import available_cores
from modeling.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Accepted dtypes of a model's weights. 8-bit weights would need scales, for which IDEFICS has no tensor names."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LFS_POINTER = b"version "
"""First bytes of the pointer file that git-lfs puts in place of a large file."""

MAX_HEADER = 100_000_000
"""Largest header in bytes: the format's own limit."""

MAX_SIZE = 2**62
"""Largest size of one axis of a tensor: above it, torch's arithmetic with sizes could overflow."""

MAX_NAME = 500
"""Largest number of characters of a tensor's name that messages show."""

FINGERPRINT_BYTES = 4096
"""Bytes of each tensor that `fingerprint` reads, at its beginning and at its end."""

PIECE_BYTES = 2**18
"""Bytes per write: larger writes go into Linux's page cache at less than half the speed."""

BLOCK_ELEMENTS = 2**20
"""Elements of a tensor in one block of work: a few megabytes, large enough that threads rarely wait."""

ROW_GROUP = 64
"""The height of a block is a multiple of this, which is a multiple of the rows that a matrix kernel processes at once.

Remaining rows are computed by other kernels, which add in another order, so that a block of any other height would be
rounded differently from the whole matrix.
"""


Block = TypeVarTuple("Block")
Result = TypeVar("Result")


class Rows(Protocol):
    """A tensor that is read a few rows at a time."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive blocks of rows, of about `BLOCK_ELEMENTS` each.

    Each starts at a multiple of `ROW_GROUP`; the last one includes the rows that are not a whole group.
    """
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    height = max(1, BLOCK_ELEMENTS // max(1, width) // ROW_GROUP) * ROW_GROUP
    starts = [start for start in range(0, rows, height) if start == 0 or rows - start >= ROW_GROUP]
    yield from zip(starts, [*starts[1:], rows], strict=False)


def in_threads(
    work: Callable[[*Block], Result], blocks: Iterable[tuple[*Block]], *, threads: int | None = None
) -> Iterator[Result]:
    """Yield `work(*block)` for every block, in order; threads compute a few blocks ahead.

    Each block is computed by one thread: on a busy machine, threads that share a block mostly wait for each other.
    """
    threads = threads or available_cores()
    before, waiting = torch.get_num_threads(), deque[Future[Result]]()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for block in blocks:
                waiting.append(pool.submit(work, *block))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            yield from (one.result() for one in waiting)
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Extent:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row, an index of the first axis (for a scalar: of itself)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(Extent):
    """A tensor in a file."""

    file: Path
    offset: int
    """Offset of its first byte in the file."""

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read rows [start:stop] of its first axis (for a scalar: itself)."""
        if not self.shape:
            return self._read(0, self.dtype.itemsize).view(())
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        count = max(0, stop - start)
        return self._read(start * self.row_bytes, count * self.row_bytes).view(count, *self.shape[1:])

    def _read(self, start: int, length: int) -> torch.Tensor:
        content = torch.empty(length, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            buffer, got = memoryview(content.numpy()), 0
            while got < length and (count := file.readinto(buffer[got:])):
                got += count
        if got < length:
            raise UserError(f"{self.file}: ends in the middle of a tensor: {got} of {length} bytes")
        return content.view(self.dtype)


def read_header(path: Path) -> dict[str, Stored]:
    """Return name -> tensor of one file. Raises UserError: not safetensors, truncated, or overlapping tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == LFS_POINTER:
            raise UserError(f"{path}: is a git-lfs pointer, not the weights: git lfs pull, in its folder")
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(f"{path}: not a safetensors file, or a truncated one ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            if (longest := max(map(len, header), default=0)) > MAX_NAME:
                raise ValueError(f"a tensor's name of {longest:,} characters")
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: the safetensors header cannot be read: {repr(error)[:300]}") from error
    _require_filled(path, tensors, start=8 + length, size=size)
    return tensors


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    (first, last), shape, code = entry["data_offsets"], entry["shape"], entry["dtype"]
    if code not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {code!r}")
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"expected a shape and offsets of whole numbers, got {shape} and {[first, last]}")
    if not all(number <= MAX_SIZE for number in shape):
        raise ValueError(f"expected sizes of {MAX_SIZE} at most, got {shape}")
    stored = Stored(DTYPES[code], tuple(shape), path, start + first)
    if last - first != stored.nbytes:
        raise ValueError(f"{last - first} bytes for {stored.shape} {code}")
    return stored


def _require_filled(path: Path, tensors: Mapping[str, Stored], *, start: int, size: int) -> None:
    """Raise UserError unless tensors fill the file from `start` to its end, without gaps or overlaps."""
    place = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != place:
            raise UserError(f"{path}: tensors overlap or leave gaps: {name} is at {stored.offset}, not at {place}")
        place += stored.nbytes
    if place != size:
        raise UserError(f"{path}: {size:,} bytes, and its header names {place:,}: truncated, or not whole")


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return name -> tensor of a model folder, in the order of its files. Raises UserError, with the repair."""
    if (folder / INDEX).is_file():
        return _read_indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(ending))
    if pickles:
        raise UserError(
            f"{folder}: holds pickles ({pickles[0]}), which can run code when they are opened; convert them on a "
            f"machine that may: load the model with transformers there, and save_pretrained writes safetensors"
        )
    raise UserError(f"{folder}: expected safetensors weights ({SINGLE}, or {INDEX}), found none")


def _read_indexed(folder: Path) -> dict[str, Stored]:
    weight_map = _read_weight_map(folder / INDEX)
    files = list(dict.fromkeys(weight_map.values()))
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:3])}")
    found = {(name, file): stored for file in files for name, stored in read_header(folder / file).items()}
    if absent := sorted(weight_map.items() - found.keys()):
        raise UserError(f"{folder}: its index names {len(absent)} tensors that their files do not have: {absent[:3]}")
    if surplus := sorted(found.keys() - weight_map.items()):
        raise UserError(f"{folder}: its files have {len(surplus)} tensors that its index does not name: {surplus[:3]}")
    return {name: stored for (name, _), stored in found.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file beside the index. Raises UserError: not an index, or a file outside the folder."""
    content = read_json(index, repair="fetch it again, or delete it where one file holds all weights") or {}
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected an index with a weight_map of file names")
    for name, file in weight_map.items():
        if len(name) > MAX_NAME:
            raise UserError(f"{index}: a tensor's name of {len(name):,} characters: {name[:80]!r}...")
        if not isinstance(file, str) or Path(file).name != file or not re.fullmatch(r"[^\0]{1,200}\.safetensors", file):
            raise UserError(f"{index}: expected names of files beside it, got {repr(file)[:80]}")
    return weight_map


def require_shapes(folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless a checkpoint holds every `expected` tensor, as floating-point weights."""
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{folder}: lacks {len(missing)} tensors of its own config: {missing[:3]}")
    if others := [name for name, shape in expected.items() if stored[name].shape != shape]:
        name, more = others[0], f" (and {len(others) - 1} more differ)" if len(others) > 1 else ""
        raise UserError(f"{stored[name].file}: {name} is {stored[name].shape}, its config says {expected[name]}{more}")
    if others := [name for name in expected if stored[name].dtype not in WEIGHT_DTYPES]:
        name, more = others[0], f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise UserError(
            f"{stored[name].file}: {name} is {stored[name].dtype}{more}: a quantised model; expected weights in bf16, "
            f"fp16, fp32 or fp64, as the model was released"
        )


def weight_bytes(tensors: Mapping[str, Stored], dtype: torch.dtype) -> int:
    """Return the bytes that these tensors take in another dtype."""
    return dtype.itemsize * sum(math.prod(one.shape) for one in tensors.values())


def fingerprint(tensors: Mapping[str, Stored]) -> str:
    """Return a hash of names, dtypes, shapes and both ends of each tensor, without reading the whole checkpoint."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        length = min(stored.nbytes, FINGERPRINT_BYTES)
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
        with stored.file.open("rb") as file:
            for place in (stored.offset, stored.offset + stored.nbytes - length):
                file.seek(place)
                digest.update(file.read(length))
    return digest.hexdigest()


@dataclass(frozen=True)
class Planned(Extent):
    """A tensor to be written, and the function that computes its rows."""

    rows: Callable[[int, int], torch.Tensor]
    """rows(start, stop) -> these rows in `dtype` (for a scalar: itself); called from several threads."""


def plan_shards(tensors: Mapping[str, Extent], shard_bytes: int) -> dict[str, list[str]]:
    """Return file name -> tensors, in order, with at most `shard_bytes` (or one tensor) per file."""
    shards: list[list[str]] = []
    size = shard_bytes + 1
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], tensors: Mapping[str, Extent]) -> None:
    """Write the index that transformers needs for a model of several files."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def write_shard(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Write one file atomically. Threads compute its blocks, and write each at its offset."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, planned in tensors.items():
        entry = {"dtype": CODES[planned.dtype], "shape": list(planned.shape)}
        header[name] = {**entry, "data_offsets": [size, size + planned.nbytes]}
        size += planned.nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    partial = partial_of(path)
    with partial.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        start = file.tell()
        file.truncate(start + size)

    def write(planned: Planned, start: int, stop: int, place: int) -> None:
        rows = planned.rows(start, stop)
        assert (rows.dtype, rows.nbytes) == (planned.dtype, (stop - start) * planned.row_bytes), rows.shape
        with partial.open("rb+", buffering=0) as file:
            file.seek(place)
            content = memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy())
            while content:
                content = content[file.write(content[:PIECE_BYTES]) :]

    for _ in in_threads(write, _blocks(tensors, start)):
        pass
    put_in_place(partial, path)


def _blocks(tensors: Mapping[str, Planned], place: int) -> Iterator[tuple[Planned, int, int, int]]:
    """Yield (tensor, start, stop, offset in the file) of each block of rows; tensors follow each other without gaps."""
    for planned in tensors.values():
        for start, stop in row_blocks(planned.shape):
            yield planned, start, stop, place + start * planned.row_bytes
        place += planned.nbytes
