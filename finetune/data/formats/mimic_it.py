"""MIMIC-IT: instructions with their images by id, each after the instructions it is related to -> Dialogue.

    {"meta": {...}, "data": {"DC_INS_2": {"instruction": ..., "answer": ..., "image_ids": ["DC_IMG_1"],
                                          "rel_ins_ids": ["DC_INS_1"]}, ...}}

On the hub a record is {"instruction", "answer", "images"} and has no related ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats.build import build
from finetune.data.formats.fields import answer_of, checked, has, listed_images, required, required_list
from finetune.data.formats.placeholders import kinds_in, place_images
from finetune.data.io.files import files_of, read_pairs, read_records, refuse_columns
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.streams import Record, stop_if_broken
from finetune.data.leftovers import leftovers
from finetune.recipe.schema import Source

_READ = frozenset({"instruction", "answer", "image_ids", "images", "rel_ins_ids"})


def read(source: Source) -> Iterator[Record]:
    """Every instruction of the JSON files, those it is related to under "related"; other files as they are."""
    files = files_of(source)
    official = [file for file in files if ".json" in file.suffixes[-2:] and _holds_instructions(file)]
    for file in official:
        refuse_columns(source)
        yield from stop_if_broken(_read_json(file), source.on_broken)
    others = tuple(file for file in files if file not in official)
    if others or source.hub:
        yield from read_records(source.at(*others))


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Related instructions are earlier turns; images are shown again only where others were shown in between.

    Placeholders are the places of an instruction's own images.
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
    """An instruction, or a file of them."""
    data = record.get("data")
    item: Any = next(iter(data.values()), None) if isinstance(data, dict) else record
    asked = isinstance(item, dict) and has(item, "instruction", str) and has(item, "answer")
    return asked and (has(item, "image_ids") or has(item, "images"))


def _holds_instructions(path: Path) -> bool:
    """Whether a file is an official one: an object of instructions under "data"; other files hold records."""
    return not isinstance(next((item for _, _, item in read_pairs(path, "data")), None), RecordError)


def _read_json(path: Path) -> Iterator[Record]:
    """Three passes, so that of a large file no more is held than the instructions that others are related to."""
    wanted = {name for _, _, item in read_pairs(path, "data") for name in _related_names(item)}
    known = {name: item for _, name, item in read_pairs(path, "data") if name in wanted} if wanted else {}
    for place, name, item in read_pairs(path, "data"):
        try:
            yield place, _with_related(name, item, known)
        except RecordError as error:
            yield place, error


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


def _related_names(item: object) -> list[str]:
    names = item.get("rel_ins_ids") if isinstance(item, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
