"""Dataset record -> Dialogue: one small function per dataset family, and the reader that finds its records."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.dialogue import Dialogue, RecordError
from finetune.data.sources import easy_vqa, messages
from finetune.data.sources.files import ImageRoot, read_jsonl

Record = tuple[str, dict[str, Any] | RecordError]
"""(place, what stood there): a place is "file:line" or the like; a line that is no record is an error to be counted."""


@dataclass(frozen=True)
class Format:
    """How a dataset family is read and converted."""

    read: Callable[[Path | None, str], Iterator[Record]]
    """(path, split) -> records, in a stable order."""
    convert: Callable[[dict[str, Any], ImageRoot], Dialogue]
    """Raises RecordError."""
    documents: bool = False
    """Whether its records become documents, which no `<end_of_utterance>` ends."""


FORMATS = {
    "messages": Format(read_jsonl, messages.convert),
    "easy_vqa": Format(easy_vqa.read, easy_vqa.convert),
    "easy_vqa_captions": Format(easy_vqa.read_captions, easy_vqa.convert_caption, documents=True),
}


def hold_dialogues(formats: Iterable[str]) -> bool:
    """Whether sources of these formats need `<end_of_utterance>`; documents alone leave a base a base."""
    return any(not FORMATS[name].documents for name in formats)
