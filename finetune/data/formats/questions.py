"""Questions with their answers, under the names that datasets give them -> Dialogue.

{"instruction": "What is it?", "input": "", "output": "A cat."}                                              Alpaca
{"query": "<image>What is it?", "response": "A cat.", "history": [["Hello", "Hello."]], "images": ["cat.jpg"]} ms-swift
{"prompt": "What is it?", "completion": "A cat.", "images": ["cat.jpg"]}, or both as lists of messages             TRL
{"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}, trained on the chosen answer only             TRL
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats.conversations import turn_of
from finetune.data.formats.fields import (
    ANSWERS,
    CONTEXTS,
    IMAGES,
    QUESTIONS,
    all_answers,
    answer_of,
    first_item,
    first_name,
    has,
    joined,
    listed_images,
    name_of,
    optional,
    own_image,
    required,
    required_list,
)
from finetune.data.formats.placeholders import build, history
from finetune.data.formats.unused_keys import leftovers
from finetune.data.io.image_roots import ImageRoot

DIFFERENCES = "What are the differences between the two images?"

PROMPTS = ("prompt", "question", "query", "instruction", "problem")
"""Keys that can hold the question of a preference record."""


def convert_lrv(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert LRV-Instruction: {"image_id": "2392588" or "image": file, "question", "answer", "task"}."""
    turns = (user(required(record, "question", str)), assistant(answer_of(record, "answer")))
    return build(record, root, [*history(record), *turns], [own_image(record, root, "{image_id}.jpg")])


def is_lrv(record: dict[str, Any]) -> bool:
    """Return whether the record is {"question", "answer"} with an image or its number."""
    answered = has(record, "question", str) and isinstance(record.get("answer"), str | int | float)
    return answered and (has(record, "image_id") or has(record, "image"))


def convert_m3it(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert M3IT: {"instruction", "inputs", "outputs", "image_base64_str": [base64, ...]}, on the hub "image"."""
    encoded = record.get("image_base64_str")
    if isinstance(encoded, str) or encoded is None:
        texts = [encoded] if encoded is not None else []
    else:
        texts = required_list(record, "image_base64_str", str)
    images = (*map(root.base64, texts), *listed_images(record, root))
    question = joined((required(record, "instruction", str), optional(record, "inputs", str)))
    turns = (user(question), assistant(answer_of(record, "outputs")))
    return build(record, root, [*history(record), *turns], images)


def is_m3it(record: dict[str, Any]) -> bool:
    """Return whether the record is {"instruction", "outputs"}."""
    return has(record, "instruction", str) and has(record, "outputs")


def convert_alpaca(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert Alpaca: {"instruction", "input", "output"}, optionally "system", "history" and images."""
    question = joined((required(record, "instruction", str), optional(record, "input", str)))
    turns = (user(question), assistant(answer_of(record, "output")))
    return build(record, root, [*history(record), *turns], listed_images(record, root))


def is_alpaca(record: dict[str, Any]) -> bool:
    """Return whether the record is {"instruction", "output"}."""
    return has(record, "instruction", str) and has(record, "output")


def convert_cauldron(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert The Cauldron: {"images": [...], "texts": [{"user", "assistant"}, ...]}, all texts about all images."""
    turns, ignored = list[Turn](), list[str]()
    for text in required_list(record, "texts", dict):
        turns += [user(required(text, "user", str)), assistant(answer_of(text, "assistant"))]
        ignored += leftovers(text, {"user", "assistant"}, shows=False, inside="texts[].")
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_cauldron(record: dict[str, Any]) -> bool:
    """Return whether the record is {"texts": [{"user", "assistant"}, ...]}."""
    first = first_item(record, "texts")
    return isinstance(first, dict) and has(first, "user", str) and has(first, "assistant")


def convert_spot_the_diff(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert Spot-the-Diff: {"img_id": "2019", "sentences": [...]}; its images are 2019.png and 2019_2.png."""
    first = root.named(record, "{img_id}.png")
    second = root.named({**record, "img_id": f"{record.get('img_id')}_2"}, "{img_id}.png")
    sentences = [_sentence(text) for text in required_list(record, "sentences", str) if text.strip()]
    return build(record, root, (user(DIFFERENCES), assistant(" ".join(sentences))), (first, second))


def _sentence(text: str) -> str:
    """Return a text that begins with a capital letter and ends with a full stop, unless it ends with . ! or ?"""
    stripped = text.strip()
    return stripped[0].upper() + stripped[1:] + ("" if stripped.endswith((".", "!", "?")) else ".")


def is_spot_the_diff(record: dict[str, Any]) -> bool:
    """Return whether the record is {"img_id", "sentences": [...]}."""
    return has(record, "img_id") and has(record, "sentences", list)


def convert_qa(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert a question and its answer; "history" holds earlier ones, "context" the text that is asked about."""
    question, answer = name_of(record, QUESTIONS), name_of(record, ANSWERS)
    asks = [name for name in QUESTIONS if has(record, name, str) and record[name].strip()]
    if len(asks) > 1 and asks != ["instruction", "input"]:
        detail = f"{' and '.join(asks)}: expected one; `ignore: [{asks[-1]}]` reads another"
        raise RecordError("several questions", detail)
    context = first_name(record, CONTEXTS)
    required(record, question, str)
    asked = joined((*(record[name] for name in asks), optional(record, context, str) if context else None))
    answers = all_answers(record, answer)
    references = tuple(answers) if isinstance(record[answer], list) else ()
    turns = [*history(record), user(asked), assistant(answers[0], references=references)]
    return build(record, root, turns, _images(record, root))


def is_qa(record: dict[str, Any]) -> bool:
    """Return whether the record has a question and an answer, under any of their names."""
    asked, answered = first_name(record, QUESTIONS), first_name(record, ANSWERS)
    return bool(asked and answered) and isinstance(record[asked or ""], str)


def convert_prompt_completion(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert TRL's {"prompt", "completion"}: both are texts, or both are lists of messages."""
    ignored: list[str] = []
    turns = [*_turns(record, "prompt", root, ignored), *_turns(record, "completion", root, ignored)]
    return build(record, root, [*history(record), *turns], _images(record, root), ignored=ignored)


def is_prompt_completion(record: dict[str, Any]) -> bool:
    """Return whether the record is {"prompt", "completion"}."""
    return _has_turns(record, "prompt") and has(record, "completion")


def convert_preference(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert TRL's {"prompt", "chosen", "rejected"} to the prompt and the chosen answer.

    "chosen" may be the whole conversation, and the prompt may have another name.
    """
    ignored: list[str] = []
    chosen = _turns(record, "chosen", root, ignored)
    whole = bool(chosen) and chosen[0].role != "assistant"
    asks = first_name(record, PROMPTS) if whole else name_of(record, PROMPTS)
    prompt = _turns(record, asks, root, ignored) if asks else []
    if asks and has(record, "input"):
        prompt = [user(joined((required(record, asks, str), required(record, "input", str))))]
    if whole and any(turn not in chosen for turn in prompt):
        raise RecordError("prompt and chosen do not match", '"chosen" is a whole conversation without the "prompt"')
    turns = [*history(record), *([] if whole else prompt), *chosen]
    return build(record, root, turns, _images(record, root), ignored=ignored)


def is_preference(record: dict[str, Any]) -> bool:
    """Return whether the record is {"chosen", "rejected"}, or a question with its "chosen" answer."""
    return _has_turns(record, "chosen") and (has(record, "rejected") or first_name(record, PROMPTS) is not None)


def _turns(record: Mapping[str, Any], name: str, root: ImageRoot, ignored: list[str]) -> list[Turn]:
    """Return the turns of a list of messages; a text is one turn: the assistant's for an answer, else the user's."""
    value = record.get(name)
    if isinstance(value, list):
        return [turn_of(message, root, ignored) for message in value]
    answers = name in ("chosen", "completion")
    return [assistant(all_answers(record, name)[0]) if answers else user(required(record, name, str))]


def _has_turns(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, str) or (isinstance(value, list) and isinstance(value[0] if value else None, dict))


def _images(record: dict[str, Any], root: ImageRoot) -> tuple[Image, ...]:
    """Return the images that a record lists, under any of their names, or the image of its "image_id"."""
    if any(has(record, name) for name in ("image", "images")):
        return listed_images(record, root)
    if name := first_name(record, IMAGES):
        return listed_images(record, root, (name,))
    return (root.named(record, "{image_id}.jpg"),) if has(record, "image_id") else ()
