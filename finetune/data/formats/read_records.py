"""A source's files -> records under the names that its format expects: columns renamed, webdataset samples unfolded.

A sample that img2dataset could not download becomes an error here, so that it is counted under that reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.formats.fields import QUESTIONS, SUFFIX_NAMES
from finetune.data.io import img2dataset
from finetune.data.io.byte_streams import Record
from finetune.data.io.source_files import DataFile, read_file, read_source
from finetune.recipe.schema import Source
from modeling.errors import UserError


def read_records(
    source: Source, file: DataFile | None = None, shard: tuple[int, int] | None = None
) -> Iterator[Record]:
    """Yield (record id, record) for every record of a source, or of one `file` or `shard` as in `read_source`.

    Raises UserError: a path or hub id that leads to nothing, an unknown suffix, a column that no record of the source
    has, a file that breaks off; with `on_broken: keep`, a BrokenFileError takes the place of the records that are lost.
    """
    if file is None and shard is None:
        require_columns(source)
    for record_id, found in read_source(source, file, shard):
        yield record_id, _renamed(_unfolded(found, source.columns), source.columns)


def require_columns(source: Source) -> None:
    """Read until each of the source's `columns` is found, which is mostly in the first record.

    Raises UserError: a column that no record has.
    """
    missing, first_keys = set(source.columns.values()), list[str]()
    for _, found in read_source(source) if missing else ():
        record = _unfolded(found, source.columns)
        if isinstance(record, dict):
            first_keys = first_keys or list(record)
            missing -= record.keys()
            if not missing:
                return
    if missing and first_keys:
        names, got = ", ".join(sorted(missing)), ", ".join(first_keys)
        raise UserError(f"{source.name}: columns: no record has {names}; the first has {got}")


def read_first(source: Source, path: Path, *, count: int) -> list[Record]:
    """Return the first records of one of a source's files; a column that they lack is not renamed."""
    records, columns = islice(read_file(path, source.split), count), source.columns
    return [(record_id, _renamed(_unfolded(record, columns), columns)) for record_id, record in records]


def refuse_columns(source: Source) -> None:
    """Raises UserError: the source sets `columns`, for files whose names are part of their format."""
    if source.columns:
        raise UserError(f"{source.name}: columns: the files of format {source.format} are read by their own names")


def _renamed(record: dict[str, Any] | RecordError, columns: Mapping[str, str]) -> dict[str, Any] | RecordError:
    """Return a record whose fields have the names of `columns`, {name that the format expects: name in the record}."""
    if isinstance(record, RecordError) or not columns:
        return record
    kept = {name: value for name, value in record.items() if name not in columns.values()}
    return {**kept, **{name: record[actual] for name, actual in columns.items() if actual in record}}


def _unfolded(sample: dict[str, Any] | RecordError, columns: Mapping[str, str]) -> dict[str, Any] | RecordError:
    """Return a webdataset sample with the fields of its JSON, and its images under "image" or "images".

    {"__key__": "7", "jpg": image, "json": {"image": "7.jpg", "conversations": [...]}}
        -> {"__key__": "7", "image": image, "conversations": [...]}

    A sample without a dialogue is an image and its caption: its image keeps its name, as a file does that `columns`
    names. A record that is no sample is returned as it is.
    """
    if isinstance(sample, RecordError):
        return sample
    if sample.keys() >= img2dataset.KEYS:
        if error := img2dataset.failure(sample):
            return error
        if sample.get("txt") == sample.get("caption"):  # the caption's copy, as webdataset names it
            sample = {name: value for name, value in sample.items() if name != "txt"}
    if "__key__" not in sample:
        return sample
    kept = columns.values()
    for name in [name for name in sample if name.rpartition(".")[2] == "json" and name not in kept]:
        value = sample[name]
        if isinstance(value, list):  # of messages
            first = value[0] if value and isinstance(value[0], dict) else {}
            key = "conversations" if "from" in first else "messages" if "role" in first else None
            value = {key: value} if key else None
        if isinstance(value, dict) and value:
            sample = {**value, **{other: content for other, content in sample.items() if other != name}}
    images = {
        name: value
        for name, value in sample.items()
        if name not in kept and name.rpartition(".")[2].lower() in SUFFIX_NAMES and not isinstance(value, str | None)
    }
    under = next((name for name in ("image", "images") if sample.get(name) is not None), None)
    named = [] if under is None else sample[under] if isinstance(sample[under], list) else [sample[under]]
    is_dialogue = any(name in sample for name in ("conversations", "messages", *QUESTIONS))
    if not images or not (named or is_dialogue) or not all(isinstance(name, str) for name in named):
        return sample
    found = _choose_images(images, named, str(sample["__key__"]))
    if isinstance(found, RecordError):
        return found
    rest = {name: value for name, value in sample.items() if name not in images and name != under}
    return {**rest, "image": found[0]} if len(found) == 1 else {**rest, "images": found}


def _choose_images(images: Mapping[str, Any], named: Sequence[str], key: str) -> list[Any] | RecordError:
    """Return a sample's images as its JSON names them; if it names none, or as many by other names, in their order."""
    by_name = {f"{PurePosixPath(key).name}.{suffix}": image for suffix, image in images.items()} | dict(images)
    found = [by_name.get(PurePosixPath(name).name) for name in named]
    if named and all(image is not None for image in found):
        return found
    if named and len(named) != len(images):
        return RecordError("image count", f"{len(named)} images named in the JSON, {len(images)} files in the sample")
    return list(images.values())
