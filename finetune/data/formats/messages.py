"""`messages` records (OpenAI and TRL style) -> Dialogue.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                               {"type": "text", "text": "Who is this?"}]},
                  {"role": "assistant", "content": "A cat."}]}

An image part names its image under "image", "path" or "url" (OpenAI: "image_url"), or nothing: then it takes the next
of the record's own "images", as a placeholder in the text does (`placeholders`). An assistant's message with
"weight": 0, "loss": false or "train": false is context: it is not trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.conversation import Dialogue, Image, Part, RecordError, Role, Turn
from finetune.data.field_names import answer_text
from finetune.data.formats.build import build
from finetune.data.formats.fields import first_item, has, listed_images, required
from finetune.data.formats.placeholders import Slot, place_images
from finetune.data.io.image_roots import ImageRoot
from finetune.data.leftovers import WEIGHTS, leftovers

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
_READ = frozenset({"role", "content", "from", "value", "image", "images", *WEIGHTS})
_TEXT_PARTS, _IMAGE_PARTS = ("text", "input_text", "output_text"), ("image", "image_url", "input_image")
_REFERENCES = ("image", "path", "url", "image_url")
_READ_OF_TEXT = frozenset({"type", "text"})
_READ_OF_IMAGE = frozenset({"type", "text", "index", "detail", *_REFERENCES})


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise RecordError("no messages", f'expected "messages": [...], got keys {sorted(map(str, record))[:8]}')
    ignored: list[str] = []
    turns = [turn_of(message, root, ignored) for message in messages]
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_messages(record: dict[str, Any]) -> bool:
    first = first_item(record, "messages")
    return isinstance(first, dict) and "role" in first


def turn_of(message: object, root: ImageRoot, ignored: list[str]) -> Turn:
    """{"role", "content"}, or ShareGPT's {"from", "value"}; what is not used of it is added to `ignored`.

    Images that the message itself lists are at their places, those of the record not yet. Raises RecordError.
    """
    if not isinstance(message, dict):
        raise RecordError("unknown role", f"expected one of {', '.join(_ROLES)}; got {type(message).__name__}")
    speaker, name = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    said = required(message, speaker, str) if speaker == "from" else message.get(speaker)
    if not isinstance(said, str) or said not in _ROLES:
        raise RecordError("unknown role", f'"{speaker}": expected one of {", ".join(_ROLES)}; got {said!r:.80}')
    role = _ROLES[said]
    ignored += leftovers(message, _READ, shows=False, inside="messages[].")
    content = required(message, name, object) if speaker == "from" else message.get(name)
    if role == "assistant" and isinstance(content, bool | int | float):
        content = answer_text(content, name)
    if isinstance(content, str):
        parts: tuple[Part, ...] = (content,)
    elif isinstance(content, list):
        parts = tuple(_part(part, root, ignored) for part in content)
    else:
        got = f'"{name}": expected text, got {content!r:.80}; a list of text and image parts is read, too'
        raise RecordError("unknown content", got)
    turn = Turn(role, parts, supervised=_is_supervised(message, role, ignored))
    return _with_own_images(turn, listed_images(message, root), root) if message.keys() & {"image", "images"} else turn


def _part(part: object, root: ImageRoot, ignored: list[str]) -> Part:
    """A text, an image, or the place of one that the record lists. Without a "type", by what it holds."""
    if not isinstance(part, dict):
        raise RecordError("unknown content", f"expected a text or image part, got {part!r:.80}")
    if not all(part[name] for name in WEIGHTS if part.get(name) is not None):
        raise RecordError("answer trained in part", f"a part has a weight of its own: {part!r:.80}")
    untyped = "text" if has(part, "text") else "image" if any(has(part, key) for key in _REFERENCES) else None
    kind = part.get("type") or untyped
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        ignored += leftovers(part, _READ_OF_TEXT, shows=False, inside="content[].")
        return str(part["text"])
    if kind in _IMAGE_PARTS and not part.get("text"):
        ignored += leftovers(part, _READ_OF_IMAGE, shows=True, inside="content[].")
        return _image(part, root)
    raise RecordError("unknown content", f"expected a text or image part, got {part!r:.80}")


def _image(part: Mapping[str, Any], root: ImageRoot) -> Part:
    reference = next((part[key] for key in _REFERENCES if part.get(key)), None)
    if isinstance(reference, dict) and "url" in reference:
        reference = reference["url"]
    if reference is not None:
        return root.image(reference)
    number = part.get("index")
    return Slot("<image>" if number is None else f"<image_{number}>")


def _is_supervised(message: Mapping[str, Any], role: Role, ignored: list[str]) -> bool:
    """Whether none of a message's weights is 0 or false. Only an answer is ever trained on."""
    if message.keys().isdisjoint(WEIGHTS):
        return True
    given = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecordError("unknown weight", f'"{name}": expected 0, 1, true or false, got {value!r:.80}')
        if role != "assistant" and value:
            ignored.append(f"messages[].{name} of a {role} message")
    return all(given.values()) if role == "assistant" else True


def _with_own_images(turn: Turn, images: Sequence[Image], root: ImageRoot) -> Turn:
    if not images:
        return turn
    if turn.role != "user":
        raise RecordError(
            "image count", f"{len(images)} images listed in a {turn.role} message: only a user shows some"
        )
    (placed,), _ = place_images([turn], images, root)
    return placed
