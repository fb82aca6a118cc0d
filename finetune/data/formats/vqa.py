"""VQAv2, OK-VQA, TextVQA and DocVQA -> Dialogue: a question with its most common answer, judged by all of them.

VQAv2 and OK-VQA are two files, in any order, joined by question_id:

    {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "What is it?", "question_id": 9000}, ...]}
    {"annotations": [{"question_id": 9000, "multiple_choice_answer": "dog", "answers": [{"answer": "dog"}, ...]}, ...]}

TextVQA and DocVQA are one, {"data": [...]}, of records that hold both; so is any copy of these on the hub.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, RecordError, assistant, user
from finetune.data.field_names import IMAGES, all_answers, first_name, name_of
from finetune.data.formats.build import build
from finetune.data.formats.fields import answer_of, checked, first_item, has, own_image, required
from finetune.data.io.files import files_of, read_header, read_items, read_keys, read_records, refuse_columns
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.streams import BrokenFileError, Record, stop_if_broken
from finetune.recipe.schema import Source

ASKED = ("question", "query")
ANSWERED = ("answers", "answer", "label", "direct_answers")


def read(source: Source) -> Iterator[Record]:
    """Records that hold a question and its answers.

    Those of official files are joined; a question or an annotation without its counterpart is an error to be counted.
    """
    files: dict[str, list[Path]] = {"questions": [], "annotations": [], "": []}
    for path in files_of(source):
        files[_part_of(path)].append(path)
    if files["questions"] or files["annotations"]:
        refuse_columns(source)
    yield from stop_if_broken(_joined(files["questions"], files["annotations"]), source.on_broken)
    if files[""] or source.hub:
        yield from read_records(source.at(*files[""]))


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """The most common answer (the earliest of equals) is trained; without any, "multiple_choice_answer"."""
    listed = _listed(record)
    answers = all_answers(record, listed) if listed and record[listed] else []
    trained = Counter(answers).most_common(1)[0][0] if answers else _multiple_choice(record)
    named = "COCO_{data_subtype}_{image_id:012d}.jpg" if has(record, "data_subtype") else "{image_id}.jpg"
    turns = (user(required(record, name_of(record, ASKED), str)), assistant(trained, references=tuple(answers)))
    return build(record, root, turns, [own_image(record, root, named)])


def is_vqa(record: dict[str, Any]) -> bool:
    """A question with its answers, or a line of one of the official files."""
    asked = isinstance(record.get(first_name(record, ASKED) or ""), str)
    named = has(record, "question_id") and has(record, "image_id")
    listed = _listed(record)
    if has(record, "multiple_choice_answer") or (listed and first_item(record, listed) is not None):
        return named or (asked and (has(record, "image_id") or first_name(record, IMAGES) is not None))
    return asked and named and not has(record, "answer")


def _listed(record: dict[str, Any]) -> str | None:
    """Under which name a record lists answers."""
    return next((name for name in ANSWERED if isinstance(record.get(name), list)), None)


def _part_of(path: Path) -> str:
    """Whether a JSON file is an official one of "questions" or "annotations", or "", by the first key that tells."""
    if ".json" not in path.suffixes[-2:]:
        return ""
    try:
        keys = (key for key in read_keys(path) if key in ("questions", "annotations", "data"))
        return next(keys, "").replace("data", "")
    except BrokenFileError:
        return ""  # what is wrong with it, its reader tells


def _joined(questions: Iterable[Path], annotations: Iterable[Path]) -> Iterator[Record]:
    """Each annotation with its question; only the questions not yet answered are held."""
    asked: dict[str | int, tuple[str, dict[str, Any]]] = {}
    for place, question in _questions(questions):
        if isinstance(question, RecordError):
            yield place, question
        elif question["question_id"] in asked:
            yield place, RecordError("question_id repeated", f"{question['question_id']}")
        else:
            asked[question["question_id"]] = place, question
    for place, annotation in (record for path in annotations for record in _identified(path, "annotations")):
        if isinstance(annotation, RecordError):
            yield place, annotation
        elif annotation["question_id"] not in asked:
            yield place, RecordError("annotation without question", f"question_id {annotation['question_id']}")
        else:
            yield place, asked.pop(annotation["question_id"])[1] | annotation
    for name, (place, _) in asked.items():
        yield place, RecordError("question without annotation", f"question_id {name}")


def _questions(paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        subtype = read_header(path, "data_subtype")
        for place, item in _identified(path, "questions"):
            yield place, item if isinstance(item, RecordError) else item | {"data_subtype": subtype}


def _identified(path: Path, key: str) -> Iterator[Record]:
    """Objects that have a question_id."""
    for place, item in _items(path, key):
        if isinstance(item, dict) and not isinstance(item.get("question_id"), str | int):
            yield place, RecordError("missing field", f'expected "question_id", got {item!r:.80}')
        else:
            yield place, item


def _items(path: Path, key: str) -> Iterator[Record]:
    for place, item in read_items(path, key):
        try:
            yield place, item if isinstance(item, RecordError) else checked(item, key, dict)
        except RecordError as error:
            yield place, error


def _multiple_choice(record: dict[str, Any]) -> str:
    if not has(record, "multiple_choice_answer"):
        raise RecordError("no answer", 'expected "answers" or "multiple_choice_answer"')
    return answer_of(record, "multiple_choice_answer")
