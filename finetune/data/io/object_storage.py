"""Files in object storage and on the hub (s3://, gs://, hf://), listed and read through fsspec."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from finetune.recipe.urls import shown
from modeling.errors import UserError

PAUSES_S = (1.0, 5.0)
"""Seconds to wait before another attempt, after each one that failed without being refused."""

Result = TypeVar("Result")


class NothingThereError(UserError):
    """A URL leads to nothing."""


@dataclass(frozen=True)
class Entry:
    """What a listing says about a file or a folder."""

    is_folder: bool
    size: int
    """Number of bytes of a file."""
    version: str
    """Changes with the file's content: its checksum, or else its size and date."""


def find(url: str) -> Entry:
    """Return what is at a URL. Raises UserError: nothing, no permission, no connection, a package that is missing."""
    return _entry(_attempt(url, lambda filesystem: filesystem.info(url)))


def find_below(url: str) -> dict[str, Entry]:
    """Return the files below a folder, at any depth: URL -> entry. Raises UserError as `find`."""
    return _entries(url, _attempt(url, lambda filesystem: filesystem.find(url, detail=True)))


def match(pattern: str) -> dict[str, Entry]:
    """Return the files and folders that a pattern matches: URL -> entry. Raises UserError as `find`."""
    return _entries(pattern, _attempt(pattern, lambda filesystem: filesystem.glob(pattern, detail=True)))


def save(url: str, path: Path) -> Entry:
    """Write a remote file's content into a file, and return what is at the URL then. Raises UserError as `find`."""

    def save(filesystem: Any) -> Entry:
        filesystem.get_file(url, str(path))
        filesystem.invalidate_cache(url)
        entry, size = _entry(filesystem.info(url)), path.stat().st_size
        if size != entry.size:
            raise ConnectionError(f"got {size:,} of {entry.size:,} bytes")
        return entry

    return _attempt(url, save)


def read(url: str, max_bytes: int) -> bytes:
    """Return the content of a file. Raises UserError as `find`, and for one of more than `max_bytes`."""
    content = _attempt(url, lambda filesystem: filesystem.cat_file(url, start=0, end=max_bytes + 1))
    if len(content) > max_bytes:
        raise UserError(f"{shown(url)}: over {max_bytes:,} bytes")
    return content


def _attempt(url: str, ask: Callable[[Any], Result]) -> Result:
    """Return the filesystem's answer. Raises UserError: it was refused, or failed each time."""
    for pause in (*PAUSES_S, None):
        try:
            with _refusals_explained(url):
                return ask(_filesystem(url))
        except UserError:
            raise
        except Exception as error:  # of any package that fsspec uses
            if is_of_disk(error):
                raise
            if pause is None:
                raise UserError(f"{shown(url)}: {_first_line(error)}{_hint(url)}") from error
            time.sleep(pause)
    raise AssertionError


def is_of_disk(error: Exception) -> bool:
    """Return whether the disk is full, or may not be written to: what is fetched cannot be kept."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _filesystem(url: str) -> Any:
    import fsspec

    return fsspec.filesystem(url.partition("://")[0])


@contextmanager
def _refusals_explained(url: str) -> Iterator[None]:
    """Turn an error that another attempt would meet again into a UserError."""
    scheme = url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(scheme, scheme)
        repair = f"pip install '{f'idefics-finetune[{scheme}]' if scheme in _PACKAGES else package}'"
        raise UserError(f"{shown(url)}: {scheme}:// needs the package {package}: {repair}") from error
    except FileNotFoundError as error:
        raise NothingThereError(f"{shown(url)}: nothing is there") from error
    except PermissionError as error:
        raise UserError(f"{shown(url)}: no permission: {_first_line(error)}{_hint(url)}") from error
    except Exception as error:
        if "credentials" in type(error).__name__.lower():
            raise UserError(f"{shown(url)}: {_first_line(error)}{_hint(url)}") from error
        raise


_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_HINTS = {
    "s3": "credentials and endpoint are found as the AWS tools find them; FSSPEC_S3_ANON=true reads a public bucket",
    "gs": "credentials come from: gcloud auth application-default login; FSSPEC_GS_TOKEN=anon reads a public bucket",
    "hf": "a private or gated dataset needs: hf auth login",
}


def _hint(url: str) -> str:
    hint = _HINTS.get(url.partition("://")[0])
    return f"\n  {hint}" if hint else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]


def _entries(asked: str, infos: dict[str, dict[str, Any]]) -> dict[str, Entry]:
    """Return the listed files by URL. Some storages list a folder as an empty file whose name ends with a slash."""
    scheme = asked.partition("://")[0]
    named = {f"{scheme}://{name.lstrip('/')}": info for name, info in infos.items() if not name.endswith("/")}
    return {url: _entry(info) for url, info in sorted(named.items())}


_VERSIONS = ("ETag", "blob_id", "xet_hash", "md5Hash", "crc32c", "etag", "LastModified", "mtime", "created")
"""The fields under which a filesystem gives a checksum or a date, the most exact first."""


def _entry(info: dict[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    found = next((info[name] for name in _VERSIONS if info.get(name)), "")
    version = found.timestamp() if isinstance(found, datetime) else found
    return Entry(info["type"] == "directory", size, f"{size} {version}")
