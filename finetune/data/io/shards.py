"""Tar archives -> their members, and webdataset shards -> records."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune.data.conversation import Image, RecordError, Slice
from finetune.data.images import encoded
from finetune.data.io import streams
from finetune.data.io.lines import as_record, parse_json
from finetune.data.io.streams import BrokenFileError, Record, lost_after, open_file, until_broken

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst")

MAX_HEADER_BYTES = 2**20
"""Of one member, with all that extends its name: names are shorter, and chains of headers have no other end."""

_TEXTS = ("txt", "text", "caption", "cls")


@dataclass(frozen=True)
class Member:
    """A file of a tar archive, or what stands in the place of one."""

    name: str
    content: Slice | bytes | RecordError
    """Of a plain archive its place, of a compressed one its bytes."""


def read_members(path: Path) -> Iterator[Member]:
    """The files of an archive, in order; folders are passed over. Raises BrokenFileError."""
    plain = path.suffix.lower() == ".tar"
    with open_file(path) as file:
        watched = _Forward(file, path.stat().st_size if plain else None)
        archive = None
        while True:
            start = max(watched.tell(), archive.offset) if archive else 0
            watched.header_bytes = 0
            try:
                archive = archive or tarfile.TarFile(fileobj=cast(BinaryIO, watched))
                member = archive.next()
                archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps them all
                if member is None and watched.latest.strip(b"\0"):
                    raise tarfile.ReadError("no header of a member")
                content = None if member is None or member.isdir() else _content(path, watched, member)
            except BrokenFileError:
                raise
            except Exception as error:  # a damaged header makes tarfile raise errors of many kinds
                lost = lost_after(start, watched.size) if watched.size else "what follows was not read"
                raise BrokenFileError(
                    "corrupt file", f"{error or type(error).__name__}, at byte {start:,}", lost
                ) from error
            if member is None:
                return
            if content is not None:
                yield Member(member.name, content)


def _content(path: Path, file: "_Forward", member: tarfile.TarInfo) -> Slice | bytes | RecordError:
    """Raises tarfile.ReadError."""
    end = member.offset_data + member.size
    if member.size < 0 or (file.size is not None and member.isreg() and end > file.size):
        raise tarfile.ReadError(f"{member.name:.200}: {member.size:,} bytes, which the archive does not have")
    if not member.isreg() or member.issparse():
        return RecordError("not a file", f"{member.name:.200}: a link or the like in the archive")
    if file.size is not None:
        return Slice(path, member.offset_data, member.size)
    if member.size > streams.MAX_RECORD_BYTES:
        return RecordError("record too large", f"{member.name:.200}: {member.size:,} bytes")
    file.seek(member.offset_data)
    content = file.read_data(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name:.200}: the archive ends before it does")
    return content


class _Forward:
    """A file as tarfile reads it: onwards only, its headers of bounded size; `latest` holds what it read last.

    tarfile takes a damaged header for the end of an archive; that is told from a real end by `latest`.
    """

    def __init__(self, file: BinaryIO, size: int | None):
        self._file, self._position, self.latest = file, 0, b""
        self.size = size
        """Of a plain archive, in bytes."""
        self.header_bytes = 0
        """Read since the latest member."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.ReadError(f"a header leads back to byte {position:,}")
        if self._file.seekable():
            self._position = self._file.seek(position)
        while self._position < position and self.read_data(min(2**20, position - self._position)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        self.header_bytes += size
        if size < 0 or self.header_bytes > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"headers of over {MAX_HEADER_BYTES:,} bytes")
        self.latest = self.read_data(size)
        return self.latest

    def read_data(self, size: int) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        return data


_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<kind>[^/]+)", re.DOTALL)
"""webdataset's rule: the key ends at the first dot of the file's name."""


def read_shard(path: Path) -> Iterator[Record]:
    """Files that follow each other with one key are one record, {"__key__": key, "jpg": image, "txt": text, ...}.

    What its JSON file holds stands beside them. Where an archive breaks off, its last record may lack files: it is left
    out.
    """
    return until_broken(path, _shard_records(path))


def _shard_records(path: Path) -> Iterator[Record]:
    for key, members in groupby(read_members(path), key=_key):
        if key is None:
            yield from ((f"{path.name}/{member.name}", _keyless(member)) for member in members)
        else:
            yield f"{path.name}/{key}", _sample(key, members)


def _key(member: Member) -> str | None:
    named = _NAME.fullmatch(member.name)
    return named["key"] if named else None


def _keyless(member: Member) -> RecordError:
    return RecordError("not a sample", f"expected a file named KEY.jpg, KEY.txt or the like, got {member.name:.200}")


def _sample(key: str, members: Iterable[Member]) -> dict[str, Any] | RecordError:
    sample: dict[str, Any] = {"__key__": key}
    beside: dict[str, Any] = {}
    size = 0
    for member in members:
        kind = member.name[len(key) + 1 :].lower()
        value = _value(kind, member.content)
        size += len(value) if isinstance(value, bytes | str) else 0
        if isinstance(value, RecordError):
            return value
        if kind in sample:
            return RecordError("not a sample", f"two files {key:.200}.{kind:.80}")
        if size > streams.MAX_RECORD_BYTES:
            return RecordError("record too large", f"{key:.200}: over {streams.MAX_RECORD_BYTES:,} bytes")
        if isinstance(value, dict):
            beside |= value
        else:
            sample[kind] = value
    return {**beside, **sample}


def _value(
    kind: str, content: Slice | bytes | RecordError
) -> Slice | bytes | str | dict[str, Any] | list[Any] | RecordError:
    ending = kind.rpartition(".")[2]
    if isinstance(content, RecordError) or ending not in ("json", *_TEXTS):
        return content
    read = encoded(Image(content))
    if ending == "json":
        value = parse_json(read)
        of_objects = isinstance(value, list) and all(isinstance(item, dict | str) for item in value)
        return value if isinstance(value, list) and of_objects else as_record(value)
    try:
        return read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start} of the {kind:.80}")
