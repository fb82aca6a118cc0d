"""A source's paths -> its data files, their unchanged records, and a digest of their content."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.io import hub, img2dataset
from finetune.data.io.byte_streams import COMPRESSIONS, OnBroken, Record, until_broken
from finetune.data.io.json_files import read_json
from finetune.data.io.jsonl_csv import read_csv, read_json_lines
from finetune.data.io.parquet_arrow import read_arrow, read_parquet
from finetune.data.io.paths import IMAGE_SUFFIXES, expand, files_below, folders_of, locate
from finetune.data.io.tars import COMPRESSED_TARS, read_tar
from finetune.recipe.schema import Source
from modeling.atomic_files import open_regular
from modeling.errors import UserError

Reader = Callable[..., Iterator[Record]]

_TEXT_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
}
READERS: dict[str, Reader] = {
    **{name + packed: read for name, read in _TEXT_READERS.items() for packed in ("", *COMPRESSIONS)},
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **dict.fromkeys((".tar", *COMPRESSED_TARS), read_tar),
}
"""Suffix of a file -> the function that reads it."""

_NO_RECORDS = (*hub.SAVED, "dataset_info.json", "dataset_infos.json")
"""Files of the datasets library that hold no records."""


@dataclass(frozen=True)
class DataFile:
    """A data file of a source, or a part of one."""

    path: Path
    folder: str = ""
    """Its folder below the common one of the source's paths. Record ids begin with it: images may be relative to it."""
    start: int = 0
    """First byte of a .jsonl file, or first row group of a Parquet file."""
    stop: int | None = None
    """The byte or row group after the last one; None: the end of the file."""


def read_source(source: Source, file: DataFile | None = None, shard: tuple[int, int] | None = None) -> Iterator[Record]:
    """Yield (record id, record) of all files of a source or of one `file`, or of (a `shard` of) its dataset on the hub.

    Raises UserError: a path or hub id that leads to nothing, an unknown suffix, a file that breaks off; with
    `on_broken: keep`, a BrokenFileError takes the place of the records that are lost.
    """
    if source.hub:
        yield from until_broken(source.hub, hub.read_hub(source, shard), source.on_broken)
        return
    for one in [file] if file else data_files(source):
        for record_id, record in read_file(one.path, source.split, source.on_broken, start=one.start, stop=one.stop):
            yield f"{one.folder}/{record_id}" if one.folder else record_id, record


def data_files(source: Source) -> list[DataFile]:
    """Return the data files of a source, in order. Raises UserError: a path to nothing, or an unknown suffix."""
    files = files_of(source)
    for path in files:
        _suffix(path)
    common = os.path.commonpath(folders_of(source.paths)) if source.paths else ""
    folders = [path.absolute().parent.relative_to(common).as_posix() for path in files]
    return [DataFile(path, "" if folder == "." else folder) for path, folder in zip(files, folders, strict=True)]


def read_file(
    path: Path, split: str, on_broken: OnBroken = "keep", *, start: int = 0, stop: int | None = None
) -> Iterator[Record]:
    """Return the records of one file or of a part of it; of a JSON file with a list for each split, those of `split`.

    Raises UserError: an unknown suffix.
    """
    read = READERS[_suffix(path)]
    options: dict[str, Any] = {"split": split} if read is read_json else {}
    if start or stop is not None:
        options |= {"start": start, "stop": stop}
    records = read(path, **options)
    return until_broken(path, img2dataset.join_images(path, records) if read is read_parquet else records, on_broken)


def _suffix(path: Path) -> str:
    """Return the longest suffix of a file's name that can be read. Raises UserError: there is none."""
    fitting = [suffix for suffix in READERS if path.name.lower().endswith(suffix)]
    if not fitting:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    return max(fitting, key=len)


def files_of(source: Source) -> list[Path]:
    """Return the data files of a source, in order: a folder means those below it, a pattern those that it matches.

    Raises UserError: a path that leads to none.
    """
    found: list[Path] = []
    for path in source.paths:
        files = (_data_files(match, source.split) if match.is_dir() else [match] for match in expand(path))
        distinct = list(dict.fromkeys(chain.from_iterable(files)))  # ** matches a folder and also those below it
        found += img2dataset.without_descriptions(distinct)
    return found


def _data_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(state.parent.name for state in folder.glob("*/state.json"))
        if split not in splits:
            raise UserError(f"{folder}: expected split {' or '.join(splits)}, got {split!r}")
        folder = folder / split
    known = tuple(READERS)
    files = [path for path in files_below(folder) if path.name.lower().endswith(known) and path.name not in _NO_RECORDS]
    if not files:
        raise UserError(f"{folder}: no data file below it; expected {', '.join(READERS)}")
    return files


def fingerprint(source: Source, cache: Path | None = None) -> str:
    """Return the SHA-256 over the content of all that a source reads, in hexadecimal.

    For a folder, it covers the names of all files below (splits and captions depend on them), and the content of all
    files but images. Archives of images are hashed like any file, a dataset on the hub by its version; folders of
    `image_root` are left out. `cache` is a JSON file that keeps the digests of files, so that unchanged ones are not
    read again.
    """
    parts: list[str] = []
    files: list[Path] = []
    for path in (Path(source.hub),) if source.hub else chain.from_iterable(map(expand, source.paths)):
        if source.hub and not path.is_dir():
            parts.append(hub.name_of_version(source))
        elif path.is_dir():
            below = files_below(path)
            parts += [file.relative_to(path).as_posix() for file in below]
            files += [file for file in below if file.suffix.lower() not in IMAGE_SUFFIXES]
        else:
            files += files_of(source.at(path))
    roots = {outer for path in source.image_roots for outer, _ in locate(path)}
    files += [outer for outer in sorted(roots) if not outer.is_dir()]
    try:
        parts += _digests(files, cache)
    except OSError as error:
        raise UserError(f"{error.filename}: a file that cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


_SETTLED_NS = 2 * 10**9
"""A file changed less than so long ago may change again within one tick of its clock: its digest is not kept."""


def _digests(files: list[Path], cache: Path | None) -> list[str]:
    """Return the SHA-256 of each file, from the cache as long as its size and time of change are the same."""
    kept: dict[str, object] = {}
    if cache:
        with suppress(OSError, ValueError):  # an unreadable cache is written again
            loaded = json.loads(cache.read_bytes())
            kept = loaded if isinstance(loaded, dict) else {}
    digests = []
    for file in files:
        stat, key = file.stat(), str(file.resolve())
        version = [stat.st_size, stat.st_mtime_ns]
        entry = kept.get(key)
        if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == version and isinstance(entry[2], str)):
            with open_regular(file) as opened:
                entry = [*version, hashlib.file_digest(opened, "sha256").hexdigest()]
            if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
                kept[key] = entry
        digests.append(str(entry[2]))
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")  # several processes may write at once
        unfinished.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        unfinished.replace(cache)
    return digests
