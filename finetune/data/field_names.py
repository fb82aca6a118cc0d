"""What people call the fields of their records, and answers that are no text."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from finetune.data.conversation import RecordError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
SUFFIX_NAMES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
"""Under these a webdataset sample has its images."""

IMAGES = (
    *("image", "images", "image_path", "image_file", "image_name", "image_local_name", "image_base64"),
    *("img", "img_path", "imgname", "file_name", "filename", "path", "image_url", "img_url", "URL"),
)
"""Names of an image; the first that is there is taken."""

_FILES = ("file_name", "filename", "path")
"""Names that many records have who are about no image: an image is there if the file's name says so."""

CAPTIONS = ("text", "caption", "TEXT", "txt", "captions", "sentences", "description", "alt_text", "json")
QUESTIONS = ("question", "query", "instruction", "prompt", "input", "problem")
ANSWERS = ("answer", "response", "answers", "output", "completion", "label", "solution")
CONTEXTS = ("context", "passage")


def first_name(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` under which a record has anything; under the name of a file, an image's."""
    given = (name for name in names if record.get(name) is not None)
    return next((name for name in given if name not in _FILES or _is_image(record[name])), None)


def name_of(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """As `first_name`. Raises RecordError: there is none."""
    name = first_name(record, names)
    if name is None:
        raise RecordError(
            "missing field", f"expected one of {', '.join(names)}; got keys {sorted(map(str, record))[:8]}"
        )
    return name


def _is_image(value: object) -> bool:
    return not isinstance(value, str) or PurePath(value).suffix.lower() in IMAGE_SUFFIXES


def all_answers(record: Mapping[str, Any], name: str) -> list[str]:
    """The text of record[name], or of each item of a list. Raises RecordError: something else, or an empty list.

    SQuAD's {"text": [...]} and VQA's {"answer": ...} count as what they hold.
    """
    value = record.get(name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        if not value:
            raise RecordError("no answer", f'"{name}": expected an answer, got an empty list')
        return [_listed_answer(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return [answer_text(value, name)]


def _listed_answer(item: object, name: str) -> str:
    if not isinstance(item, dict):
        return answer_text(item, name)
    if item.get("answer") is None:
        raise RecordError("missing field", f'"{name}": expected "answer", got keys {sorted(map(str, item))[:8]}')
    return answer_text(item["answer"], f"{name}.answer")


def answer_text(value: object, name: str) -> str:
    """A text; of a number, true or false what JSON writes. Raises RecordError: anything else.

    3 -> "3", 0.5 -> "0.5", true -> "true"
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    raise RecordError("unknown content", f'"{name}": expected text, got {value!r:.80}')
