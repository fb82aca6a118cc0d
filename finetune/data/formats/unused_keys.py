"""Keys of records that a format does not read: no content is dropped without a report.

Such a key holds no content (an id, a source), or content that the model should have seen or learned (a video, tools,
earlier turns), and then the record is rejected under that name; or it is unknown, and counted.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any

from finetune.data.conversation import RecordError
from finetune.data.formats.fields import SUFFIX_NAMES, SYSTEM
from finetune.data.io import img2dataset
from finetune.data.io.paths import IMAGE_SUFFIXES

WEIGHTS = ("weight", "loss", "train", "training")
"""Names of the number that says whether an answer is trained on."""

_WITHOUT_CONTENT = frozenset(
    {
        *("id", "ids", "_id", "idx", "index", "uid", "uuid", "key", "__key__", "__url__", "__local_path__", "hash"),
        *("source", "dataset", "subset", "split", "set_name", "meta", "metadata", "general_metadata", "license"),
        *("language", "lang", "timestamp", "date", "created", "created_at", "model", "task", "category"),
        *("width", "height", "image_width", "image_height", "question_type", "answer_type", "answer_confidence"),
        *("prompt_id", "conversation_id", "cache_control"),
    }
)

_OF_A_DOWNLOAD = _WITHOUT_CONTENT | {
    *("url", "status", "error_message", "original_width", "original_height", "exif", "md5", "sha256", "sha512"),
    *("similarity", "nsfw", "punsafe", "pwatermark"),
}
"""Keys without content in a sample of img2dataset: its own, and LAION's scores."""

_CONTENT: dict[str, tuple[str, ...]] = {
    "video": ("video", "videos", "video_path", "video_paths", "video_url", "mp4", "webm", "mkv", "avi", "mov"),
    "audio": ("audio", "audios", "audio_path", "audio_paths", "audio_url", "speech", "wav", "mp3", "flac", "ogg"),
    "tool calls": ("tools", "functions", "tool_calls", "function_call", "function_calls"),
    "reasoning": ("reasoning", "reasoning_content", "thinking", "thoughts"),
    "refusal": ("refusal",),
    "text beside the dialogue": (*SYSTEM, "history", "input", "inputs", "context", "passage"),
    "multiple choice": ("choices", "options"),
    "answer trained in part": ("train_detail",),
}
_KINDS = {name: kind for kind, names in _CONTENT.items() for name in names}
_LABELS = {"kto_tag": "marked as a bad answer", **dict.fromkeys(WEIGHTS, "nothing supervised")}
"""Keys of a record that say, with 0 or false, that it is not to be trained on."""

_IMAGES = frozenset(
    {
        *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_name", "image_url"),
        *("image_urls", "image_base64", "image_base64_str", "img", "imgs", "img_path", "img_url", "imgname"),
        *("picture", "pictures", *SUFFIX_NAMES),
    }
)


def leftovers(value: Mapping[str, Any], reads: AbstractSet[str], *, shows: bool, inside: str = "") -> list[str]:
    """Return the unknown keys that hold a value, of a record, or of a message or part `inside` it.

    `shows` says whether its images are read; if not, an image under another name is content, too. Raises RecordError:
    content under a key that is not read.
    """
    if value.keys() <= reads:
        return []
    without_content = _OF_A_DOWNLOAD if value.keys() >= img2dataset.KEYS else _WITHOUT_CONTENT
    unknown = []
    for key, item in value.items():
        name, lower = f"{inside}{key}", str(key).lower()
        if not inside and lower in _LABELS and item is not None and not item:
            raise RecordError(_LABELS[lower], f'"{name}" is {item}')
        if key in reads or lower in without_content or _is_empty(item):
            continue
        is_image = not shows and (lower in _IMAGES or _is_image(item))
        kind = _KINDS.get(lower) or ("image not read" if is_image else None)
        if kind and item is not False:
            hint = f"; `columns: {{image: {key}}}` reads it" if kind == "image not read" else ""
            raise RecordError(kind, f'"{name}" is not read{hint}; `ignore: [{key}]` does without it')
        unknown.append(name)
    return unknown


def _is_image(value: object) -> bool:
    """Return whether a value is an image whatever its key: bytes, {"bytes", "path"}, or an image's file name."""
    if isinstance(value, str):
        return len(value) < 1000 and not value.count("\n") and PurePath(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _is_empty(value: object) -> bool:
    """Return whether a value is null, a blank text, an empty list or object, or "[]" as LLaMA-Factory writes one."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, bytes | list | dict | tuple) and not value)


def without(value: Any, keys: Collection[str]) -> Any:
    """Return a record without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value
