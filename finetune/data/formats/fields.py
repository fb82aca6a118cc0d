"""A record's fields: the names that datasets use for them, and their values, checked to be of the expected type."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

from finetune.data.conversation import Image, RecordError
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.paths import IMAGE_SUFFIXES

T = TypeVar("T")
_WORDS: dict[type, str] = {str: "text", dict: "an object", list: "a list"}

SUFFIX_NAMES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
"""Names of the images in a webdataset sample."""

IMAGES = (
    *("image", "images", "image_path", "image_file", "image_name", "image_local_name", "image_base64"),
    *("img", "img_path", "imgname", "file_name", "filename", "path", "image_url", "img_url", "URL"),
)
"""Names of an image; the first that has a value is read."""

_FILE_NAMES = ("file_name", "filename", "path")
"""Names that records without images have too: they mean an image if the file's suffix is one of an image."""

CAPTIONS = ("text", "caption", "TEXT", "txt", "captions", "sentences", "description", "alt_text", "json")
QUESTIONS = ("question", "query", "instruction", "prompt", "input", "problem")
ANSWERS = ("answer", "response", "answers", "output", "completion", "label", "solution")
CONTEXTS = ("context", "passage")
SYSTEM = ("system", "system_prompt")
"""Names of a system message: every format of dialogues reads them."""


def first_name(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of `names` that has a value; a file's name counts only if it is an image's."""
    for name in names:
        value = record.get(name)
        is_other_file = (
            name in _FILE_NAMES and isinstance(value, str) and PurePath(value).suffix.lower() not in IMAGE_SUFFIXES
        )
        if value is not None and not is_other_file:
            return name
    return None


def name_of(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return as `first_name`. Raises RecordError: none of the names has a value."""
    name = first_name(record, names)
    if name is None:
        got = sorted(map(str, record))[:8]
        raise RecordError("missing field", f"expected one of {', '.join(names)}; got keys {got}")
    return name


def required(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return record[name], a str, dict or list. Raises RecordError: missing, null or of another type."""
    value = optional(record, name, kind)
    if value is None:
        raise RecordError("missing field", f'expected "{name}", got keys {sorted(map(str, record))[:8]}')
    return value


def optional(record: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """Return record[name], or None where it is missing or null. Raises RecordError: of another type."""
    value = record.get(name)
    return None if value is None else checked(value, name, kind)


def required_list(record: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """Return record[name], a list of str or of dict. Raises RecordError as `required`, also for an item."""
    return [checked(item, f"{name}[{index}]", kind) for index, item in enumerate(required(record, name, list))]


def checked(value: object, name: str, kind: type[T]) -> T:
    """Return a str, dict or list as it is. Raises RecordError: of another type; `name` says where it is."""
    if not isinstance(value, kind):
        raise RecordError("unknown content", f'"{name}": expected {_WORDS[kind]}, got {value!r:.80}')
    return value


def has(record: Mapping[str, Any], name: str, kind: type[object] = object) -> bool:
    """Return whether record[name] has a value of type `kind`."""
    value = record.get(name)
    return value is not None and isinstance(value, kind)


def first_item(record: Mapping[str, Any], name: str) -> Any:
    """Return the first item that is not null of the list record[name]; None if there is none, or no list."""
    value = record.get(name)
    return next((item for item in value if item is not None), None) if isinstance(value, list) else None


def joined(texts: Iterable[str | None]) -> str:
    """Return the texts that are not blank, one a line."""
    return "\n".join(text for text in texts if text and text.strip())


def answer_of(record: Mapping[str, Any], name: str) -> str:
    """Return record[name] as `answer_text` does. Raises RecordError: missing, or of another type."""
    return answer_text(required(record, name, object), name)


def answer_text(value: object, name: str) -> str:
    """Return a text as it is; a number, true or false as JSON writes it. Raises RecordError: anything else.

    >>> answer_text(3, "answer"), answer_text(0.5, "answer"), answer_text(True, "answer")
    ('3', '0.5', 'true')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    raise RecordError("unknown content", f'"{name}": expected text, got {value!r:.80}')


def all_answers(record: Mapping[str, Any], name: str) -> list[str]:
    """Return the text of record[name], or of each item of a list. Raises RecordError: no text, or an empty list.

    SQuAD's {"text": [...]} and VQA's {"answer": ...} are read as the texts in them.
    """
    value = record.get(name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if not isinstance(value, list):
        return [answer_text(value, name)]
    if not value:
        raise RecordError("no answer", f'"{name}": expected an answer, got an empty list')
    answers = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        if isinstance(item, dict):
            if item.get("answer") is None:
                got = sorted(map(str, item))[:8]
                raise RecordError("missing field", f'"{where}": expected "answer", got keys {got}')
            item, where = item["answer"], f"{where}.answer"
        answers.append(answer_text(item, where))
    return answers


def listed_images(
    record: Mapping[str, Any], root: ImageRoot, names: Sequence[str] = ("image", "images")
) -> tuple[Image, ...]:
    """Return the images under one of `names`: one reference, a list of them, or null for none. Raises RecordError."""
    given = {name: record[name] for name in names if record.get(name) not in (None, [])}
    if len(given) > 1:
        raise RecordError("image count", f"expected the images under one name, got {' and '.join(given)}")
    references: Any = next(iter(given.values()), [])
    return tuple(root.image(reference) for reference in (references if isinstance(references, list) else [references]))


def own_image(record: dict[str, Any], root: ImageRoot, default: str) -> Image:
    """Return the record's "image", the file that `image_name` or `default` names, or an image under another name.

    Raises RecordError.
    """
    name = first_name(record, IMAGES)
    if name and (name == "image" or not (root.source.image_name or has(record, "image_id"))):
        value = record[name]
        return root.image(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return root.named(record, default)
