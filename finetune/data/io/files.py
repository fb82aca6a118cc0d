"""Source -> its files, their records, and a digest of both."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.field_names import IMAGE_SUFFIXES
from finetune.data.io import hub
from finetune.data.io.json_files import read_header, read_items, read_json, read_keys, read_pairs
from finetune.data.io.lines import read_csv, read_json_lines
from finetune.data.io.paths import expand, files_below, folders_of, locate
from finetune.data.io.samples import unfold
from finetune.data.io.shards import COMPRESSED_TARS, read_shard
from finetune.data.io.streams import COMPRESSIONS, Record, stop_if_broken
from finetune.data.io.tables import read_arrow, read_parquet
from finetune.recipe.schema import Source
from modeling.errors import UserError
from modeling.files import open_regular

__all__ = [
    "files_of",
    "fingerprint",
    "read_first",
    "read_header",
    "read_items",
    "read_keys",
    "read_pairs",
    "read_records",
    "refuse_columns",
]

Reader = Callable[[Path, str], Iterator[Record]]
"""(path, split) -> records."""


def _plain(read: Callable[[Path], Iterator[Record]]) -> Reader:
    return lambda path, split: read(path)


_TEXT_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": _plain(read_json_lines),
    ".ndjson": _plain(read_json_lines),
    ".csv": _plain(partial(read_csv, delimiter=",")),
    ".tsv": _plain(partial(read_csv, delimiter="\t")),
}
READERS: dict[str, Reader] = {
    **{name + packed: read for name, read in _TEXT_READERS.items() for packed in ("", *COMPRESSIONS)},
    ".parquet": _plain(read_parquet),
    ".arrow": _plain(read_arrow),
    **{name: _plain(read_shard) for name in (".tar", *COMPRESSED_TARS)},
}
"""How a file of each suffix is read."""

_BOOKKEEPING = (*hub.SAVED, "dataset_info.json", "dataset_infos.json")
"""Files of the datasets library that hold no records."""


def files_of(source: Source) -> list[Path]:
    """The data files of a source, in order: a folder stands for those below it, a pattern for those it fits.

    Raises UserError: a path that leads to none.
    """
    return [file for path in source.paths for file in _data_files_at(path, source.split)]


def _data_files_at(path: Path, split: str) -> list[Path]:
    found = [file for place in expand(path) for file in (_data_files(place, split) if place.is_dir() else [place])]
    return list(dict.fromkeys(found))  # ** fits a folder and also those below it


def _data_files(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(state.parent.name for state in folder.glob("*/state.json"))
        if split not in splits:
            raise UserError(f"{folder}: expected split {' or '.join(splits)}, got {split!r}")
        folder = folder / split
    files = [path for path in files_below(folder) if _suffix(path) and path.name not in _BOOKKEEPING]
    if not files:
        raise UserError(f"{folder}: no data file below it; expected {_known()}")
    return files


def _suffix(path: Path) -> str | None:
    """The longest suffix of a file's name that can be read."""
    fitting = [suffix for suffix in READERS if path.name.lower().endswith(suffix)]
    return max(fitting, key=len, default=None)


def _known() -> str:
    return ", ".join(READERS)


def read_records(source: Source) -> Iterator[Record]:
    """(place, record), columns renamed.

    Raises UserError: a path or hub id that leads to nothing, a suffix that is not known, a column that no record has,
    a file that breaks off; with `on_broken: keep`, BrokenFileError stands in the place of what is lost of it.
    """
    records = hub.read_hub(source) if source.hub else _read_files(source)
    return _rename(source, unfold(stop_if_broken(records, source.on_broken), source.columns))


def _read_files(source: Source) -> Iterator[Record]:
    readers = [(_reader(path), path) for path in files_of(source)]
    common = os.path.commonpath(folders_of(source.paths)) if source.paths else ""
    for read, path in readers:
        folder = path.absolute().parent.relative_to(common)  # where the record's images may lie, too
        for place, record in read(path, source.split):
            yield (folder / place).as_posix() if folder.parts else place, record


def read_first(source: Source, path: Path, *, count: int) -> list[Record]:
    """The first records of one of a source's files, columns renamed where they are there."""
    records = unfold(_reader(path)(path, source.split), source.columns)
    return [(place, renamed(record, source.columns)) for place, record in islice(records, count)]


def _reader(path: Path) -> Reader:
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path}: expected a file that ends in {_known()}")
    return READERS[suffix]


def refuse_columns(source: Source) -> None:
    """Raises UserError: `columns` for files whose names are part of their format."""
    if source.columns:
        raise UserError(f"{source.name}: columns: the files of format {source.format} are read by their own names")


def _rename(source: Source, records: Iterable[Record]) -> Iterator[Record]:
    missing, got = set(source.columns.values()), None
    for place, record in records:
        if isinstance(record, dict) and source.columns:
            missing -= record.keys()
            got = got or list(record)
        yield place, renamed(record, source.columns)
    if missing and got:
        raise UserError(
            f"{source.name}: columns: no record has {', '.join(sorted(missing))}; the first has {', '.join(got)}"
        )


def renamed(record: dict[str, Any] | RecordError, columns: Mapping[str, str]) -> dict[str, Any] | RecordError:
    """A record under the names that its format expects."""
    if isinstance(record, RecordError) or not columns:
        return record
    kept = {name: value for name, value in record.items() if name not in columns.values()}
    return {**kept, **{name: record[actual] for name, actual in columns.items() if actual in record}}


def fingerprint(source: Source, cache: Path | None = None) -> str:
    """SHA-256 over the content of all that a source reads, in hexadecimal.

    Of a folder count the names of all files below it (splits and captions go by names), and the content of those that
    are no images; archives and stores of images as any file; a dataset on the hub by its version there; folders of
    `image_root` not at all. `cache` is a JSON file where the digests of files are kept, so that those that
    did not change are not read again.
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
"""A file changed so recently may change again within one tick of its clock: its digest is not kept."""


def _digests(files: list[Path], cache: Path | None) -> list[str]:
    """SHA-256 of each file, from the cache as long as size and time of change are the same."""
    kept = _load(cache) if cache else {}
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
        unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        unfinished.replace(cache)
    return digests


def _load(cache: Path) -> dict[str, object]:
    """What an earlier call kept; nothing, if that cannot be read."""
    try:
        kept = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
