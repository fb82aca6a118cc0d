"""Dataset record -> Dialogue: a reader that finds the records of a dataset family, and a function that converts one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from finetune.data.sources import (
    conversations,
    documents,
    easy_vqa,
    image_folder,
    messages,
    mimic_it,
    questions,
    vqa,
)
from finetune.data.sources.files import IMAGE_SUFFIXES, read_records
from finetune.data.sources.source import Format, Source
from modeling.errors import UserError

FIRST_RECORDS = 20
"""By so many a format is recognised."""

FORMATS = {
    "messages": Format(messages.convert, read_records, messages.is_messages),
    "svit": Format(conversations.convert_svit, read_records, conversations.is_svit),
    "llava": Format(conversations.convert, read_records, conversations.is_llava),
    "sharegpt": Format(conversations.convert, read_records, conversations.is_sharegpt),
    "ultrachat": Format(conversations.convert_ultrachat, read_records, conversations.is_ultrachat),
    "m3it": Format(questions.convert_m3it, read_records, questions.is_m3it, ordered=False),
    "mimic_it": Format(mimic_it.convert, mimic_it.read, mimic_it.is_mimic_it),
    "alpaca": Format(questions.convert_alpaca, read_records, questions.is_alpaca),
    "spot_the_diff": Format(questions.convert_spot_the_diff, read_records, questions.is_spot_the_diff),
    "cauldron": Format(questions.convert_cauldron, read_records, questions.is_cauldron, ordered=False),
    "vqa": Format(vqa.convert, vqa.read, vqa.is_vqa, ordered=False),
    "lrv": Format(questions.convert_lrv, read_records, questions.is_lrv, ordered=False),
    "obelics": Format(documents.convert_obelics, read_records, documents.is_obelics, documents=True),
    "pairs": Format(documents.convert_pair, read_records, documents.is_pair, documents=True),
    "image_folder": Format(documents.convert_pair, image_folder.read, image_folder.is_line, documents=True),
    "text": Format(documents.convert_text, documents.read_texts, documents.is_text, documents=True),
    "easy_vqa": Format(easy_vqa.convert, easy_vqa.read, ordered=False, needs_files=False),
    "easy_vqa_captions": Format(easy_vqa.convert_caption, easy_vqa.read_captions, documents=True, needs_files=False),
}
"""The more special before the more general: of two that fit equally many records, the first is recognised.

SVIT's turns stay in order, although its conversations could change places: inside one, they build on each other.
"""


def recognise(records: Sequence[dict[str, Any]]) -> str:
    """The format that fits most of the records. Raises UserError if none fits any."""
    fitting = Counter(name for name, family in FORMATS.items() for record in records if family.fits(record))
    if not fitting:
        keys = sorted({str(key) for record in records for key in record})
        raise UserError(
            f"format: auto: {len(records)} records with the keys {', '.join(keys[:20]) or '(none)'} are of no format "
            f"known here: {', '.join(FORMATS)}; set format, and columns where the names differ"
        )
    return fitting.most_common(1)[0][0]


def recognise_source(source: Source) -> str:
    """The format of the first records of a source that does not say."""
    below = [file for path in source.paths for file in (path.rglob("*") if path.is_dir() else [path])]
    kinds = {file.suffix.lower() for file in below if file.is_file() and file.name not in image_folder.METADATA}
    if kinds == {".txt"}:
        return "text"
    if kinds & set(IMAGE_SUFFIXES) and kinds <= {*IMAGE_SUFFIXES, ".txt"}:
        return "image_folder"
    first = [record for _, record in islice(read_records(source), FIRST_RECORDS) if isinstance(record, dict)]
    return recognise(first)


def hold_dialogues(formats: Iterable[str]) -> bool:
    """Whether sources of these formats need `<end_of_utterance>`; documents alone leave a base a base."""
    return any(not FORMATS[name].documents for name in formats)
