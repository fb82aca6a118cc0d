"""Questions with their answers -> Dialogue: LRV, M3IT, Alpaca, the Cauldron, Spot-the-Diff."""

from typing import Any

from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.formats.build import build, history
from finetune.data.formats.fields import (
    answer_of,
    first_item,
    has,
    joined,
    listed_images,
    optional,
    own_image,
    required,
    required_list,
)
from finetune.data.io.image_roots import ImageRoot
from finetune.data.leftovers import leftovers

DIFFERENCES = "What are the differences between the two images?"


def convert_lrv(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """LRV-Instruction: {"image_id": "2392588", "question": ..., "answer": ..., "task": ...}, or "image" itself."""
    turns = (user(required(record, "question", str)), assistant(answer_of(record, "answer")))
    return build(record, root, [*history(record), *turns], [own_image(record, root, "{image_id}.jpg")])


def is_lrv(record: dict[str, Any]) -> bool:
    return (
        has(record, "question", str)
        and isinstance(record.get("answer"), str | int | float)
        and (has(record, "image_id") or has(record, "image"))
    )


def convert_m3it(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """M3IT: {"instruction", "inputs", "outputs", "image_base64_str": [base64, ...]}, on the hub with "image"."""
    images = (*_base64_images(record, root), *listed_images(record, root))
    question = joined((required(record, "instruction", str), optional(record, "inputs", str)))
    turns = (user(question), assistant(answer_of(record, "outputs")))
    return build(record, root, [*history(record), *turns], images)


def is_m3it(record: dict[str, Any]) -> bool:
    return has(record, "instruction", str) and has(record, "outputs")


def convert_alpaca(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Alpaca: {"instruction", "input", "output"}, with "system", "history" and images where there are any."""
    question = joined((required(record, "instruction", str), optional(record, "input", str)))
    turns = (user(question), assistant(answer_of(record, "output")))
    return build(record, root, [*history(record), *turns], listed_images(record, root))


def is_alpaca(record: dict[str, Any]) -> bool:
    return has(record, "instruction", str) and has(record, "output")


def convert_cauldron(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """The Cauldron: {"images": [...], "texts": [{"user", "assistant", "source"}, ...]}, all texts about all images."""
    texts = required_list(record, "texts", dict)
    turns = [
        turn for text in texts for turn in (user(required(text, "user", str)), assistant(answer_of(text, "assistant")))
    ]
    ignored = [key for text in texts for key in leftovers(text, {"user", "assistant"}, shows=False, inside="texts[].")]
    return build(record, root, turns, listed_images(record, root), ignored=ignored)


def is_cauldron(record: dict[str, Any]) -> bool:
    first = first_item(record, "texts")
    return isinstance(first, dict) and has(first, "user", str) and has(first, "assistant")


def convert_spot_the_diff(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Spot-the-Diff: {"img_id": "2019", "sentences": [...]}; its images are 2019.png and 2019_2.png."""
    first = root.named(record, "{img_id}.png")
    second = root.named({**record, "img_id": f"{record.get('img_id')}_2"}, "{img_id}.png")
    sentences = [_sentence(text) for text in required_list(record, "sentences", str) if text.strip()]
    return build(record, root, (user(DIFFERENCES), assistant(" ".join(sentences))), (first, second))


def is_spot_the_diff(record: dict[str, Any]) -> bool:
    return has(record, "img_id") and has(record, "sentences", list)


def _base64_images(record: dict[str, Any], root: ImageRoot) -> list[Image]:
    alone = record.get("image_base64_str")
    if alone is None:
        return []
    texts = [alone] if isinstance(alone, str) else required_list(record, "image_base64_str", str)
    return [root.base64(text) for text in texts]


def _sentence(text: str) -> str:
    """Its first letter in upper case, a full stop at its end if it has none."""
    stripped = text.strip()
    return stripped[0].upper() + stripped[1:] + ("" if stripped.endswith((".", "!", "?")) else ".")
