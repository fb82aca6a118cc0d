"""MIMIC-IT -> Dialogue: instructions with their images by id, each after the instructions that it is related to.

    {"meta": {...}, "data": {"DC_INS_2": {"instruction": ..., "answer": ..., "image_ids": ["DC_IMG_1"],
                                          "rel_ins_ids": ["DC_INS_1"]}, ...}}

On the hub a record is {"instruction", "answer", "images"} and has no related instructions.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats.fields import answer_of, checked, has, listed_images, required, required_list
from finetune.data.formats.placeholders import build, kinds_in, place_images
from finetune.data.formats.read_records import read_records, refuse_columns
from finetune.data.formats.unused_keys import leftovers
from finetune.data.io.byte_streams import OnBroken, Record
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.json_files import read_pairs
from finetune.data.io.source_files import files_of
from finetune.recipe.schema import Source

_READ = frozenset({"instruction", "answer", "image_ids", "images", "rel_ins_ids"})


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert an instruction: related ones become earlier turns; images are repeated only after other images.

    The placeholders in an instruction stand for its own images.
    """
    related = required_list(record, "related", dict) if has(record, "related") else []
    turns, ignored = list[Turn](), list[str]()
    shown: tuple[Image, ...] = ()
    for item in (*related, record):
        images = listed_images(item, root, ("image_ids", "images"))
        question = required(item, "instruction", str)
        again = () if images == shown and not kinds_in(question) else images
        placed, _ = place_images([user(question)], again, root)
        turns += [*placed, assistant(answer_of(item, "answer"))]
        shown = images or shown
        if item is not record:
            ignored += leftovers(item, _READ, shows=True, inside="related[].")
    return build(record, root, turns, ignored=ignored)


def is_mimic_it(record: dict[str, Any]) -> bool:
    """Return whether the record is an instruction with images, or a file of such instructions."""
    data = record.get("data")
    item: Any = next(iter(data.values()), None) if isinstance(data, dict) else record
    asked = isinstance(item, dict) and has(item, "instruction", str) and has(item, "answer")
    return asked and (has(item, "image_ids") or has(item, "images"))


def read(source: Source) -> Iterator[Record]:
    """Yield every instruction of the JSON files, with those related to it under "related", and other files' records."""
    others = []
    for file in files_of(source):
        if _holds_instructions(file):
            refuse_columns(source)
            yield from _read_json(file, source.on_broken)
        else:
            others.append(file)
    if others or source.hub:
        yield from read_records(source.at(*others))


def is_whole(source: Source) -> bool:
    """Return whether instructions may relate to others of their file."""
    return any(map(_holds_instructions, files_of(source)))


def _holds_instructions(file: Path) -> bool:
    """Return whether a file is a JSON object of instructions under "data"."""
    if ".json" not in file.suffixes[-2:]:
        return False
    first = next((item for _, _, item in read_pairs(file, "data")), None)
    return not isinstance(first, RecordError)


def _read_json(path: Path, on_broken: OnBroken) -> Iterator[Record]:
    """Yield the instructions of a file, read three times, so that only those that others relate to are in memory."""
    wanted = {name for _, _, item in read_pairs(path, "data") for name in _related_names(item)}
    known = {name: item for _, name, item in read_pairs(path, "data") if name in wanted} if wanted else {}
    for record_id, name, item in read_pairs(path, "data", on_broken):
        try:
            yield record_id, _with_related(name, item, known)
        except RecordError as error:
            yield record_id, error


def _related_names(item: object) -> list[str]:
    names = item.get("rel_ins_ids") if isinstance(item, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _with_related(name: str, item: object, known: Mapping[str, object]) -> dict[str, Any]:
    if isinstance(item, RecordError):
        raise item
    item = checked(item, name, dict)
    names = required_list(item, "rel_ins_ids", str) if has(item, "rel_ins_ids") else []
    if len({name, *names}) <= len(names):
        raise RecordError("related instruction repeated", f"{name} is related to {', '.join(names):.120}")
    for related in names:
        if related not in known:
            raise RecordError("related instruction missing", f"{name} is related to {related}, which is not there")
    return {**item, "related": [known[related] for related in names]}
