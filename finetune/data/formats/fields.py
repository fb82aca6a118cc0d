"""A record's fields, of the type a format expects; whatever else stands there is refused by its name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from finetune.data.conversation import Image, RecordError
from finetune.data.field_names import IMAGES, answer_text, first_name
from finetune.data.io.image_roots import ImageRoot

T = TypeVar("T")
_WORDS: dict[type, str] = {str: "text", dict: "an object", list: "a list"}


def required(record: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """record[name], a str, dict or list. Raises RecordError if it is missing, null or of another type."""
    value = optional(record, name, kind)
    if value is None:
        raise RecordError("missing field", f'expected "{name}", got keys {sorted(map(str, record))[:8]}')
    return value


def optional(record: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """record[name], or None where it is missing or null. Raises RecordError if it is of another type."""
    value = record.get(name)
    return None if value is None else checked(value, name, kind)


def required_list(record: Mapping[str, Any], name: str, kind: type[T]) -> list[T]:
    """record[name], a list of str or of dict. Raises RecordError as `required`, and for an item of another type."""
    return [checked(item, f"{name}[{index}]", kind) for index, item in enumerate(required(record, name, list))]


def answer_of(record: Mapping[str, Any], name: str) -> str:
    """record[name] as text; a number, true or false as JSON writes it. Raises RecordError: missing, or another type."""
    return answer_text(required(record, name, object), name)


def has(record: Mapping[str, Any], name: str, kind: type[object] = object) -> bool:
    """Whether record[name] is there, not null, and a `kind`."""
    value = record.get(name)
    return value is not None and isinstance(value, kind)


def first_item(record: Mapping[str, Any], name: str) -> Any:
    """The first item that is not null of the list record[name]; None if there is none, or no list."""
    value = record.get(name)
    return next((item for item in value if item is not None), None) if isinstance(value, list) else None


def joined(texts: Iterable[str | None]) -> str:
    """The texts that are not blank, one a line."""
    return "\n".join(text for text in texts if text and text.strip())


def listed_images(
    record: Mapping[str, Any], root: ImageRoot, names: Sequence[str] = ("image", "images")
) -> tuple[Image, ...]:
    """The images under one of `names`: one reference, a list of them, or null for none. Raises RecordError."""
    given = {name: record[name] for name in names if record.get(name) not in (None, [])}
    if len(given) > 1:
        raise RecordError("image count", f"expected the images under one name, got {' and '.join(given)}")
    references: Any = next(iter(given.values()), [])
    return tuple(root.image(reference) for reference in (references if isinstance(references, list) else [references]))


def own_image(record: dict[str, Any], root: ImageRoot, default: str) -> Image:
    """The record's "image", the file that the source or `default` names by its number, or an image under another name.

    Raises RecordError.
    """
    name = first_name(record, IMAGES)
    if name and (name == "image" or not (root.source.image_name or has(record, "image_id"))):
        value = record[name]
        return root.image(value[0] if isinstance(value, list) and len(value) == 1 else value)
    return root.named(record, default)


def checked(value: object, name: str, kind: type[T]) -> T:
    """`value`, a str, dict or list. Raises RecordError if it is of another type; `name` tells where it stood."""
    if not isinstance(value, kind):
        raise RecordError("unknown content", f'"{name}": expected {_WORDS[kind]}, got {value!r:.80}')
    return value
