"""easy-VQA (PyPI, MIT): drawn 64 x 64 images of one coloured shape, 38,575 training and 9,673 test questions."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats.fields import required, required_list
from finetune.data.io.byte_streams import Record
from finetune.data.io.image_roots import ImageRoot
from finetune.recipe.schema import Source
from modeling.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def read(source: Source) -> Iterator[Record]:
    """Yield a record for each question of the split, from the installed package.

    Raises UserError: the package is not installed, or it has no such split.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("format easy_vqa: the package is missing: pip install easy-vqa") from error
    if source.split not in ("train", "test"):
        raise UserError(f"format easy_vqa: expected split train or test, got {source.split!r}")
    train = source.split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    images = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    for number, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        yield f"{source.split}#{number}", {"question": question, "answer": answer, "image": images[image]}


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert a question and its answer; records hold the paths of the package's images, so `root` is not used."""
    image = Image(Path(required(record, "image", str)))
    return Dialogue((user(image, required(record, "question", str)), assistant(required(record, "answer", str))))


def read_captions(source: Source) -> Iterator[Record]:
    """Yield two records for each image, from its questions: one for a caption, one for statements about it."""
    by_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, record in read(source):
        assert isinstance(record, dict)
        by_image[record["image"]].append(record)
    for image, questions in sorted(by_image.items(), key=lambda item: int(Path(item[0]).stem)):
        for kind in ("caption", "statements"):
            yield f"{source.split}/{Path(image).name}/{kind}", {"image": image, "kind": kind, "questions": questions}


def convert_caption(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """Convert to a document about an image, without question and answer; the image's number selects the words."""
    image, statements = Path(required(record, "image", str)), record.get("kind") == "statements"
    if not image.stem.isdecimal():
        raise RecordError("unknown content", f'"image": expected a file called by its number, got {image.name!r:.80}')
    rng = np.random.default_rng([int(image.stem), statements])
    facts = dict(
        fact
        for asked in required_list(record, "questions", dict)
        for fact in _facts(required(asked, "question", str), required(asked, "answer", str))
    )
    text = _state(facts, rng) if statements else _caption(facts, rng)
    if not text:
        raise RecordError("nothing to say", "the questions about this image give nothing away")
    return Dialogue((Turn("document", (Image(image), text)),))


def _facts(question: str, answer: str) -> Iterator[tuple[str, bool]]:
    """Yield (shape or color, whether it is in the image), as a question and its answer say.

    "what is the red shape?", "circle" -> ("red", True), ("circle", True)
    "is there not a blue shape?", "yes" -> ("blue", False)
    """
    words = re.findall(r"\w+", question)
    named = [word for word in words if word in SHAPES + COLORS]
    if answer in ("yes", "no"):
        there = (answer == "yes") != ("not" in words or "no" in words)
        yield from ((thing, there) for thing in named)
    else:
        yield from ((thing, True) for thing in (*named, answer))


_BOTH = (
    "a {color} {shape}.",
    "the image contains a {color} {shape}.",
    "the shape is a {shape} and its color is {color}.",
    "what is in the image is a {shape}. the color of the {shape} is {color}.",
)
_COLOR = ("the color of the shape is {color}.",)
_SHAPE = ("the shape is a {shape}.",)
# The object comes first, then the words "is there" or "is not there", so that these depend only on the image.
_STATEMENTS = ("a {thing} is{negation} present.", "a {thing} is{negation} in the image.")


def _caption(facts: dict[str, bool], rng: np.random.Generator) -> str:
    color, shape = (next((thing for thing in things if facts.get(thing)), None) for things in (COLORS, SHAPES))
    if not color and not shape:
        return ""
    templates = _BOTH if color and shape else _COLOR if color else _SHAPE
    return str(rng.choice(templates)).format(color=color, shape=shape)


def _state(facts: dict[str, bool], rng: np.random.Generator) -> str:
    """Return up to six statements, half about shapes and half about colors: one is in the image, the others are not."""
    chosen: list[tuple[str, bool]] = []
    for things in (SHAPES, COLORS):
        present = next((thing for thing in things if facts.get(thing)), None)
        absent = [thing for thing in things if (present or facts.get(thing) is False) and thing != present]
        picked = [absent[index] for index in rng.permutation(len(absent))[: 2 if present else 3]]
        chosen += [(thing, False) for thing in picked] + ([(present, True)] if present else [])
    lines = [
        str(rng.choice(_STATEMENTS)).format(
            thing=thing if thing in SHAPES else f"{thing} shape", negation="" if there else " not"
        )
        for thing, there in (chosen[index] for index in rng.permutation(len(chosen)))
    ]
    return " ".join(lines)
