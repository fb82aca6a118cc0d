"""Dataset formats: how records are read, recognised and converted into dialogues. FORMATS is the table.

To add a format, write a function that converts one record, and one that recognises such a record; then add a row to
FORMATS, and the format's name to `FormatName` in finetune/recipe/schema.py. For example, for records such as
{"picture": "cat.jpg", "asked": "Who is this?", "answered": "A cat."}:

    from finetune.data.conversation import Dialogue, assistant, user
    from finetune.data.formats.placeholders import build
    from finetune.data.formats.fields import answer_of, has, listed_images, required

    def convert_riddle(record: dict[str, Any], root: ImageRoot) -> Dialogue:
        turns = [user(required(record, "asked", str)), assistant(answer_of(record, "answered"))]
        return build(record, root, turns, listed_images(record, root, ["picture"]))

    def is_riddle(record: dict[str, Any]) -> bool:
        return has(record, "picture") and has(record, "asked", str)

    FORMATS["riddle"] = Format(convert_riddle, is_riddle, ("picture", "asked", "answered"))

`fields` reads a field or raises a RecordError, under whose reason the record is counted as rejected; `build` puts the
images at their placeholders. The rest needs no code: files of any kind, `columns`, `format: auto`, and a report of
content under keys that the format does not read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.conversation import Dialogue
from finetune.data.formats import conversations, documents, easy_vqa, mimic_it, questions, vqa
from finetune.data.formats.fields import ANSWERS, CAPTIONS, CONTEXTS, IMAGES, QUESTIONS, SYSTEM, first_name
from finetune.data.formats.read_records import read_records
from finetune.data.formats.unused_keys import leftovers
from finetune.data.io.byte_streams import Record
from finetune.data.io.image_roots import ImageRoot
from finetune.recipe.schema import Source


@dataclass(frozen=True)
class Format:
    """A dataset family."""

    converter: Callable[[dict[str, Any], ImageRoot], Dialogue]
    """(record, image root of its source) -> dialogue. Raises RecordError."""
    fits: Callable[[dict[str, Any]], bool] = lambda record: False
    """Returns whether a record looks like one of this family, for `format: auto`."""
    reads: tuple[str, ...] = ()
    """The fields that it reads, each with its names; the first name with a value is read: ("image|jpg", "text")."""
    read: Callable[[Source], Iterator[Record]] = read_records
    """Yields the records of a source in a stable order."""
    whole: Callable[[Source], bool] = lambda source: False
    """Returns whether `read` must see all files of a source at once, such as questions and their annotations."""
    documents: bool = False
    """Whether its records become documents, which do not end with `<end_of_utterance>`."""
    captions: bool = False
    """Whether a document is an image and its caption, which a prompt turns into a dialogue."""
    ordered: bool = True
    """Whether the turns of a dialogue build on each other; if not, they may be shuffled."""
    note: str = ""
    """A fact to print for everyone who trains on it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names of the fields that it reads."""
        return tuple(name for names in self.reads for name in names.split("|"))

    def convert(self, record: dict[str, Any], root: ImageRoot) -> Dialogue:
        """Return a record's dialogue, which names the unknown keys of the record that hold a value.

        Raises RecordError: no such record, or content under a key that is not read.
        """
        dialogue = self.converter(record, root)
        if not self.reads:  # the reader of this format makes its records
            return dialogue
        read = {first_name(record, names.split("|")) or "" for names in self.reads}
        unread = leftovers(record, read if self.documents else {*read, *SYSTEM}, shows=bool(dialogue.images))
        return replace(dialogue, ignored=(*unread, *dialogue.ignored)) if unread else dialogue


def _any(names: Iterable[str]) -> str:
    return "|".join(names)


def _always(source: Source) -> bool:
    return True


_IMAGE, _IMAGES, _ID = "image|images", _any(IMAGES), "image_id"
_SYSTEM, _HISTORY = _any(SYSTEM), "history"

# fmt: off
FORMATS = {
    # conversations
    "messages": Format(conversations.convert_messages, conversations.is_messages, ("messages", _IMAGE, _SYSTEM)),
    "svit": Format(conversations.convert_svit, conversations.is_svit, ("conversations", f"{_ID}|image")),
    "llava": Format(conversations.convert_sharegpt, conversations.is_llava, ("conversations", _IMAGE, _SYSTEM)),
    "sharegpt": Format(conversations.convert_sharegpt, conversations.is_sharegpt, ("conversations", _IMAGE, _SYSTEM)),
    "ultrachat": Format(conversations.convert_ultrachat, conversations.is_ultrachat, ("data",)),
    # questions and answers
    "m3it": Format(questions.convert_m3it, questions.is_m3it,
                   ("instruction", "inputs", "outputs", "image_base64_str", _IMAGE, _SYSTEM, _HISTORY), ordered=False),
    "mimic_it": Format(mimic_it.convert, mimic_it.is_mimic_it,
                       ("instruction", "answer", "image_ids|images", "rel_ins_ids", "related"),
                       mimic_it.read, mimic_it.is_whole),
    "alpaca": Format(questions.convert_alpaca, questions.is_alpaca,
                     ("instruction", "input", "output", _IMAGE, _SYSTEM, _HISTORY)),
    "spot_the_diff": Format(questions.convert_spot_the_diff, questions.is_spot_the_diff, ("img_id", "sentences")),
    "cauldron": Format(questions.convert_cauldron, questions.is_cauldron, (_IMAGE, "texts"), ordered=False),
    "vqa": Format(vqa.convert, vqa.is_vqa,
                  (_any(vqa.ASKED), _any(vqa.ANSWERED), "multiple_choice_answer", _IMAGES, _ID, "question_id",
                   "data_subtype"), vqa.read, vqa.is_whole, ordered=False),
    "lrv": Format(questions.convert_lrv, questions.is_lrv,
                  ("question", "answer", _IMAGES, _ID, _SYSTEM, _HISTORY), ordered=False),
    "prompt_completion": Format(questions.convert_prompt_completion, questions.is_prompt_completion,
                                ("prompt", "completion", _IMAGES, _SYSTEM, _HISTORY)),
    "preference": Format(questions.convert_preference, questions.is_preference,
                         (_any(questions.PROMPTS), "input", "chosen", "rejected", _IMAGES, _SYSTEM, _HISTORY),
                         note="the chosen answers are trained on, the rejected ones not"),
    "qa": Format(questions.convert_qa, questions.is_qa,
                 (_any(QUESTIONS), "input", _any(ANSWERS), _any(CONTEXTS), _IMAGES, _ID, _SYSTEM, _HISTORY)),
    # documents
    "obelics": Format(documents.convert_obelics, documents.is_obelics, ("images", "texts", "images_urls"),
                      documents=True),
    "pairs": Format(documents.convert_pair, documents.is_pair, (_any(documents.PAIR_IMAGES), _ID, _any(CAPTIONS)),
                    documents=True, captions=True),
    "image_folder": Format(documents.convert_pair, reads=(_any(documents.IMAGE_FILES), _any(CAPTIONS)),
                           read=documents.read_image_folder, whole=_always, documents=True, captions=True),
    "class_folders": Format(documents.convert_pair, read=documents.read_class_folders, whole=_always,
                            documents=True, captions=True),
    "text": Format(documents.convert_text, documents.is_text, ("text", "title"), documents.read_texts,
                   documents.has_texts, documents=True),
    # a Python package
    "easy_vqa": Format(easy_vqa.convert, read=easy_vqa.read, whole=_always, ordered=False),
    "easy_vqa_captions": Format(easy_vqa.convert_caption, read=easy_vqa.read_captions, whole=_always,
                                documents=True, captions=True),
}
# fmt: on
"""If two formats fit equally many records, `format: auto` takes the first, so the more special one comes first.

SVIT keeps the order of turns: its conversations are independent, but the turns inside each build on each other.
"""
