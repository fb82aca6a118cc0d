"""Documents -> Dialogue: web pages with images in place, an image and its caption, plain text.

Text is divided at its blank lines into paragraphs, one part each, so that a long document can be cut between them.

In a folder of images, a caption is the text file of the same name (cat.jpg, cat.txt), or a line of a metadata.jsonl or
metadata.csv in the image's folder or above it: {"file_name": "cat.jpg", "text": "A cat."}. In class folders it is the
name of the image's folder: golden_retriever/1.jpg, "golden retriever".
"""

import io
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.data.conversation import Dialogue, Image, Part, RecordError, Turn, is_blank
from finetune.data.formats.fields import (
    CAPTIONS,
    IMAGES,
    SUFFIX_NAMES,
    checked,
    first_item,
    first_name,
    has,
    name_of,
    optional,
    required,
    required_list,
)
from finetune.data.formats.placeholders import build
from finetune.data.formats.read_records import read_records, refuse_columns
from finetune.data.io import byte_streams
from finetune.data.io.byte_streams import Record
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.paths import IMAGE_SUFFIXES, expand, files_below, is_folder
from finetune.data.io.remote import open_local
from finetune.data.io.source_files import files_of
from finetune.recipe.schema import Source
from finetune.recipe.urls import shown
from modeling.errors import UserError

PAIR_IMAGES = (*IMAGES, *SUFFIX_NAMES, "url")

IMAGE_FILES = ("file_name", "image", "filename", "image_path", "path")
"""Names under which a line of a metadata file gives its image."""

METADATA = ("metadata.csv", "metadata.jsonl")


def convert_obelics(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert OBELICS: {"images": [url, null], "texts": [null, "Text."]}, an image or a text at every position.

    "images_urls", where the tools that made OBELICS have put images in place of URLs, says which image is missing.
    """
    images, texts = required_list(record, "images", object), required_list(record, "texts", object)
    if len(images) != len(texts):
        raise RecordError("images and texts do not match", f"{len(images)} images, {len(texts)} texts")
    urls = optional(record, "images_urls", list) or []
    parts: list[Part] = []
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        url = urls[index] if index < len(urls) else None
        if image is None and text is None and url:
            parts.append(Image(RecordError("missing image", f"{url!s:.200}: was not downloaded")))
            continue
        if (image is None) == (text is None):
            got = "neither" if image is None else "both"
            raise RecordError("images and texts do not match", f"position {index}: expected one of the two, got {got}")
        parts += _paragraphs(checked(text, f"texts[{index}]", str)) if image is None else [root.image(image)]
    return build(record, root, [Turn("document", tuple(parts))])


def is_obelics(record: dict[str, Any]) -> bool:
    """Return whether the record is {"images": [...], "texts": [...]}, its texts being no dialogues."""
    listed = has(record, "images", list) and has(record, "texts", list)
    return listed and not isinstance(first_item(record, "texts"), dict)


def convert_pair(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert PMD, LAION, COCO's captions and webdataset to an image and its (first) caption.

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


def _caption(value: object, name: str) -> str:
    """Return a text, the first of a list that is not blank, or an object's "raw" (COCO) or "caption" (webdataset)."""
    if isinstance(value, list) and value:
        captions = [_caption(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return next((caption for caption in captions if not is_blank(caption)), captions[0])
    if isinstance(value, dict):
        return required(value, "raw" if "raw" in value else "caption", str)
    return checked(value, name, str)


def is_pair(record: dict[str, Any]) -> bool:
    """Return whether the record has an image and a caption. A "url" beside "text" is a page's, as in Wikipedia."""
    image, caption = first_name(record, (*PAIR_IMAGES, "image_id")), first_name(record, CAPTIONS)
    return bool(image and caption) and (image, caption) != ("url", "text")


def convert_text(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert plain text, and Wikipedia's {"title", "text"}: the title comes first, unless the text begins with it."""
    title, text = (optional(record, "title", str) or "").strip(), required(record, "text", str)
    opening = [] if text.lstrip().startswith(title) else [title]
    return build(record, root, [Turn("document", (*opening, *_paragraphs(text)))])


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def is_text(record: dict[str, Any]) -> bool:
    """Return whether the record is {"text": ...}."""
    return has(record, "text", str)


def read_texts(source: Source) -> Iterator[Record]:
    """Yield a record for each .txt file; a folder means the .txt files below it, if any. Other files hold many."""
    files = _text_files(source)
    for file in files:
        if file.suffix == ".txt":
            refuse_columns(source)
            yield file.name, _read_text(file)
    others = [file for file in files if file.suffix != ".txt"]
    if others or source.hub:
        yield from read_records(source.at(*others))


def has_texts(source: Source) -> bool:
    """Return whether a source has files that are one record each."""
    return any(file.suffix == ".txt" for file in _text_files(source))


def _text_files(source: Source) -> list[Path]:
    files: list[Path] = []
    for path in chain.from_iterable(map(expand, source.paths)):
        texts = [file for file in files_below(path) if file.suffix == ".txt"] if is_folder(path) else []
        files += texts or files_of(source.at(path))
    return list(dict.fromkeys(files))


def _read_text(path: Path) -> dict[str, Any] | RecordError:
    """Return {"text": a file's text}, or an error: not UTF-8, larger than a record may be, or no file."""
    try:
        with open_local(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig").read(byte_streams.MAX_RECORD_BYTES + 1)
            if len(text) > byte_streams.MAX_RECORD_BYTES:
                return RecordError("record too large", f"{path.name}: {path.stat().st_size:,} bytes")
            return {"text": text}
    except UnicodeDecodeError as error:
        return RecordError("text is not Unicode", f"{path.name}: {error}")
    except OSError as error:
        return RecordError("corrupt file", f"{path.name}: {error.strerror}")


def read_image_folder(source: Source) -> Iterator[Record]:
    """Yield each image below the source's folders, by name, with its caption; then each caption without an image."""
    for folder in _folders(source):
        files = files_below(folder)
        lines: dict[Path, tuple[str, str]] = {}
        for path in files:
            if path.name in METADATA:
                yield from _read_metadata(path, source, lines)
        texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        for image in images:
            _, line = lines.pop(image, ("", None))
            yield str(image.relative_to(folder)), _captioned(image, line, texts.get(image.with_suffix("")))
        for record_id, _ in lines.values():
            yield record_id, RecordError("missing image", "no image of that file_name")
        for name in sorted(texts.keys() - {image.with_suffix("") for image in images}):
            yield str(texts[name].relative_to(folder)), RecordError("missing image", "no image of the same name")


def _folders(source: Source) -> list[Path]:
    if not source.paths:
        raise UserError(f"format {source.format}: expected folders as path, got {source.name}")
    folders = [folder for path in source.paths for folder in expand(path)]
    for folder in folders:
        if not is_folder(folder):
            raise UserError(f"{shown(folder)}: format {source.format}: expected a folder of images, found a file")
    return folders


def _read_metadata(path: Path, source: Source, lines: dict[Path, tuple[str, str]]) -> Iterator[Record]:
    """Fill `lines` with {image: (record id, caption)}; yield the lines that cannot be used."""
    for record_id, line in read_records(source.at(path)):
        try:
            if isinstance(line, RecordError):
                raise line
            image = path.parent / required(line, name_of(line, IMAGE_FILES), str)
            caption = required(line, name_of(line, CAPTIONS), str)
            if image in lines:
                raise RecordError("two captions", f"{image.name}: also at {lines[image][0]}")
            lines[image] = record_id, caption
        except RecordError as error:
            yield record_id, error


def _captioned(image: Path, line: str | None, text: Path | None) -> dict[str, Any] | RecordError:
    """Return {"image", "text"}, the caption being a line of a metadata file or the content of a text file."""
    if line is not None and text is not None:
        return RecordError("two captions", f"{image.name}: in a metadata file, and in {text.name}")
    if text is not None:
        read = _read_text(text)
        return read if isinstance(read, RecordError) else {"image": str(image), **read}
    if line is not None:
        return {"image": str(image), "text": line}
    expected = f"expected {image.stem}.txt or a line of a metadata.jsonl; by folders: class_folders"
    return RecordError("no caption", expected)


def read_class_folders(source: Source) -> Iterator[Record]:
    """Yield each image below the source's folders, by name, with the name of the folder that it lies in."""
    for folder in _folders(source):
        for image in (path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES):
            record_id, label = str(image.relative_to(folder)), image.parent.name.replace("_", " ").strip()
            if image.parent == folder:
                detail = f"expected images in folders named by class, below {folder.name}"
                yield record_id, RecordError("no class", detail)
            else:
                yield record_id, {"image": str(image), "text": label}
