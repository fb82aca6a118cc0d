"""Conversations as lists of messages -> Dialogue: OpenAI and TRL's messages, ShareGPT and LLaVA, SVIT, UltraChat.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "Who is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

    {"image": "000000033471.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"},
                                                    {"from": "gpt", "value": "White and red."}]}

An image part gives its image under "image", "path" or "url" (OpenAI: "image_url"). A part without one takes the
next of the record's own "images", as a placeholder in a text does. An assistant's message with "weight": 0,
"loss": false or "train": false is context: it is not trained on.
"""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import Dialogue, Part, RecordError, Role, Turn
from finetune.data.formats.fields import answer_text, first_item, has, listed_images, own_image, required, required_list
from finetune.data.formats.placeholders import Slot, build, place_images
from finetune.data.formats.unused_keys import WEIGHTS, leftovers
from finetune.data.io.image_roots import ImageRoot

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
}
_READ_OF_MESSAGE = frozenset({"role", "content", "from", "value", "image", "images", *WEIGHTS})
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_REFERENCES = ("image", "path", "url", "image_url")
_READ_OF_TEXT = frozenset({"type", "text"})
_READ_OF_IMAGE = frozenset({"type", "text", "index", "detail", *_REFERENCES})


def convert_messages(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert OpenAI's and TRL's messages."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise RecordError("no messages", f'expected "messages": [...], got keys {sorted(map(str, record))[:8]}')
    ignored: list[str] = []
    turns = [turn_of(message, root, ignored) for message in messages]
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_messages(record: dict[str, Any]) -> bool:
    """Return whether the record is {"messages": [{"role", ...}, ...]}."""
    first = first_item(record, "messages")
    return isinstance(first, dict) and "role" in first


def convert_sharegpt(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert ShareGPT, LLaVA-Instruct, LLaVAR and LLaVA's mix665k; also with the keys "role" and "content"."""
    ignored: list[str] = []
    turns = [turn_of(message, root, ignored) for message in required_list(record, "conversations", dict)]
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_llava(record: dict[str, Any]) -> bool:
    """Return whether the record is {"conversations": [{"from", "value"}, ...], "image"}."""
    return _is_message(first_item(record, "conversations")) and (has(record, "image") or has(record, "images"))


def is_sharegpt(record: dict[str, Any]) -> bool:
    """Return whether the record is {"conversations": [{"from", "value"}, ...]} without an image."""
    return _is_message(first_item(record, "conversations")) and not is_llava(record) and not has(record, "image_id")


def convert_svit(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert SVIT: an image, given by number, and one conversation about it, or several, which are joined.

    {"image_id": 2410153, "conversations": [{"content": [{"from": "user", "value": ...}, ...]}, ...]}
    """
    items, ignored = required_list(record, "conversations", dict), list[str]()
    several = any("content" in item and "role" not in item for item in items)
    conversations = [required_list(item, "content", dict) for item in items] if several else [items]
    converted = [tuple(turn_of(message, root, ignored) for message in messages) for messages in conversations]
    turns = [turn for conversation in converted for turn in Dialogue(conversation).turns]
    images = [own_image(record, root, "{image_id}.jpg")]
    return build(record, root, turns, images, ignored=ignored)


def is_svit(record: dict[str, Any]) -> bool:
    """Return whether the record has conversations inside "conversations", or an image by its number."""
    first = first_item(record, "conversations")
    nested = isinstance(first, dict) and _is_message(first_item(first, "content"))
    return nested or (_is_message(first) and has(record, "image_id") and not is_llava(record))


def convert_ultrachat(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert UltraChat: {"id": "0", "data": [question, answer, question, answer, ...]}."""
    texts = required_list(record, "data", str)
    turns = [Turn("assistant" if index % 2 else "user", (text,)) for index, text in enumerate(texts)]
    return build(record, root, turns)


def is_ultrachat(record: dict[str, Any]) -> bool:
    """Return whether the record is {"data": [text, ...]}."""
    return isinstance(first_item(record, "data"), str)


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and (
        (has(item, "from") and "value" in item) or (has(item, "role") and "content" in item)
    )


def turn_of(message: object, root: ImageRoot, ignored: list[str]) -> Turn:
    """Return the turn of {"role", "content"} or {"from", "value"}; add the names of unused content to `ignored`.

    Images that the message lists are put at its placeholders; images of the record come later. Raises RecordError.
    """
    if not isinstance(message, dict):
        raise RecordError("unknown role", f"expected one of {', '.join(_ROLES)}; got {type(message).__name__}")
    speaker, name = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    given = required(message, speaker, str) if speaker == "from" else message.get(speaker)
    if not isinstance(given, str) or given not in _ROLES:
        raise RecordError("unknown role", f'"{speaker}": expected one of {", ".join(_ROLES)}; got {given!r:.80}')
    role = _ROLES[given]
    ignored += leftovers(message, _READ_OF_MESSAGE, shows=False, inside="messages[].")
    content = required(message, name, object) if speaker == "from" else message.get(name)
    if role == "assistant" and isinstance(content, bool | int | float):
        content = answer_text(content, name)
    if isinstance(content, str):
        parts: tuple[Part, ...] = (content,)
    elif isinstance(content, list):
        parts = tuple(_part(part, root, ignored) for part in content)
    else:
        detail = f'"{name}": expected text or a list of text and image parts, got {content!r:.80}'
        raise RecordError("unknown content", detail)
    turn = Turn(role, parts, supervised=_is_supervised(message, role, ignored))
    images = listed_images(message, root) if message.keys() & {"image", "images"} else ()
    if images and role != "user":
        raise RecordError("image count", f"{len(images)} images listed in a {role} message: only a user shows some")
    return place_images([turn], images, root)[0][0] if images else turn


def _part(part: object, root: ImageRoot, ignored: list[str]) -> Part:
    """Return a text, an image, or the slot of an image that the record lists. Without a "type", the keys decide."""
    if not isinstance(part, dict):
        raise RecordError("unknown content", f"expected a text or image part, got {part!r:.80}")
    if not all(part[name] for name in WEIGHTS if part.get(name) is not None):
        raise RecordError("answer trained in part", f"a part has a weight of its own: {part!r:.80}")
    untyped = "text" if has(part, "text") else "image" if any(has(part, key) for key in _REFERENCES) else None
    kind = part.get("type") or untyped
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        ignored += leftovers(part, _READ_OF_TEXT, shows=False, inside="content[].")
        return str(part["text"])
    if kind not in _IMAGE_PARTS or part.get("text"):
        raise RecordError("unknown content", f"expected a text or image part, got {part!r:.80}")
    ignored += leftovers(part, _READ_OF_IMAGE, shows=True, inside="content[].")
    reference = next((part[key] for key in _REFERENCES if part.get(key)), None)
    if isinstance(reference, dict) and "url" in reference:
        reference = reference["url"]
    if reference is not None:
        return root.image(reference)
    number = part.get("index")
    return Slot("<image>" if number is None else f"<image_{number}>")


def _is_supervised(message: Mapping[str, Any], role: Role, ignored: list[str]) -> bool:
    """Return whether none of a message's weights is 0 or false. Only answers are ever trained on."""
    if message.keys().isdisjoint(WEIGHTS):
        return True
    given = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError("unknown weight", f'"{name}": expected 0, 1, true or false, got {value!r:.80}')
        if role != "assistant" and value:
            ignored.append(f"messages[].{name} of a {role} message")
    return all(given.values()) if role == "assistant" else True
