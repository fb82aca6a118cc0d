"""Conversations as lists of what was said -> Dialogue: ShareGPT and what follows it, and UltraChat.

{"image": "000000033471.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"},
                                                {"from": "gpt", "value": "White and red."}]}
"""

from typing import Any

from finetune.data.conversation import Dialogue, Turn
from finetune.data.formats.build import build
from finetune.data.formats.fields import first_item, has, listed_images, own_image, required_list
from finetune.data.formats.messages import turn_of
from finetune.data.io.image_roots import ImageRoot


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """ShareGPT, LLaVA-Instruct, LLaVAR, LLaVA's mix665k; messages with "role" and "content", too."""
    ignored: list[str] = []
    turns = [turn_of(said, root, ignored) for said in required_list(record, "conversations", dict)]
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_llava(record: dict[str, Any]) -> bool:
    return _is_said(first_item(record, "conversations")) and (has(record, "image") or has(record, "images"))


def is_sharegpt(record: dict[str, Any]) -> bool:
    return _is_said(first_item(record, "conversations")) and not is_llava(record) and not has(record, "image_id")


def convert_svit(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """SVIT: an image by its number, and one conversation about it, or several that become one.

    {"image_id": 2410153, "conversations": [{"content": [{"from": "user", "value": ...}, ...]}, ...]}
    """
    items, ignored = required_list(record, "conversations", dict), list[str]()
    several = any("content" in item and "role" not in item for item in items)
    conversations = [required_list(item, "content", dict) for item in items] if several else [items]
    spoken = [tuple(turn_of(said, root, ignored) for said in conversation) for conversation in conversations]
    turns = [turn for one in spoken for turn in Dialogue(one).turns]
    images = [own_image(record, root, "{image_id}.jpg")]
    return build(record, root, turns, images, ignored=ignored)


def is_svit(record: dict[str, Any]) -> bool:
    first = first_item(record, "conversations")
    nested = isinstance(first, dict) and _is_said(first_item(first, "content"))
    return nested or (_is_said(first) and has(record, "image_id") and not is_llava(record))


def convert_ultrachat(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """UltraChat: {"id": "0", "data": [question, answer, question, answer, ...]}."""
    said = required_list(record, "data", str)
    turns = [Turn("assistant" if index % 2 else "user", (text,)) for index, text in enumerate(said)]
    return build(record, root, turns)


def is_ultrachat(record: dict[str, Any]) -> bool:
    return isinstance(first_item(record, "data"), str)


def _is_said(item: object) -> bool:
    return isinstance(item, dict) and (
        (has(item, "from") and "value" in item) or (has(item, "role") and "content" in item)
    )
