"""Prompts with their answers, under the names that people give them -> Dialogue: ms-swift, TRL, question and answer.

{"query": "<image>What is it?", "response": "A cat.", "history": [["Hello", "Hello."]], "images": ["cat.jpg"]}
{"prompt": "What is it?", "completion": "A cat.", "images": ["cat.jpg"]}, or both as lists of messages
{"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}, trained on the chosen answer alone

"""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.field_names import ANSWERS, CONTEXTS, IMAGES, QUESTIONS, all_answers, first_name, name_of
from finetune.data.formats.build import build, history
from finetune.data.formats.fields import has, joined, listed_images, optional, required
from finetune.data.formats.messages import turn_of
from finetune.data.io.image_roots import ImageRoot

PROMPTS = ("prompt", "question", "query", "instruction", "problem")
"""Names of what a preference is about."""


def convert_qa(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """A question and its answer; earlier ones in "history", what the question is about in "context"."""
    question, answer = name_of(record, QUESTIONS), name_of(record, ANSWERS)
    asks = [name for name in QUESTIONS if has(record, name, str) and record[name].strip()]
    if len(asks) > 1 and asks != ["instruction", "input"]:
        raise RecordError(
            "several questions", f"{' and '.join(asks)}: expected one; `ignore: [{asks[-1]}]` reads another"
        )
    context = first_name(record, CONTEXTS)
    required(record, question, str)
    asked = joined((*(record[name] for name in asks), optional(record, context, str) if context else None))
    answers = all_answers(record, answer)
    references = tuple(answers) if isinstance(record[answer], list) else ()
    turns = [*history(record), user(asked), assistant(answers[0], references=references)]
    return build(record, root, turns, _images(record, root))


def is_qa(record: dict[str, Any]) -> bool:
    asked, answered = first_name(record, QUESTIONS), first_name(record, ANSWERS)
    return bool(asked and answered) and isinstance(record[asked or ""], str)


def convert_prompt_completion(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """TRL: both are texts, or both lists of messages."""
    ignored: list[str] = []
    turns = [*_said(record, "prompt", root, ignored), *_said(record, "completion", root, ignored)]
    return build(record, root, [*history(record), *turns], _images(record, root), ignored=ignored)


def is_prompt_completion(record: dict[str, Any]) -> bool:
    return _is_said(record, "prompt") and has(record, "completion")


def convert_preference(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """TRL: the prompt with the chosen answer, or "chosen" as the whole conversation; elsewhere a question with both."""
    ignored: list[str] = []
    chosen = _said(record, "chosen", root, ignored)
    whole = bool(chosen) and chosen[0].role != "assistant"
    asks = first_name(record, PROMPTS) if whole else name_of(record, PROMPTS)
    prompt = _said(record, asks, root, ignored) if asks else []
    if asks and has(record, "input"):
        prompt = [user(joined((required(record, asks, str), required(record, "input", str))))]
    if whole and any(turn not in chosen for turn in prompt):
        raise RecordError("prompt and chosen do not match", '"chosen" is a whole conversation without the "prompt"')
    turns = [*history(record), *([] if whole else prompt), *chosen]
    return build(record, root, turns, _images(record, root), ignored=ignored)


def is_preference(record: dict[str, Any]) -> bool:
    return _is_said(record, "chosen") and (has(record, "rejected") or first_name(record, PROMPTS) is not None)


def _said(record: Mapping[str, Any], name: str, root: ImageRoot, ignored: list[str]) -> list[Turn]:
    """The turns of a list of messages; a text is the assistant's if it is an answer, else the user's."""
    value = record.get(name)
    if isinstance(value, list):
        return [turn_of(message, root, ignored) for message in value]
    answers = name in ("chosen", "completion")
    return [assistant(all_answers(record, name)[0]) if answers else user(required(record, name, str))]


def _is_said(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, str) or (isinstance(value, list) and isinstance(value[0] if value else None, dict))


def _images(record: dict[str, Any], root: ImageRoot) -> tuple[Image, ...]:
    """The images that a record lists, under whichever name, or the one whose number it gives."""
    if any(has(record, name) for name in ("image", "images")):
        return listed_images(record, root)
    if name := first_name(record, IMAGES):
        return listed_images(record, root, (name,))
    return (root.named(record, "{image_id}.jpg"),) if has(record, "image_id") else ()
