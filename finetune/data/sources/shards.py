"""Tar archives -> their members, and webdataset shards -> records."""

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune.data.dialogue import Image, RecordError, Slice
from finetune.data.images import encoded
from finetune.data.sources import streams
from finetune.data.sources.json_files import parse_record
from finetune.data.sources.source import Record
from finetune.data.sources.streams import open_file, until_corrupt

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst")

_TEXTS = ("txt", "text", "caption", "cls")


@dataclass(frozen=True)
class Member:
    """A file of a tar archive, or what stands in the place of one."""

    name: str
    content: Slice | bytes | RecordError
    """Of a plain archive its place, of a compressed one its bytes."""


def read_members(path: Path) -> Iterator[Member]:
    """The files of an archive, in order; folders are passed over. Raises OSError, EOFError or tarfile.TarError."""
    plain = path.suffix.lower() == ".tar"
    with open_file(path) as file:
        watched = _Forward(file)
        archive = tarfile.TarFile(fileobj=cast(BinaryIO, watched))
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps them all
            if not member.isdir():
                yield Member(member.name, _content(path if plain else None, archive, member))
        if watched.latest.strip(b"\0"):
            raise tarfile.ReadError(f"byte {archive.offset}: no header of a member")


def _content(path: Path | None, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Slice | bytes | RecordError:
    if not member.isreg() or member.issparse():
        return RecordError("not a file", f"{member.name}: a link or the like in the archive")
    if path:
        if member.offset_data + member.size > path.stat().st_size:
            raise tarfile.ReadError(f"{member.name}: the archive ends before it does")
        return Slice(path, member.offset_data, member.size)
    if member.size > streams.MAX_RECORD_BYTES:
        return RecordError("record too large", f"{member.name}: {member.size:,} bytes")
    content = archive.extractfile(member)
    assert content is not None
    read = content.read()
    if len(read) < member.size:
        raise tarfile.ReadError(f"{member.name}: the archive ends before it does")
    return read


class _Forward:
    """A file as tarfile reads it: onwards only; `latest` holds what it read last.

    tarfile takes a damaged header for the end of an archive; that is told from a real end by `latest`.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._position, self.latest = file, 0, b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        assert position >= self._position
        if self._file.seekable():
            self._position = self._file.seek(position)
        while self._position < position and self.read(min(2**20, position - self._position)):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        if size > streams.MAX_RECORD_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.latest = self._file.read(size)
        self._position += len(self.latest)
        return self.latest


_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<kind>[^/]+)", re.DOTALL)
"""webdataset's rule: the key ends at the first dot of the file's name."""


def read_shard(path: Path) -> Iterator[Record]:
    """Files that follow each other with one key are one record, {"__key__": key, "jpg": image, "txt": text, ...}.

    What its JSON file holds stands beside them. Where an archive breaks off, its last record may lack files: it is left
    out.
    """
    return until_corrupt(path.name, _shard_records(path), (tarfile.TarError,))


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


def _value(kind: str, content: Slice | bytes | RecordError) -> Slice | bytes | str | dict[str, Any] | RecordError:
    ending = kind.rpartition(".")[2]
    if isinstance(content, RecordError) or ending not in ("json", *_TEXTS):
        return content
    read = encoded(Image(content))
    if ending == "json":
        return parse_record(read)
    try:
        return read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start} of the {kind:.80}")
