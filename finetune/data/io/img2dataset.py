"""img2dataset's output folder -> each sample once, and each failed download once.

A shard, here 00000, is written in one of three layouts:

    webdataset   00000.tar                        00000.parquet   00000_stats.json
    files        00000/000000007.jpg .txt .json   00000.parquet   00000_stats.json
    parquet                                       00000.parquet   00000_stats.json

00000.parquet has a row for every URL of the shard, with its status. Only in the last layout does it hold the images,
too; a sample that was not downloaded has a row there, and nothing else. https://github.com/rom1504/img2dataset
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.io.byte_streams import Record
from finetune.data.io.paths import exists
from finetune.recipe.urls import is_remote

STATISTICS = "_stats.json"

ENCODINGS = ("jpg", "png", "webp")
"""Suffixes of the images, and the names of their column in the parquet layout."""

FAILURES = {"failed_to_download": "failed to download", "failed_to_resize": "failed to resize"}
"""Status of a sample without an image -> the reason under which it is counted."""

KEYS = frozenset({"key", "status", "error_message"})
"""Keys that the metadata of every sample has."""


def samples_first(files: Sequence[Path]) -> list[Path]:
    """Return the files that hold samples, in order, then the Parquet files that say of each tar what failed.

    Without a sample of their own are 00000_stats.json and 00000/000000007.json, if a 00000.parquet is beside them.
    """
    present = set(files)
    stems = (file.with_name(file.name.removesuffix(STATISTICS)) for file in files if file.name.endswith(STATISTICS))
    shards = {stem for stem in stems if stem.with_suffix(".parquet") in present}
    without = {_statistics_of(shard) for shard in shards}
    last = {shard.with_suffix(".parquet") for shard in shards if shard.with_suffix(".tar") in present}
    left = [file for file in files if file not in without and (file.suffix != ".json" or file.parent not in shards)]
    return [*(file for file in left if file not in last), *(file for file in left if file in last)]


def _statistics_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}{STATISTICS}")


def repeats_tar(file: Path) -> bool:
    """Return whether a file is the Parquet file of a shard whose samples are in a tar."""
    return file.suffix == ".parquet" and exists(file.with_suffix(".tar")) and exists(_statistics_of(file))


def image_shards(folder: Path) -> list[Path]:
    """Return the tars and Parquet files of images in a folder, in order: those that statistics stand beside."""
    names = {entry.name for entry in os.scandir(folder)}
    shards = []
    for stem in sorted(name.removesuffix(STATISTICS) for name in names if name.endswith(STATISTICS)):
        if stem not in names:  # else the images are files in a folder of this name
            shards += [f"{stem}{suffix}" for suffix in (".tar", ".parquet") if f"{stem}{suffix}" in names][:1]
    return [folder / shard for shard in shards]


def join_images(path: Path, rows: Iterable[Record]) -> Iterator[Record]:
    """Yield the rows of a shard's Parquet file that are samples, or failed; rows of any other file as they are.

    In the layout of files, a sample gets its image: {"jpg": "00000/000000007.jpg"}. In webdataset's, the tar has the
    samples, so that the failures are left.
    """
    shard = path.with_suffix("")
    in_tar = repeats_tar(path)
    in_folder = not in_tar and exists(shard) and exists(_statistics_of(shard))
    for record_id, row in rows:
        if not (in_tar or in_folder) or not isinstance(row, dict) or failure(row) or not row.keys() >= KEYS:
            yield record_id, row
        elif in_folder:
            yield record_id, {**row, **_image_of(shard, str(row["key"]))}


def _image_of(shard: Path, key: str) -> dict[str, str]:
    """Return {"jpg": a sample's image, relative to the folder of its shard}: the first of `ENCODINGS` that exists.

    In a remote folder, it is img2dataset's default: asking for each one would take longer than all the rest.
    """
    found = (suffix for suffix in ENCODINGS if not is_remote(shard) and (shard / f"{key}.{suffix}").is_file())
    suffix = next(found, ENCODINGS[0])
    return {suffix: f"{shard.name}/{key}.{suffix}"}


def failure(sample: dict[str, Any]) -> RecordError | None:
    """Return why a sample has no image; None for one that has, and for a record of another origin."""
    reason = FAILURES.get(str(sample["status"])) if sample.keys() >= KEYS else None
    return RecordError(reason, f"{sample.get('url')!s:.200}: {sample['error_message']!s:.200}") if reason else None
