"""Dataset record -> Dialogue: a reader that finds the records of a dataset family, and a function that converts one."""

from collections.abc import Iterable

from finetune.data.field_names import ANSWERS, CAPTIONS, CONTEXTS, IMAGES, QUESTIONS
from finetune.data.formats import (
    conversations,
    documents,
    easy_vqa,
    image_folder,
    messages,
    mimic_it,
    prompts,
    questions,
    vqa,
)
from finetune.data.formats.format import Format
from finetune.data.io.files import read_records
from finetune.data.leftovers import SYSTEM

_SHOWN, _NUMBERED = "image|images", "image_id"
_BEFORE = ("|".join(SYSTEM), "history")
_CHOSEN = "the chosen answers are trained on, the rejected ones not"


def _any(names: Iterable[str]) -> str:
    return "|".join(names)


_FORMATS = {
    "messages": Format(messages.convert, read_records, messages.is_messages, ("messages", _SHOWN, _BEFORE[0])),
    "svit": Format(
        conversations.convert_svit, read_records, conversations.is_svit, ("conversations", f"{_NUMBERED}|image")
    ),
    "llava": Format(conversations.convert, read_records, conversations.is_llava, ("conversations", _SHOWN, _BEFORE[0])),
    "sharegpt": Format(
        conversations.convert, read_records, conversations.is_sharegpt, ("conversations", _SHOWN, _BEFORE[0])
    ),
    "ultrachat": Format(conversations.convert_ultrachat, read_records, conversations.is_ultrachat, ("data",)),
    "m3it": Format(
        questions.convert_m3it,
        read_records,
        questions.is_m3it,
        ("instruction", "inputs", "outputs", "image_base64_str", _SHOWN, *_BEFORE),
        ordered=False,
    ),
    "mimic_it": Format(
        mimic_it.convert,
        mimic_it.read,
        mimic_it.is_mimic_it,
        ("instruction", "answer", "image_ids|images", "rel_ins_ids", "related"),
    ),
    "alpaca": Format(
        questions.convert_alpaca,
        read_records,
        questions.is_alpaca,
        ("instruction", "input", "output", _SHOWN, *_BEFORE),
    ),
    "spot_the_diff": Format(
        questions.convert_spot_the_diff, read_records, questions.is_spot_the_diff, ("img_id", "sentences")
    ),
    "cauldron": Format(
        questions.convert_cauldron, read_records, questions.is_cauldron, (_SHOWN, "texts"), ordered=False
    ),
    "vqa": Format(
        vqa.convert,
        vqa.read,
        vqa.is_vqa,
        (
            _any(vqa.ASKED),
            _any(vqa.ANSWERED),
            "multiple_choice_answer",
            _any(IMAGES),
            _NUMBERED,
            "question_id",
            "data_subtype",
        ),
        ordered=False,
    ),
    "lrv": Format(
        questions.convert_lrv,
        read_records,
        questions.is_lrv,
        ("question", "answer", _any(IMAGES), _NUMBERED, *_BEFORE),
        ordered=False,
    ),
    "prompt_completion": Format(
        prompts.convert_prompt_completion,
        read_records,
        prompts.is_prompt_completion,
        ("prompt", "completion", _any(IMAGES), *_BEFORE),
    ),
    "preference": Format(
        prompts.convert_preference,
        read_records,
        prompts.is_preference,
        (_any(prompts.PROMPTS), "input", "chosen", "rejected", _any(IMAGES), *_BEFORE),
        note=_CHOSEN,
    ),
    "qa": Format(
        prompts.convert_qa,
        read_records,
        prompts.is_qa,
        (_any(QUESTIONS), "input", _any(ANSWERS), _any(CONTEXTS), _any(IMAGES), _NUMBERED, *_BEFORE),
    ),
    "obelics": Format(
        documents.convert_obelics, read_records, documents.is_obelics, ("images", "texts"), documents=True
    ),
    "pairs": Format(
        documents.convert_pair,
        read_records,
        documents.is_pair,
        (_any(documents.PAIR_IMAGES), _NUMBERED, _any(CAPTIONS)),
        documents=True,
        captions=True,
    ),
    "image_folder": Format(
        documents.convert_pair,
        image_folder.read,
        reads=(_any(image_folder.FILES), _any(CAPTIONS)),
        documents=True,
        captions=True,
    ),
    "class_folders": Format(documents.convert_pair, image_folder.read_classes, documents=True, captions=True),
    "text": Format(documents.convert_text, documents.read_texts, documents.is_text, ("text", "title"), documents=True),
    "easy_vqa": Format(easy_vqa.convert, easy_vqa.read, ordered=False),
    "easy_vqa_captions": Format(easy_vqa.convert_caption, easy_vqa.read_captions, documents=True, captions=True),
}
"""The more special before the more general: of two that fit equally many records, the first is recognised.

SVIT's turns stay in order, although its conversations could change places: inside one, they build on each other.
"""
FORMATS = {name: family.checked() for name, family in _FORMATS.items()}
