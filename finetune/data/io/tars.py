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
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import BrokenFileError, Record, lost_after, open_file
from finetune.data.io.jsonl_csv import as_record, parse_json

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst")

MAX_HEADER_BYTES = 2**20
"""Largest header of one member in bytes, with its extensions; without a limit, a chain of headers could be endless."""

_TEXTS = ("txt", "text", "caption", "cls")


@dataclass(frozen=True)
class Member:
    """A file of a tar archive, or the error in place of one."""

    name: str
    content: Slice | bytes | RecordError
    """Its position in a plain archive, its bytes in a compressed one."""


def read_tar(path: Path) -> Iterator[Record]:
    """Yield one record for consecutive files of one key: {"__key__": key, "jpg": image, "txt": text, ...}.

    The values in a sample's JSON file become fields beside them. Where the archive breaks off, its last sample may lack
    files: it is left out. Raises BrokenFileError.
    """
    for key, members in groupby(read_members(path), key=_key):
        if key is not None:
            yield f"{path.name}/{key}", _sample(key, members)
            continue
        for member in members:
            detail = f"expected a file named KEY.jpg, KEY.txt or the like, got {member.name:.200}"
            yield f"{path.name}/{member.name}", RecordError("not a sample", detail)


def _key(member: Member) -> str | None:
    """Return the key of a member's sample, by webdataset's rule: it ends at the first dot of the file's name."""
    named = _KEY.fullmatch(member.name)
    return named["key"] if named else None


_KEY = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.[^/]+", re.DOTALL)


def _sample(key: str, members: Iterable[Member]) -> dict[str, Any] | RecordError:
    sample: dict[str, Any] = {"__key__": key}
    beside: dict[str, Any] = {}
    size = 0
    for member in members:
        suffix = member.name[len(key) + 1 :].lower()
        value = _value(suffix, member.content)
        size += len(value) if isinstance(value, bytes | str) else 0
        if isinstance(value, RecordError):
            return value
        if suffix in sample:
            return RecordError("not a sample", f"two files {key:.200}.{suffix:.80}")
        if size > byte_streams.MAX_RECORD_BYTES:
            return RecordError("record too large", f"{key:.200}: over {byte_streams.MAX_RECORD_BYTES:,} bytes")
        if isinstance(value, dict):
            beside |= value
        else:
            sample[suffix] = value
    return {**beside, **sample}


def _value(
    suffix: str, content: Slice | bytes | RecordError
) -> Slice | bytes | str | dict[str, Any] | list[Any] | RecordError:
    """Return a text or a JSON value for a member that holds one, and other content as it is."""
    ending = suffix.rpartition(".")[2]
    if isinstance(content, RecordError) or ending not in ("json", *_TEXTS):
        return content
    if isinstance(content, Slice) and content.length > byte_streams.MAX_RECORD_BYTES:
        return RecordError("record too large", f"{suffix:.80}: {content.length:,} bytes")
    read = encoded(Image(content))
    if ending == "json":
        value = parse_json(read)
        of_objects = isinstance(value, list) and all(isinstance(item, dict | str) for item in value)
        return value if isinstance(value, list) and of_objects else as_record(value)
    try:
        return read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RecordError("not UTF-8", f"{error.reason} at byte {error.start} of the {suffix:.80}")


def read_members(path: Path) -> Iterator[Member]:
    """Yield the files of an archive in order; folders are passed over. Raises BrokenFileError."""
    plain = path.suffix.lower() == ".tar"
    with open_file(path) as file:
        forward = _Forward(file, path.stat().st_size if plain else None)
        archive = None
        while True:
            start = max(forward.tell(), archive.offset) if archive else 0
            forward.header_bytes = 0
            try:
                archive = archive or tarfile.TarFile(fileobj=cast(BinaryIO, forward))
                member = archive.next()
                archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps them all
                if member is None and forward.latest.strip(b"\0"):
                    raise tarfile.ReadError("no header of a member")
                content = None if member is None or member.isdir() else _content(path, forward, member)
            except BrokenFileError:
                raise
            except Exception as error:  # a damaged header makes tarfile raise errors of many kinds
                lost = lost_after(start, forward.size) if forward.size else "what follows was not read"
                detail = f"{error or type(error).__name__}, at byte {start:,}"
                raise BrokenFileError("corrupt file", detail, lost) from error
            if member is None:
                return
            if content is not None:
                yield Member(member.name, content)


def _content(path: Path, file: "_Forward", member: tarfile.TarInfo) -> Slice | bytes | RecordError:
    """Return a member's position in a plain archive, its bytes in a compressed one. Raises tarfile.ReadError."""
    end = member.offset_data + member.size
    if member.size < 0 or (file.size is not None and member.isreg() and end > file.size):
        raise tarfile.ReadError(f"{member.name:.200}: {member.size:,} bytes, which the archive does not have")
    if not member.isreg() or member.issparse():
        return RecordError("not a file", f"{member.name:.200}: a link or the like in the archive")
    if file.size is not None:
        return Slice(path, member.offset_data, member.size)
    if member.size > byte_streams.MAX_RECORD_BYTES:
        return RecordError("record too large", f"{member.name:.200}: {member.size:,} bytes")
    file.seek(member.offset_data)
    content = file.read_data(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name:.200}: the archive ends before it does")
    return content


class _Forward:
    """A file that tarfile can only read onwards, with headers of bounded size; `latest` is what it read last.

    tarfile takes a damaged header for the end of an archive; `latest` distinguishes the two.
    """

    def __init__(self, file: BinaryIO, size: int | None):
        self._file, self._position, self.latest = file, 0, b""
        self.size = size
        """Bytes of a plain archive; None for a compressed one."""
        self.header_bytes = 0
        """Bytes of headers read since the last member."""

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
