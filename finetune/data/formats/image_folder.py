"""Folders of images with captions -> records for `documents.convert_pair`.

A caption is the text file of the same name (cat.jpg, cat.txt), or a line of a metadata.jsonl or metadata.csv in the
image's folder or above it: {"file_name": "cat.jpg", "text": "A cat."}. In class folders it is the name of the image's
folder: golden_retriever/1.jpg, "golden retriever".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.field_names import CAPTIONS, IMAGE_SUFFIXES, name_of
from finetune.data.formats.documents import read_text
from finetune.data.formats.fields import required
from finetune.data.io.files import read_records
from finetune.data.io.paths import expand, files_below
from finetune.data.io.streams import Record
from finetune.recipe.schema import Source
from modeling.errors import UserError

FILES = ("file_name", "image", "filename", "image_path", "path")
"""Under these a line of a metadata file names its image."""

METADATA = ("metadata.csv", "metadata.jsonl")


def read(source: Source) -> Iterator[Record]:
    """Every image below source.paths, by name, with its caption; then every caption whose image is missing."""
    for folder in _folders(source):
        yield from _read_folder(folder, source)


def read_classes(source: Source) -> Iterator[Record]:
    """Every image below source.paths, by name, with the name of the folder it lies in."""
    for folder in _folders(source):
        for image in _images_below(folder):
            place, label = str(image.relative_to(folder)), image.parent.name.replace("_", " ").strip()
            if image.parent == folder:
                yield place, RecordError("no class", f"expected images in folders named by class, below {folder.name}")
            else:
                yield place, {"image": str(image), "text": label}


def _folders(source: Source) -> list[Path]:
    if not source.paths:
        raise UserError(f"format {source.format}: expected folders as path, got {source.name}")
    folders = [folder for path in source.paths for folder in expand(path)]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: format {source.format}: expected a folder of images, found a file")
    return folders


def _images_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def _read_folder(folder: Path, source: Source) -> Iterator[Record]:
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
    for place, _ in lines.values():
        yield place, RecordError("missing image", "no image of that file_name")
    for name in sorted(texts.keys() - {image.with_suffix("") for image in images}):
        yield str(texts[name].relative_to(folder)), RecordError("missing image", "no image of the same name")


def _read_metadata(path: Path, source: Source, lines: dict[Path, tuple[str, str]]) -> Iterator[Record]:
    """Fills `lines` with {image: (place, caption)}; yields the lines that cannot be used."""
    for place, line in read_records(source.at(path)):
        try:
            if isinstance(line, RecordError):
                raise line
            image = path.parent / required(line, name_of(line, FILES), str)
            caption = required(line, name_of(line, CAPTIONS), str)
            if image in lines:
                raise RecordError("two captions", f"{image.name}: also at {lines[image][0]}")
            lines[image] = place, caption
        except RecordError as error:
            yield place, error


def _captioned(image: Path, line: str | None, text: Path | None) -> dict[str, Any] | RecordError:
    if line is not None and text is not None:
        return RecordError("two captions", f"{image.name}: in a metadata file, and in {text.name}")
    if line is None and text is None:
        return RecordError(
            "no caption", f"expected {image.stem}.txt or a line of a metadata.jsonl; by folders: class_folders"
        )
    try:
        return {"image": str(image), "text": read_text(text) if text else line}
    except RecordError as error:
        return error
