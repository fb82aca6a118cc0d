"""First records of a source -> its format, for `format: auto`; where they do not agree, which of them are what."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.field_names import IMAGE_SUFFIXES
from finetune.data.formats import FORMATS, image_folder
from finetune.data.io.files import READERS, files_of, read_first, read_records
from finetune.data.io.streams import Record
from finetune.recipe.schema import Source
from modeling.errors import UserError

FIRST_RECORDS = 20
"""Of each file: by so many a format is recognised."""

FIRST_FILES = 16
"""Of a source with more files, so many are looked into, spread over all of them."""

NEAREST = 3
"""Formats that are named where none fits."""


@dataclass(frozen=True)
class Recognised:
    """The format of a source."""

    format: str
    notes: tuple[str, ...] = ()
    """What was seen that is not of this format."""


@dataclass(frozen=True)
class _Sample:
    """The first records of a file."""

    name: str
    records: list[dict[str, Any]]
    errors: list[str]
    """Place and reason of what could not be read."""

    @property
    def trouble(self) -> str:
        return self.errors[0] if self.errors else f"{self.name}: no records"


def recognise_source(source: Source) -> Recognised:
    """The format of a source that does not say.

    Raises UserError: no record can be read, none is of a known format, or several formats fit as well as each other.
    """
    if by_files := _by_files(source):
        return Recognised(by_files)
    samples = _samples(source)
    readable = [sample for sample in samples if sample.records]
    broken = [f"{sample.name} cannot be read: {sample.trouble}" for sample in samples if not sample.records]
    if not readable:
        raise UserError("\n  ".join([f"{source.name}: format: auto: no record can be read", *broken[:NEAREST]]))
    try:
        _require_one_kind(readable)
        records = [record for sample in readable for record in sample.records]
        found = recognise(records)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    others = Counter(recognise_one(record) for record in records if not _is_of(found, record))
    if others:
        seen = ", ".join(f"{count} like {name or 'no known format'}" for name, count in others.items())
        broken.append(f"of its first {len(records)} records, {seen}; all are read as {found}")
    return Recognised(found, tuple(broken))


def recognise(records: Sequence[dict[str, Any]]) -> str:
    """The format that fits the most records, the more special of equals. Raises UserError: none does, or a tie.

    A tie is between records of two formats; a record that fits several formats is of the more special one.
    """
    ranking = _ranking(records)
    if not ranking:
        raise UserError(_of_no_format(records))
    found, count = ranking[0]
    others = Counter(recognise_one(record) for record in records if not _is_of(found, record))
    for other, amount in others.items():
        if other and amount >= count:
            raise UserError(
                f"format: auto: of the first {len(records)} records {count} are {found} and {amount} are {other}; "
                f"set format, or give each its own file and source"
            )
    return found


def recognise_one(record: dict[str, Any]) -> str | None:
    return next((name for name, family in FORMATS.items() if family.fits(record)), None)


def _ranking(records: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """(format, how many records it fits) for all that fit any, the most first."""
    fitting = Counter(name for name, family in FORMATS.items() for record in records if family.fits(record))
    return fitting.most_common()


def _is_of(name: str, record: dict[str, Any]) -> bool:
    """Whether a record fits a format, or one that is converted in the same way."""
    convert = FORMATS[name].convert
    return any(family.convert == convert and family.fits(record) for family in FORMATS.values())


def _by_files(source: Source) -> str | None:
    """The format of a source whose files alone say it: texts, and images in folders."""
    below = [file for path in source.paths for file in (path.rglob("*") if path.is_dir() else [path])]
    shown = [file for file in below if file.is_file() and not file.name.startswith(".")]
    files = [file for file in shown if file.name not in image_folder.METADATA]
    if any(file.name.lower().endswith(tuple(READERS)) for file in files):
        return None
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    if not images:
        return "text" if texts else None
    if not all(path.is_dir() for path in source.paths):
        raise UserError(f"{source.name}: format: auto: expected folders of images, got a file; give its folder as path")
    captioned = {file.with_suffix("") for file in texts} & {file.with_suffix("") for file in images}
    if captioned or len(files) < len(shown) or any(file.parent in source.paths for file in images):
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
    chosen = files[:: max(1, -(-len(files) // FIRST_FILES))]
    common = os.path.commonpath([file.absolute().parent for file in chosen]) if chosen else ""
    names = [file.absolute().relative_to(common).as_posix() for file in chosen]
    return [
        _sample(name, read_first(source, file, count=FIRST_RECORDS)) for name, file in zip(names, chosen, strict=True)
    ]


def _sample(name: str, read: Sequence[Record]) -> _Sample:
    errors = [f"{place}: {record}" for place, record in read if isinstance(record, RecordError)]
    return _Sample(name, [record for _, record in read if isinstance(record, dict)], errors)


def _require_one_kind(samples: Sequence[_Sample]) -> None:
    """Raises UserError: files of different formats, and which are what."""
    kinds: dict[str, list[str]] = {}
    for sample in samples:
        name = next((name for name, _ in _ranking(sample.records)), None)
        alike = next((kind for kind in kinds if name and FORMATS[kind].convert == FORMATS[name].convert), name)
        if alike:
            kinds.setdefault(alike, []).append(sample.name)
    if len(kinds) > 1:
        which = "; ".join(f"{_some(files)}: {kind}" for kind, files in kinds.items())
        raise UserError(f"format: auto: its files are of several formats: {which}; give each format its own source")


def _of_no_format(records: Sequence[dict[str, Any]]) -> str:
    keys = sorted({str(key) for record in records for key in record})
    shared = {name: sum(_is_named(fields, keys) for fields in family.reads) for name, family in FORMATS.items()}
    near = sorted((name for name, count in shared.items() if count), key=lambda name: -shared[name])[:NEAREST]
    reads = [f"\n  {name} reads {', '.join(map(_in_short, FORMATS[name].reads))}" for name in near]
    return (
        f"format: auto: {len(records)} records with the keys {_some(keys)} are of no known format; set format, and "
        f"columns where the names differ{''.join(reads)}\n  formats: {', '.join(FORMATS)}"
    )


def _is_named(fields: str, keys: Sequence[str]) -> bool:
    """Whether a field is there, or nearly: "promt" for "prompt"."""
    names = fields.split("|")
    return any(key in names or get_close_matches(key, names, n=1, cutoff=0.8) for key in keys)


def _in_short(fields: str) -> str:
    names = fields.split("|")
    return "|".join(names[:3]) + ("|..." if len(names) > 3 else "")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - FIRST_RECORDS} more" if len(names) > FIRST_RECORDS else ""
    return (", ".join(names[:FIRST_RECORDS]) or "(none)") + more
