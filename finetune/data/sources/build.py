"""What a format has read of a record -> its Dialogue: system message, images at their places, and nothing lost unseen.

A key that a format does not read is one of three kinds: it carries no content (an id, a source); it carries what the
model should have seen or learned (a video, tools, what was said before), and its name is why the record is rejected; or
it is unknown, and counted.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from finetune.data.dialogue import Dialogue, Image, Part, RecordError, Turn, assistant, user
from finetune.data.sources.fields import checked, optional
from finetune.data.sources.placeholders import place_images
from finetune.data.sources.roots import ImageRoot

SYSTEM = ("system", "system_prompt")

WITHOUT_CONTENT = frozenset(
    {
        *("id", "ids", "_id", "idx", "index", "uid", "uuid", "key", "__key__", "__url__", "__local_path__"),
        *("source", "dataset", "subset", "split", "meta", "metadata", "license", "language", "lang"),
        *("timestamp", "date", "created", "created_at", "model", "prompt_id", "conversation_id", "cache_control"),
    }
)

_CONTENT: dict[str, tuple[str, ...]] = {
    "video": ("video", "videos", "video_path", "video_paths", "video_url", "mp4", "webm", "mkv", "avi", "mov"),
    "audio": ("audio", "audios", "audio_path", "audio_paths", "audio_url", "speech", "wav", "mp3", "flac", "ogg"),
    "tool calls": ("tools", "functions", "tool_calls", "function_call", "function_calls"),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "thoughts"),
    "refusal": ("refusal",),
    "text beside the dialogue": (*SYSTEM, "history", "input", "inputs", "context", "passage"),
    "answer trained in part": ("train_detail",),
}
_KINDS = {name: kind for kind, names in _CONTENT.items() for name in names}

_IMAGES = frozenset(
    {
        *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url", "image_urls"),
        *("image_base64", "image_base64_str", "img", "imgs", "img_path", "img_url", "picture", "pictures"),
        *("jpg", "jpeg", "png", "webp"),
    }
)


def build(
    record: Mapping[str, Any],
    root: ImageRoot,
    turns: Iterable[Turn],
    images: Sequence[Image] = (),
    *,
    ignored: Iterable[str] = (),
) -> Dialogue:
    """The dialogue of a record: its turns, and the images it lists, which stand in none of them yet.

    `ignored` is what the turns hold that is not used. Raises RecordError.
    """
    said = tuple(turns)
    is_document = bool(said) and said[0].role == "document"
    placed, literal = place_images(said if is_document else _with_system(record, said), images, root)
    return Dialogue(placed, ignored=tuple(dict.fromkeys((*ignored, *(f"{kind} as text" for kind in literal)))))


def history(record: Mapping[str, Any]) -> list[Turn]:
    """The turns before a record's own: "history", a list of [question, answer]. Raises RecordError: another shape."""
    turns: list[Turn] = []
    for index, pair in enumerate(optional(record, "history", list) or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError("unknown content", f'"history[{index}]": expected [question, answer], got {pair!r:.80}')
        turns += [user(pair[0]), assistant(pair[1])]
    return turns


def leftovers(value: Mapping[str, Any], reads: Collection[str], *, shows: bool, inside: str = "") -> list[str]:
    """The unknown keys of a record, or of a message or part `inside` of it, that hold anything.

    `shows`: whether images are shown; if not, an image under another name is content, too. Raises RecordError for
    content that is not read.
    """
    unknown = []
    for key, item in value.items():
        name, lower = f"{inside}{key}", str(key).lower()
        if lower == "kto_tag" and item is False:
            raise RecordError("marked as a bad answer", f'"{name}" is false')
        if key in reads or lower in WITHOUT_CONTENT or _is_empty(item):
            continue
        kind = _KINDS.get(lower) or ("image not read" if lower in _IMAGES and not shows else None)
        if kind:
            hint = f"; `columns: {{image: {key}}}` reads it" if kind == "image not read" else ""
            raise RecordError(kind, f'"{name}" is not read{hint}; `ignore: [{key}]` does without it')
        unknown.append(name)
    return unknown


def _is_empty(value: object) -> bool:
    """Whether nothing is there: null, false, a blank text, "[]" (an empty list as LLaMA-Factory writes it)."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value is False or (isinstance(value, bytes | list | dict | tuple) and not value)


def _with_system(record: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns after one system message: of the record's own and those they begin with, in order."""
    own = [checked(record[name], name, str) for name in SYSTEM if record.get(name) is not None]
    leading = tuple(takewhile(lambda turn: turn.role == "system", turns))
    said: tuple[Part, ...] = (*own, *(part for turn in leading for part in turn.parts))
    parts = tuple(part for part in dict.fromkeys(said) if isinstance(part, Image) or part.strip())
    return (*((Turn("system", parts),) if parts else ()), *turns[len(leading) :])


def without(value: Any, keys: Collection[str]) -> Any:
    """A record without these keys, at whatever depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value
