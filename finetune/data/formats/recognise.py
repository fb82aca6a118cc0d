"""First records of a source -> its format, for `format: auto`; where they differ, the format of each file."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.formats import FORMATS
from finetune.data.formats.documents import METADATA
from finetune.data.formats.read_records import read_first, read_records
from finetune.data.io import img2dataset
from finetune.data.io.byte_streams import Record
from finetune.data.io.paths import IMAGE_SUFFIXES, expand, files_at, is_folder
from finetune.data.io.source_files import READERS, files_of
from finetune.recipe.schema import Source
from finetune.recipe.urls import is_remote
from modeling.errors import UserError

FIRST_RECORDS = 20
"""Records of each file by which a format is recognised."""

FIRST_FILES = 16
"""Files of a source that are read for it, spread over all of them."""

NEAREST = 3
"""Formats that are named in the message where none fits."""


@dataclass(frozen=True)
class Recognised:
    """The format of a source."""

    format: str
    notes: tuple[str, ...] = ()
    """The records and files that are not of this format, for a person to read."""


@dataclass(frozen=True)
class _Sample:
    """The first records of a file."""

    name: str
    records: list[dict[str, Any]]
    errors: list[str]
    """Id and reason of each record that could not be read."""


def recognise_source(source: Source) -> Recognised:
    """Return the format of a source whose recipe says `format: auto`.

    Raises UserError: no record can be read, none is of a known format, or several formats fit equally well.
    """
    if by_files := _by_files(source):
        return Recognised(by_files)
    samples = _samples(source)
    readable = [sample for sample in samples if sample.records]
    broken = [
        f"{sample.name} cannot be read: {sample.errors[0] if sample.errors else f'{sample.name}: no records'}"
        for sample in samples
        if not sample.records
    ]
    if not readable:
        raise UserError("\n  ".join([f"{source.name}: format: auto: no record can be read", *broken[:NEAREST]]))
    try:
        _require_one_kind(readable)
        records = [record for sample in readable for record in sample.records]
        found, others = recognise(records)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    if others:
        seen = ", ".join(f"{count} like {name or 'no known format'}" for name, count in others.items())
        broken.append(f"of its first {len(records)} records, {seen}; all are read as {found}")
    return Recognised(found, tuple(broken))


def recognise(records: Sequence[dict[str, Any]]) -> tuple[str, Counter[str | None]]:
    """Return (the format that fits the most records, the number of other records by their format or None).

    A record that fits several formats is of the more special one. Raises UserError: no format fits, or two formats fit
    equally many of the records.
    """
    ranking = _ranking(records)
    if not ranking:
        raise UserError(_of_no_format(records))
    found, count = ranking[0]
    converter = FORMATS[found].converter
    others: Counter[str | None] = Counter()
    for record in records:
        fitting = [name for name, family in FORMATS.items() if family.fits(record)]
        if not any(FORMATS[name].converter == converter for name in fitting):
            others[next(iter(fitting), None)] += 1
    for other, amount in others.items():
        if other and amount >= count:
            raise UserError(
                f"format: auto: of the first {len(records)} records {count} are {found} and {amount} are {other}; "
                f"set format, or give each its own file and source"
            )
    return found, others


def _ranking(records: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return (format, number of records that it fits) for the formats that fit any, the largest number first."""
    fitting = Counter(name for name, family in FORMATS.items() for record in records if family.fits(record))
    return fitting.most_common()


def _by_files(source: Source) -> str | None:
    """Return the format of a source that its files' names show: texts, and images in folders."""
    paths = [match for path in source.paths for match in (expand(path) if is_remote(path) else [path])]
    below = [file for path in paths for file in files_at(path)]
    shown = [file for file in below if (is_remote(file) or file.is_file()) and not file.name.startswith(".")]
    files = [file for file in shown if file.name not in METADATA]
    if any(file.name.lower().endswith(tuple(READERS)) for file in files):
        return None
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not images:
        return "text" if texts else None
    if not all(map(is_folder, paths)):
        raise UserError(f"{source.name}: format: auto: expected folders of images, got a file; give its folder as path")
    captioned = {file.with_suffix("") for file in texts} & {file.with_suffix("") for file in images}
    if captioned or len(files) < len(shown) or any(file.parent in paths for file in images):
        return "image_folder"
    if not source.prompt:
        raise UserError(
            f"{source.name}: format: auto: images without captions, in folders such as {min(images).parent.name}; "
            f'format: class_folders with prompt: "What is in this image?" or the like trains on the folders\' names'
        )
    return "class_folders"


def _samples(source: Source) -> list[_Sample]:
    if source.hub:
        return [_sample(source.hub, list(islice(read_records(source), FIRST_RECORDS)))]
    files = files_of(source)
    spread = files[:: max(1, -(-len(files) // FIRST_FILES))]
    chosen = [file for file in spread if not img2dataset.repeats_tar(file)] or spread
    common = os.path.commonpath([file.absolute().parent for file in chosen]) if chosen else ""
    names = [file.absolute().relative_to(common).as_posix() for file in chosen]
    return [
        _sample(name, read_first(source, file, count=FIRST_RECORDS)) for name, file in zip(names, chosen, strict=True)
    ]


def _sample(name: str, read: Sequence[Record]) -> _Sample:
    errors = [f"{record_id}: {record}" for record_id, record in read if isinstance(record, RecordError)]
    return _Sample(name, [record for _, record in read if isinstance(record, dict)], errors)


def _require_one_kind(samples: Sequence[_Sample]) -> None:
    """Raises UserError: the files are of different formats; the message says which file is of which."""
    kinds: dict[str, list[str]] = {}
    for sample in samples:
        name = next((name for name, _ in _ranking(sample.records)), None)
        alike = next((kind for kind in kinds if name and FORMATS[kind].converter == FORMATS[name].converter), name)
        if alike:
            kinds.setdefault(alike, []).append(sample.name)
    if len(kinds) > 1:
        which = "; ".join(f"{_some(files)}: {kind}" for kind, files in kinds.items())
        raise UserError(f"format: auto: its files are of several formats: {which}; give each format its own source")


def _of_no_format(records: Sequence[dict[str, Any]]) -> str:
    """Return the message for records that fit no format, with what the formats of the most similar fields read."""
    keys = sorted({str(key) for record in records for key in record})
    shared: Counter[str] = Counter()
    for name, family in FORMATS.items():
        for names in (field.split("|") for field in family.reads):  # "promt" counts as "prompt"
            shared[name] += any(key in names or get_close_matches(key, names, n=1, cutoff=0.8) for key in keys)
    reads = ""
    for name, count in shared.most_common(NEAREST):
        fields = [field.split("|") for field in FORMATS[name].reads]
        short = ", ".join("|".join(names[:3]) + ("|..." if len(names) > 3 else "") for names in fields)
        reads += f"\n  {name} reads {short}" if count else ""
    return (
        f"format: auto: {len(records)} records with the keys {_some(keys)} are of no known format; set format, and "
        f"columns where the names differ{reads}\n  formats: {', '.join(FORMATS)}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - FIRST_RECORDS} more" if len(names) > FIRST_RECORDS else ""
    return (", ".join(names[:FIRST_RECORDS]) or "(none)") + more
