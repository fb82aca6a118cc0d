"""Conversations as lists of what was said -> Dialogue: ShareGPT and what follows it, and UltraChat.

{"image": "000000033471.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"},
                                                {"from": "gpt", "value": "White and red."}]}
"""

from collections.abc import Iterator, Sequence
from typing import Any

from finetune.data.dialogue import Dialogue, Image, Part, RecordError, Role, Turn
from finetune.data.sources.fields import first_item, has, listed_images, open_with, own_image, required, required_list
from finetune.data.sources.roots import ImageRoot

PLACEHOLDER = "<image>"
"""Where an image goes in what the user says; in an answer it is text."""

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """ShareGPT, LLaVA-Instruct, LLaVAR, LLaVA's mix665k. Without a placeholder the images open the first question."""
    images = listed_images(record, root)
    return Dialogue(_placed([_turn(said) for said in required_list(record, "conversations", dict)], images))


def is_llava(record: dict[str, Any]) -> bool:
    return _is_said(first_item(record, "conversations")) and (has(record, "image") or has(record, "images"))


def is_sharegpt(record: dict[str, Any]) -> bool:
    return _is_said(first_item(record, "conversations")) and not is_llava(record) and not has(record, "image_id")


def convert_svit(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """SVIT: an image by its number, and one conversation about it, or several that become one.

    {"image_id": 2410153, "conversations": [{"content": [{"from": "user", "value": ...}, ...]}, ...]}
    """
    items = required_list(record, "conversations", dict)
    several = any("content" in item for item in items)
    conversations = [required_list(item, "content", dict) for item in items] if several else [items]
    turns = [turn for said in conversations for turn in Dialogue(tuple(map(_turn, said))).turns]
    return Dialogue(_placed(turns, [own_image(record, root, "{image_id}.jpg")]))


def is_svit(record: dict[str, Any]) -> bool:
    first = first_item(record, "conversations")
    nested = isinstance(first, dict) and _is_said(first_item(first, "content"))
    return nested or (_is_said(first) and has(record, "image_id") and not is_llava(record))


def convert_ultrachat(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """UltraChat: {"id": "0", "data": [question, answer, question, answer, ...]}."""
    said = required_list(record, "data", str)
    return Dialogue(tuple(Turn("assistant" if index % 2 else "user", (text,)) for index, text in enumerate(said)))


def is_ultrachat(record: dict[str, Any]) -> bool:
    return isinstance(first_item(record, "data"), str)


def _is_said(item: object) -> bool:
    return isinstance(item, dict) and has(item, "from") and "value" in item


def _turn(said: dict[str, Any]) -> Turn:
    speaker = required(said, "from", str)
    if speaker not in _ROLES:
        raise RecordError("unknown role", f'"from": expected one of {", ".join(_ROLES)}; got {speaker!r:.80}')
    return Turn(_ROLES[speaker], (required(said, "value", str),))


def _placed(turns: Sequence[Turn], images: Sequence[Image]) -> tuple[Turn, ...]:
    """The turns with every placeholder of the user's replaced by the next image."""
    places = sum(turn.text.count(PLACEHOLDER) for turn in turns if turn.role == "user")
    if not places:
        return open_with(images, turns)
    if places != len(images):
        raise RecordError("image count", f"{len(images)} images for {places} {PLACEHOLDER} in the questions")
    left = iter(images)
    return tuple(Turn("user", tuple(_filled(turn.text, left))) if turn.role == "user" else turn for turn in turns)


def _filled(text: str, images: Iterator[Image]) -> Iterator[Part]:
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            yield next(images)
        if piece.strip():
            yield piece
