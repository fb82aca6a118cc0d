"""webdataset samples, whose JSON member may hold a dialogue, -> records as any other file has them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.field_names import QUESTIONS, SUFFIX_NAMES
from finetune.data.io.streams import Record

_SPOKEN = ("conversations", "messages", *QUESTIONS)
"""A sample that has one of these is about its images; without, it is an image and its caption."""


def unfold(records: Iterable[Record], columns: Mapping[str, str]) -> Iterator[Record]:
    """Each sample whose JSON holds a dialogue, or names the sample's images, as such a record; others as they are.

    Files that `columns` names keep their names.
    """
    for place, record in records:
        if isinstance(record, dict) and "__key__" in record:
            try:
                yield place, _unfolded(record, columns.values())
            except RecordError as error:
                yield place, error
        else:
            yield place, record


def _unfolded(sample: dict[str, Any], kept: Iterable[str]) -> dict[str, Any]:
    """{"__key__": "7", "jpg": image, "json": {"image": "7.jpg", "conversations": [...]}} -> {"image": image, ...}"""
    for name in [name for name in sample if name.rpartition(".")[2] == "json" and name not in kept]:
        if inside := _dialogue_in(sample[name]):
            sample = {**inside, **{other: value for other, value in sample.items() if other != name}}
    images = {name: value for name, value in sample.items() if name not in kept and _is_image(name, value)}
    under = next((name for name in ("image", "images") if sample.get(name) is not None), None)
    named = [] if under is None else sample[under] if isinstance(sample[under], list) else [sample[under]]
    if not images or not (named or any(name in sample for name in _SPOKEN)):
        return sample
    if not all(isinstance(name, str) for name in named):
        return sample
    found = _chosen(images, named, str(sample["__key__"]))
    rest = {name: value for name, value in sample.items() if name not in images and name != under}
    return {**rest, "image": found[0]} if len(found) == 1 else {**rest, "images": found}


def _dialogue_in(value: object) -> dict[str, Any] | None:
    """An object as it is, a list of messages under the name that a record has for it; None for anything else."""
    if isinstance(value, list):
        first = value[0] if value else None
        spoken = {"from": "conversations", "role": "messages"}
        return next(({name: value} for key, name in spoken.items() if isinstance(first, dict) and key in first), None)
    return value if isinstance(value, dict) else None


def _is_image(name: str, value: object) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIX_NAMES and not isinstance(value, str | None)


def _chosen(images: Mapping[str, Any], named: Sequence[str], key: str) -> list[Any]:
    """The sample's images as its JSON names them; where it names none, or as many by other names, in their order."""
    by_name = {f"{PurePosixPath(key).name}.{kind}": image for kind, image in images.items()} | dict(images)
    found = [by_name.get(PurePosixPath(name).name) for name in named]
    if named and all(image is not None for image in found):
        return found
    if named and len(named) != len(images):
        raise RecordError("image count", f"{len(named)} images named in the JSON, {len(images)} files in the sample")
    return list(images.values())
