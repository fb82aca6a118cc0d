"""Safetensors checkpoints read and written by offset: a part of a tensor at a time, whatever the size of the model.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with each
tensor's dtype, shape and place, then the tensors' bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""

IDENTITY_BYTES = 4096
"""Of each tensor that `identity` looks at."""

COPY_BYTES = 16 * 2**20
"""Copied at once."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start to stop (of its first axis), read into memory of their own."""
        if not self.shape:
            return self._read(0, self.dtype.itemsize).view(())
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        block = self._read(start * self.row_bytes, (stop - start) * self.row_bytes)
        return block.view(stop - start, *self.shape[1:])

    def _read(self, start: int, length: int) -> torch.Tensor:
        content = bytearray(length)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            got = _fill(file, memoryview(content))
        if got < length:
            raise UserError(f"{self.file}: ends in the middle of a tensor: {got} of {length} bytes")
        return torch.frombuffer(content, dtype=self.dtype) if length else torch.empty(0, dtype=self.dtype)


def _fill(file: Any, buffer: memoryview) -> int:
    got = 0
    while got < len(buffer) and (count := file.readinto(buffer[got:])):
        got += count
    return got


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> tensor of one file. Raises UserError: no safetensors, or truncated."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(f"{path}: not a safetensors file, or a truncated one ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the safetensors header cannot be read: {error!r}") from error
    end = max((one.offset + one.nbytes for one in tensors.values()), default=8 + length)
    if end > size:
        raise UserError(f"{path}: truncated: {size:,} bytes, its header speaks of {end:,}")
    return tensors


def _stored(path: Path, start: int, entry: Mapping[str, Any]) -> Stored:
    first, last = entry["data_offsets"]
    stored = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
    if last - first != stored.nbytes:
        raise ValueError(f"{last - first} bytes for {stored.shape} {entry['dtype']}")
    return stored


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Name -> tensor of a model folder, in the order of its files. Raises UserError, saying how to repair it."""
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in dict.fromkeys(weight_map.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            some = ", ".join(missing[:3])
            raise UserError(f"{folder}: {len(missing)} of {len(files)} weight files are missing: {some}")
        tensors = {name: stored for file in files for name, stored in read_header(file).items()}
        absent = sorted(weight_map.keys() - tensors.keys())
        if absent:
            raise UserError(f"{folder}: its index names {len(absent)} tensors that no file has: {absent[:3]}")
        return tensors
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise UserError(
            f"{folder}: holds pickles ({pickles[0]}), which can run code when they are opened; convert them on a "
            f"machine that may: load the model with transformers there, and save_pretrained writes safetensors"
        )
    raise UserError(f"{folder}: expected safetensors weights ({SINGLE}, or {INDEX}), found none")


def identity(tensors: Mapping[str, Stored]) -> str:
    """A digest that tells one checkpoint from another without reading all of it: names, shapes, and how each begins."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            begin = file.read(min(stored.nbytes, IDENTITY_BYTES))
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode() + begin)
    return digest.hexdigest()


@dataclass(frozen=True)
class Planned:
    """A tensor to be written, and how its bytes come about."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]] | Stored
    """Blocks of rows, in order; or a stored tensor to copy as it is."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Mapping[str, Planned], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, of at most `shard_bytes` each (or one tensor)."""
    shards: list[list[str]] = []
    size = shard_bytes + 1
    for name, planned in tensors.items():
        if size + planned.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += planned.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, list[str]], tensors: Mapping[str, Planned]) -> None:
    """The index that transformers wants beside several files."""
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": sum(one.nbytes for one in tensors.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(path: Path, tensors: Mapping[str, Planned], track: Callable[[int], None] = lambda count: None) -> None:
    """One file, whole or not there; `track` is told of bytes as they are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, planned in tensors.items():
        entry = {"dtype": CODES[planned.dtype], "shape": list(planned.shape)}
        header[name] = {**entry, "data_offsets": [place, place + planned.nbytes]}
        place += planned.nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb", buffering=0) as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, planned in tensors.items():
            written = 0
            for block in _bytes_of(planned):
                file.write(block)
                written += len(block)
                track(len(block))
            assert written == planned.nbytes, f"{name}: {written} bytes written, {planned.nbytes} planned"
        os.fsync(file.fileno())
    partial.replace(path)


def _bytes_of(planned: Planned) -> Iterator[memoryview | bytes]:
    if isinstance(planned.blocks, Stored):
        yield from _copy(planned.blocks)
        return
    for block in planned.blocks():
        assert block.dtype == planned.dtype
        yield memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy())


def _copy(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.offset)
        left = stored.nbytes
        while left:
            content = file.read(min(left, COPY_BYTES))
            if not content:
                raise UserError(f"{stored.file}: ends in the middle of a tensor: {left} bytes are missing")
            left -= len(content)
            yield content
