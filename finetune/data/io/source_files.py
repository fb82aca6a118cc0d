"""A source's paths -> its data files, their unchanged records, and a digest of their content."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune.data.io import hub, img2dataset
from finetune.data.io.byte_streams import COMPRESSIONS, OnBroken, Record, until_broken
from finetune.data.io.json_files import read_json
from finetune.data.io.jsonl_csv import read_csv, read_json_lines
from finetune.data.io.parquet_arrow import read_arrow, read_parquet
from finetune.data.io.paths import (
    IMAGE_SUFFIXES,
    exists,
    expand,
    files_below,
    folders_of,
    is_folder,
    is_image_folder,
    locate,
)
from finetune.data.io.remote import entry_of
from finetune.data.io.tars import COMPRESSED_TARS, read_tar
from finetune.distributed.node_group import ALONE, NodeGroup
from finetune.recipe.schema import Source
from finetune.recipe.urls import is_remote, shown
from modeling.atomic_files import open_regular
from modeling.cpu_cores import available_cores
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
        raise UserError(f"{shown(path)}: expected a file that ends in {', '.join(READERS)}")
    return max(fitting, key=len)


def files_of(source: Source) -> list[Path]:
    """Return the data files of a source, in order: a folder means those below it, a pattern those that it matches.

    Raises UserError: a path that leads to none.
    """
    found: list[Path] = []
    for path in source.paths:
        files = (_data_files(match, source.split) if is_folder(match) else [match] for match in expand(path))
        distinct = list(dict.fromkeys(chain.from_iterable(files)))  # ** matches a folder and also those below it
        found += img2dataset.samples_first(distinct)
    return found


def _data_files(folder: Path, split: str) -> list[Path]:
    if exists(folder / "dataset_dict.json"):
        states = [path for path in files_below(folder) if path.name == "state.json" and path.parent.parent == folder]
        splits = [state.parent.name for state in states]
        if split not in splits:
            raise UserError(f"{shown(folder)}: expected split {' or '.join(splits)}, got {split!r}")
        folder = folder / split
    known = tuple(READERS)
    files = [path for path in files_below(folder) if path.name.lower().endswith(known) and not _describes(path)]
    if not files:
        raise UserError(f"{shown(folder)}: no data file below it; expected {', '.join(READERS)}")
    return files


def _describes(path: Path) -> bool:
    """Return whether a file is one that the datasets library writes beside its data, which its own reader skips."""
    cached = path.name.startswith("cache-") and path.suffix == ".arrow" and exists(path.parent / "state.json")
    return cached or path.name in _NO_RECORDS


def fingerprint(source: Source, cache: Path | None = None, nodes: NodeGroup = ALONE) -> str:
    """Return the SHA-256 over the content of all that a source reads, in hexadecimal; several nodes divide the reading.

    For a folder, it covers the names of all files below (splits and captions depend on them), and the content of all
    files but images. Archives of images are hashed like any file, a dataset on the hub by its version; folders of
    `image_root` are left out, but for names and sizes of img2dataset's shards. A remote file is not read: the checksum
    that its storage gives (or else the date), and its size, are trusted. `cache` is a JSON file that keeps the hashes
    of files, so that unchanged ones are not read again.
    """
    names, files = nodes.on_main("list files", lambda: _read_by(source))
    try:
        hashes = _hash_files(files, cache, nodes)
    except OSError as error:
        raise UserError(f"{error.filename}: a file that cannot be read: {error.strerror}") from error
    return hashlib.sha256(json.dumps([*names, *hashes]).encode()).hexdigest()


def stat_fingerprint(source: Source) -> str:
    """Return a hash over names, sizes and times of change of all files that a source reads, without reading them.

    Of remote files, the versions count.
    """
    names, files = _read_by(source)
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([names, stats]).encode("utf-8", "surrogateescape")).hexdigest()


def _read_by(source: Source) -> tuple[list[str], list[Path]]:
    """Return (names and versions of remote files on which it depends what is read; local files, by their content)."""
    names: list[str] = []
    files: list[Path] = []
    for path in (Path(source.hub),) if source.hub else chain.from_iterable(map(expand, source.paths)):
        if source.hub and not path.is_dir():
            names.append(hub.name_of_version(source))
        elif is_folder(path):
            below = files_below(path)
            names += [file.relative_to(path).as_posix() for file in below]
            files += [file for file in below if file.suffix.lower() not in IMAGE_SUFFIXES]
        else:
            files += files_of(source.at(path))
    roots = {outer for path in source.image_roots for outer, _ in locate(path)}
    files += [outer for outer in sorted(roots) if not is_image_folder(outer)]
    folders = [root for root in sorted(roots) if is_image_folder(root) and not is_remote(root)]
    shards = [shard for root in folders for shard in img2dataset.image_shards(root)]
    names += [f"{shard.name} {shard.stat().st_size}" for shard in shards]
    names += [entry_of(file).version for file in files if is_remote(file)]
    return names, [file for file in files if not is_remote(file)]


def hash_share(source: Source, cache: Path, node: NodeGroup) -> None:
    """Hash one node's share of the files that a source reads; `fingerprint` finds the hashes."""
    _, files = _read_by(source)
    _hash_files([*node.share(files)], cache, ALONE)


def is_hashed(source: Source, cache: Path) -> bool:
    """Return whether `fingerprint` knows the hashes of all files."""
    kept = _load(cache)
    return all(_fits(kept.get(str(file.resolve())), _version(file)) for file in _read_by(source)[1])


HASHED_BYTES = 2**26
"""Number of bytes of a file that are hashed at once; the hash of a larger file is that of its pieces' hashes."""

_SETTLED_NS = 2 * 10**9
"""A file changed less than so long ago may change again within one tick of its clock: its hash is not kept."""


def _hash_files(files: list[Path], cache: Path | None, nodes: NodeGroup) -> list[str]:
    """Return the SHA-256 of each file, from the cache as long as its size and time of change are the same."""
    kept, versions = nodes.on_main("look for hashes", lambda: (_load(cache), [_version(file) for file in files]))
    keys = [str(file.resolve()) for file in files]
    known = {key: kept[key][2] for key, version in zip(keys, versions, strict=True) if _fits(kept.get(key), version)}
    unknown = {
        key: (file, version) for file, key, version in zip(files, keys, versions, strict=True) if key not in known
    }
    pieces = [
        (key, file, start)
        for key, (file, (size, _)) in unknown.items()
        for start in range(0, max(size, 1), HASHED_BYTES)
    ]

    def hash_pieces() -> list[bytes]:
        with ThreadPoolExecutor(available_cores()) as threads:
            return list(threads.map(_hash_piece, nodes.share(pieces)))

    shares = nodes.each("hash files", hash_pieces) if pieces else []
    of_file: dict[str, list[bytes]] = {key: [] for key in unknown}
    for number, (key, _, _) in enumerate(pieces):
        of_file[key].append(shares[number % nodes.of][number // nodes.of])
    for key, hashes in of_file.items():
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(hashes)).digest()
        known[key] = whole.hex()
    if cache and unknown:
        now = time.time_ns()
        settled = {
            key: [*version, known[key]] for key, (_, version) in unknown.items() if now - version[1] > _SETTLED_NS
        }
        nodes.on_main("keep the hashes", lambda: _save(cache, settled))
    return [known[key] for key in keys]


def _hash_piece(piece: tuple[str, Path, int]) -> bytes:
    _, path, start = piece
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(start)
        for done in range(0, HASHED_BYTES, 2**20):
            digest.update(file.read(min(2**20, HASHED_BYTES - done)))
    return digest.digest()


def _version(file: Path) -> tuple[int, int]:
    """Return a file's size and time of change in nanoseconds."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _fits(entry: object, version: tuple[int, int]) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and entry[:2] == [*version] and isinstance(entry[2], str)


def _load(cache: Path | None) -> dict[str, Any]:
    try:
        loaded = json.loads(cache.read_bytes()) if cache else {}
    except (OSError, ValueError):  # an unreadable cache is written again
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _save(cache: Path, hashes: dict[str, Any]) -> None:
    """Add hashes to those in the cache, which several processes may do at once."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_name(f".{cache.name}.lock")):
        unfinished = cache.with_name(f"{cache.name}.partial")
        unfinished.write_text(json.dumps(_load(cache) | hashes, indent=0), encoding="utf-8")
        unfinished.replace(cache)
