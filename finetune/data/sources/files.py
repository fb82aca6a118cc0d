"""Files on disk -> records, and references in records -> images that lie inside the image root."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.dialogue import Image, RecordError
from modeling.errors import UserError


def read_jsonl(path: Path | None, split: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """One JSON object a line; blank lines are no records. `split` plays no part: a file is one split."""
    assert path is not None
    if not path.is_file():
        raise UserError(f"{path}: expected a .jsonl file, found {'a folder' if path.is_dir() else 'nothing'}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path.name}:{number}", _parse(line)


def _parse(line: bytes) -> dict[str, Any] | RecordError:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return RecordError("not JSON", str(error))
    if not isinstance(record, dict):
        return RecordError("not an object", f"expected a JSON object, got {type(record).__name__}")
    return record


class ImageRoot:
    """The folder that image paths of one source are relative to, and may not leave."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def image(self, reference: object) -> Image:
        """A path under the root, or a `data:image/...;base64,` URL. Raises RecordError for anything else."""
        if not isinstance(reference, str) or not reference:
            raise RecordError("not an image reference", f"expected a path, got {reference!r:.80}")
        if reference.startswith("data:image/"):
            return _decode(reference)
        if "://" in reference or reference.startswith("file:"):
            raise RecordError("image is a URL", f"{reference:.120}: nothing is downloaded; expected a path")
        if "\0" in reference:
            raise RecordError("not an image reference", "a path with a NUL byte")
        try:
            path = (self.folder / reference).resolve()
        except (UnicodeEncodeError, RuntimeError) as error:  # a lone surrogate; a loop of links
            raise RecordError("not an image reference", f"{reference!r:.80}: {error}") from error
        if not path.is_relative_to(self.folder):
            raise RecordError("image outside the image root", f"{reference:.120} is not under {self.folder}")
        return Image(path)


def _decode(url: str) -> Image:
    try:
        return Image(base64.b64decode(url.partition(";base64,")[2], validate=True))
    except ValueError as error:  # binascii.Error, and plain ValueError for what is not ASCII
        raise RecordError("corrupt image", f"base64: {error}") from error
