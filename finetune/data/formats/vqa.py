"""VQAv2, OK-VQA, TextVQA and DocVQA -> Dialogue: a question with its most common answer; all answers are references.

VQAv2 and OK-VQA are two files, in any order, joined by question_id:

    {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "What is it?", "question_id": 9000}, ...]}
    {"annotations": [{"question_id": 9000, "multiple_choice_answer": "dog", "answers": [{"answer": "dog"}, ...]}, ...]}

TextVQA and DocVQA are one file, {"data": [...]}, of records that hold both; so is any copy of these on the hub.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, RecordError, assistant, user
from finetune.data.formats.fields import (
    IMAGES,
    all_answers,
    answer_of,
    checked,
    first_item,
    first_name,
    has,
    name_of,
    own_image,
    required,
)
from finetune.data.formats.placeholders import build
from finetune.data.formats.read_records import read_records, refuse_columns
from finetune.data.io.byte_streams import BrokenFileError, OnBroken, Record
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.json_files import read_header, read_items, read_keys
from finetune.data.io.source_files import files_of
from finetune.recipe.schema import Source

ASKED = ("question", "query")
ANSWERED = ("answers", "answer", "label", "direct_answers")


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert to the question and its most common answer (on a tie the first), else "multiple_choice_answer"."""
    listed = _listed(record)
    answers = all_answers(record, listed) if listed and record[listed] else []
    if not answers and not has(record, "multiple_choice_answer"):
        raise RecordError("no answer", 'expected "answers" or "multiple_choice_answer"')
    trained = Counter(answers).most_common(1)[0][0] if answers else answer_of(record, "multiple_choice_answer")
    named = "COCO_{data_subtype}_{image_id:012d}.jpg" if has(record, "data_subtype") else "{image_id}.jpg"
    turns = (user(required(record, name_of(record, ASKED), str)), assistant(trained, references=tuple(answers)))
    return build(record, root, turns, [own_image(record, root, named)])


def is_vqa(record: dict[str, Any]) -> bool:
    """Return whether the record is a question with its answers, or a line of one of the official files."""
    asked = isinstance(record.get(first_name(record, ASKED) or ""), str)
    named = has(record, "question_id") and has(record, "image_id")
    listed = _listed(record)
    if has(record, "multiple_choice_answer") or (listed and first_item(record, listed) is not None):
        return named or (asked and (has(record, "image_id") or first_name(record, IMAGES) is not None))
    return asked and named and not has(record, "answer")


def _listed(record: dict[str, Any]) -> str | None:
    """Return the name under which a record lists answers."""
    return next((name for name in ANSWERED if isinstance(record.get(name), list)), None)


def read(source: Source) -> Iterator[Record]:
    """Yield records that hold a question and its answers, those of the official files joined."""
    files: dict[str, list[Path]] = {"questions": [], "annotations": [], "": []}
    for path in files_of(source):
        files[_part_of(path)].append(path)
    if files["questions"] or files["annotations"]:
        refuse_columns(source)
    yield from _joined(files["questions"], files["annotations"], source.on_broken)
    if files[""] or source.hub:
        yield from read_records(source.at(*files[""]))


def is_whole(source: Source) -> bool:
    """Return whether a source has official files, which are joined."""
    return any(map(_part_of, files_of(source)))


def _part_of(path: Path) -> str:
    """Return whether a JSON file is an official one of "questions" or "annotations", or "", by the first such key."""
    if ".json" not in path.suffixes[-2:]:
        return ""
    try:
        keys = (key for key in read_keys(path) if key in ("questions", "annotations", "data"))
        return next(keys, "").replace("data", "")
    except BrokenFileError:
        return ""  # its reader reports what is wrong with it


def _joined(questions: Iterable[Path], annotations: Iterable[Path], on_broken: OnBroken) -> Iterator[Record]:
    """Yield each annotation with its question; only questions without an annotation so far are kept in memory.

    A question or an annotation without its counterpart is an error.
    """
    asked: dict[str | int, tuple[str, dict[str, Any]]] = {}
    for path in questions:
        subtype = read_header(path, "data_subtype")
        for record_id, question in _identified(path, "questions", on_broken):
            if isinstance(question, RecordError):
                yield record_id, question
            elif question["question_id"] in asked:
                yield record_id, RecordError("question_id repeated", f"{question['question_id']}")
            else:
                asked[question["question_id"]] = record_id, question | {"data_subtype": subtype}
    for record_id, annotation in chain.from_iterable(
        _identified(path, "annotations", on_broken) for path in annotations
    ):
        if isinstance(annotation, RecordError):
            yield record_id, annotation
        elif annotation["question_id"] not in asked:
            detail = f"question_id {annotation['question_id']}"
            yield record_id, RecordError("annotation without question", detail)
        else:
            yield record_id, asked.pop(annotation["question_id"])[1] | annotation
    for question_id, (record_id, _) in asked.items():
        yield record_id, RecordError("question without annotation", f"question_id {question_id}")


def _identified(path: Path, key: str, on_broken: OnBroken) -> Iterator[Record]:
    """Yield the items of a list; an item that is no object with a question_id is an error."""
    for record_id, item in read_items(path, key, on_broken):
        try:
            found = item if isinstance(item, RecordError) else checked(item, key, dict)
        except RecordError as error:
            found = error
        if isinstance(found, dict) and not isinstance(found.get("question_id"), str | int):
            found = RecordError("missing field", f'expected "question_id", got {found!r:.80}')
        yield record_id, found
