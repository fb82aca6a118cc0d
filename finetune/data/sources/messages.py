"""`messages` records (OpenAI and TRL style) -> Dialogue.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "Who is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

An image part names its image under "image", "path" or "url" (OpenAI: "image_url"), or nothing: then it takes the next
of the record's own "images". With "images" and no image part at all, the images open the first user turn.
"""

from collections.abc import Iterator
from typing import Any

from finetune.data.dialogue import Dialogue, Part, RecordError, Role, Turn
from finetune.data.sources.fields import first_item, listed_images, open_with
from finetune.data.sources.roots import ImageRoot

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise RecordError("no messages", f'expected "messages": [...], got keys {sorted(map(str, record))[:8]}')
    listed = listed_images(record, root)
    unplaced = iter(listed)
    turns = [_turn(message, root, unplaced) for message in messages]
    left = tuple(unplaced)
    if left and any(turn.images for turn in turns):
        raise RecordError("image count", f"{len(listed)} images listed, {len(listed) - len(left)} placed in the text")
    return Dialogue(open_with(left, turns))


def is_messages(record: dict[str, Any]) -> bool:
    first = first_item(record, "messages")
    return isinstance(first, dict) and "role" in first


def _turn(message: object, root: ImageRoot, unplaced: Iterator[Part]) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in _ROLES:
        got = role if isinstance(message, dict) else type(message).__name__
        raise RecordError("unknown role", f"expected one of {', '.join(_ROLES)}; got {got!r:.80}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RecordError("unknown content", f"expected text or a list of parts, got {type(content).__name__}")
    return Turn(_ROLES[role], tuple(_part(part, root, unplaced) for part in parts))


def _part(part: object, root: ImageRoot, unplaced: Iterator[Part]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and kind in ("image", "image_url"):
        reference = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
        if isinstance(reference, dict) and "url" in reference:
            reference = reference["url"]
        if reference is not None:
            return root.image(reference)
        image = next(unplaced, None)
        if image is None:
            raise RecordError("image count", 'an image part names no file and no "images" are left for it')
        return image
    raise RecordError("unknown content", f"expected a text or image part, got {part!r:.80}")
