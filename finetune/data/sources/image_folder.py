"""Folders of images with captions -> records for `documents.convert_pair`.

A caption is the text file of the same name (cat.jpg, cat.txt), or a line of a metadata.jsonl or metadata.csv in the
image's folder or above it: {"file_name": "cat.jpg", "text": "A cat."}.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.dialogue import RecordError
from finetune.data.sources.documents import read_text
from finetune.data.sources.fields import has, required
from finetune.data.sources.files import IMAGE_SUFFIXES, read_records
from finetune.data.sources.source import Record, Source
from modeling.errors import UserError

METADATA = ("metadata.csv", "metadata.jsonl")


def read(source: Source) -> Iterator[Record]:
    """Every image below source.paths, by name, with its caption; then every caption whose image is missing."""
    if not source.paths:
        raise UserError(f"format image_folder: expected folders as path, got {source.name}")
    for folder in source.paths:
        if not folder.is_dir():
            raise UserError(
                f"{folder}: expected a folder of images, found {'a file' if folder.exists() else 'nothing'}"
            )
        yield from _read_folder(folder, source)


def is_line(record: dict[str, Any]) -> bool:
    """A line of a metadata file."""
    return has(record, "file_name", str) and has(record, "text")


def _read_folder(folder: Path, source: Source) -> Iterator[Record]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines: dict[Path, tuple[str, str]] = {}
    for path in files:
        if path.name in METADATA:
            yield from _read_metadata(path, source, lines)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    for image in images:
        _, line = lines.pop(image, ("", None))
        yield str(image.relative_to(folder)), _captioned(image, line, texts.get(image.with_suffix("")))
    for place, _ in lines.values():
        yield place, RecordError("missing image", "no image of that file_name")
    for name in sorted(texts.keys() - {image.with_suffix("") for image in images}):
        yield str(texts[name].relative_to(folder)), RecordError("missing image", "no image of the same name")


def _read_metadata(path: Path, source: Source, lines: dict[Path, tuple[str, str]]) -> Iterator[Record]:
    """Fills `lines` with {image: (place, caption)}; yields the lines that cannot be used."""
    for place, line in read_records(replace(source, paths=(path,))):
        try:
            if isinstance(line, RecordError):
                raise line
            image, caption = path.parent / required(line, "file_name", str), required(line, "text", str)
            if image in lines:
                raise RecordError("two captions", f"{image.name}: also at {lines[image][0]}")
            lines[image] = place, caption
        except RecordError as error:
            yield place, error


def _captioned(image: Path, line: str | None, text: Path | None) -> dict[str, Any] | RecordError:
    if line is not None and text is not None:
        return RecordError("two captions", f"{image.name}: in a metadata file, and in {text.name}")
    if line is None and text is None:
        return RecordError("no caption", f"expected {image.stem}.txt or a line of a metadata.jsonl")
    try:
        return {"image": str(image), "text": read_text(text) if text else line}
    except RecordError as error:
        return error
