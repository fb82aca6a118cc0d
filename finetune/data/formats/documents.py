"""Documents -> Dialogue: web pages with images in place, an image and its caption, plain text.

Text is divided at its blank lines, one part a paragraph, so that a long document can be cut between them.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, Part, RecordError, Turn, is_blank
from finetune.data.field_names import CAPTIONS, IMAGES, SUFFIX_NAMES, first_name, name_of
from finetune.data.formats.build import build
from finetune.data.formats.fields import checked, first_item, has, optional, required, required_list
from finetune.data.io import streams
from finetune.data.io.files import files_of, read_records, refuse_columns
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.paths import expand, files_below
from finetune.data.io.streams import Record
from finetune.recipe.schema import Source
from modeling.files import open_regular

PAIR_IMAGES = (*IMAGES, *SUFFIX_NAMES, "url")


def convert_obelics(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """OBELICS: {"images": [url, null], "texts": [null, "A paragraph."]}, an image or a text at every position."""
    images, texts = required_list(record, "images", object), required_list(record, "texts", object)
    if len(images) != len(texts):
        raise RecordError("images and texts do not match", f"{len(images)} images, {len(texts)} texts")
    parts: list[Part] = []
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            got = "neither" if image is None else "both"
            raise RecordError("images and texts do not match", f"position {index}: expected one of the two, got {got}")
        parts += _paragraphs(checked(text, f"texts[{index}]", str)) if image is None else [root.image(image)]
    return build(record, root, [Turn("document", tuple(parts))])


def is_obelics(record: dict[str, Any]) -> bool:
    return (
        has(record, "images", list) and has(record, "texts", list) and not isinstance(first_item(record, "texts"), dict)
    )


def convert_pair(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """PMD, LAION, COCO's captions, WebDataset: an image, then its caption, the first where there are several.

    COCO gives an image by its number: "image_id".
    """
    shown, name = first_name(record, PAIR_IMAGES), name_of(record, CAPTIONS)
    if shown is None and has(record, "image_id"):
        image: Any = root.named(record, "{image_id}.jpg")
    else:
        image = record[name_of(record, PAIR_IMAGES)]
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    caption = _caption(record[name], name)
    if is_blank(caption):
        raise RecordError("empty caption", f'"{name}": expected words, got {caption!r:.80}')
    return build(record, root, [Turn("document", (caption,))], [root.image(image)])


def is_pair(record: dict[str, Any]) -> bool:
    """A "url" beside a "text" is no image: it is where Wikipedia's and other pages are from."""
    image, caption = first_name(record, (*PAIR_IMAGES, "image_id")), first_name(record, CAPTIONS)
    return bool(image and caption) and (image, caption) != ("url", "text")


def convert_text(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Plain text, and Wikipedia: {"title": ..., "text": ...}; the title opens the text unless it does already."""
    title, text = (optional(record, "title", str) or "").strip(), required(record, "text", str)
    opening = [] if text.lstrip().startswith(title) else [title]
    return build(record, root, [Turn("document", (*opening, *_paragraphs(text)))])


def is_text(record: dict[str, Any]) -> bool:
    return has(record, "text", str)


def read_texts(source: Source) -> Iterator[Record]:
    """Every .txt file is one record, and a folder with such files below it stands for them; other files hold many."""
    places = [place for path in source.paths for place in expand(path)]
    files = [file for path in places for file in _texts_below(path) or files_of(source.at(path))]
    for file in dict.fromkeys(files):
        if file.suffix == ".txt":
            refuse_columns(source)
            yield file.name, _text_record(file)
    others = tuple(dict.fromkeys(file for file in files if file.suffix != ".txt"))
    if others or source.hub:
        yield from read_records(source.at(*others))


def read_text(path: Path) -> str:
    """A file's text. Raises RecordError: not UTF-8, larger than a record may be, or no file."""
    try:
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig").read(streams.MAX_RECORD_BYTES + 1)
            if len(text) > streams.MAX_RECORD_BYTES:
                raise RecordError("record too large", f"{path.name}: {path.stat().st_size:,} bytes")
            return text
    except UnicodeDecodeError as error:
        raise RecordError("text is not Unicode", f"{path.name}: {error}") from error
    except OSError as error:
        raise RecordError("corrupt file", f"{path.name}: {error.strerror}") from error


def _texts_below(path: Path) -> list[Path]:
    return [file for file in files_below(path) if file.suffix == ".txt"] if path.is_dir() else []


def _text_record(path: Path) -> dict[str, Any] | RecordError:
    try:
        return {"text": read_text(path)}
    except RecordError as error:
        return error


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _caption(value: object, name: str) -> str:
    """A text, the first of a list that says anything, or an object's "raw" (COCO) or "caption" (WebDataset)."""
    if isinstance(value, list) and value:
        captions = [_caption(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return next((caption for caption in captions if not is_blank(caption)), captions[0])
    if isinstance(value, dict):
        return required(value, "raw" if "raw" in value else "caption", str)
    return checked(value, name, str)
