"""easy-VQA (PyPI, MIT): drawn 64 x 64 images of one coloured shape, 38,575 training and 9,673 test questions."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.dialogue import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.sources.files import ImageRoot
from modeling.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def read(path: Path | None, split: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """One record a question, from the installed package; `path` plays no part."""
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("format easy_vqa: the package is missing: pip install easy-vqa") from error
    if split not in ("train", "test"):
        raise UserError(f"format easy_vqa: expected split train or test, got {split!r}")
    train = split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    images = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    for number, (question, answer, image) in enumerate(zip(*questions, strict=True)):
        yield f"{split}#{number}", {"question": question, "answer": answer, "image": images[image]}


def convert(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """The package names its own files, so the image root plays no part."""
    image = Image(Path(record["image"]))
    return Dialogue((user(image, record["question"]), assistant(record["answer"])))


def read_captions(path: Path | None, split: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Two records an image, from its questions: one to caption what it shows, one to state what it does not."""
    by_image: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, record in read(path, split):
        assert isinstance(record, dict)
        by_image[record["image"]].append((record["question"], record["answer"]))
    for image in sorted(by_image, key=lambda name: int(Path(name).stem)):
        for kind in ("caption", "statements"):
            yield f"{split}/{Path(image).name}/{kind}", {"image": image, "kind": kind, "questions": by_image[image]}


def convert_caption(record: dict[str, Any], root: ImageRoot) -> Dialogue:
    """A document about an image: no question and no answer, in words chosen by the image's number."""
    image, statement = Path(record["image"]), record["kind"] == "statements"
    rng = np.random.default_rng([int(image.stem), statement])
    facts = [_fact(question, answer) for question, answer in record["questions"]]
    text = _statements(facts, rng) if statement else _caption(facts, rng)
    if not text:
        raise RecordError("nothing to say", "the questions about this image give nothing away")
    return Dialogue((Turn("document", (Image(image), text)),))


def _fact(question: str, answer: str) -> tuple[str, bool]:
    """("red circle", True): what a question and its answer say is there, or is not; "red" and "circle" can be apart."""
    words = re.findall(r"\w+", question)
    named = [word for word in words if word in SHAPES + COLORS]
    if answer not in ("yes", "no"):
        return " ".join(sorted([*named, answer], key=SHAPES.__contains__)), True
    return " ".join(named), (answer == "yes") != ("not" in words or "no" in words)


_BOTH = (
    "a {color} {shape}.",
    "the image contains a {color} {shape}.",
    "what is present in the image is a {shape}. the color of the {shape} is {color}.",
    "the shape is a {shape} and its color is {color}.",
    "there is one shape in the image, a {color} {shape}.",
)
_COLOR = ("the color of the shape is {color}.", "the image does contain a {color} shape.")
_SHAPE = ("what shape the image contains: a {shape}.", "there is a {shape} in the image.")
_PRESENT = ("there is a {thing} in the image.", "a {thing} is present.", "the image does contain a {thing}.")
_ABSENT = ("there is no {thing} in the image.", "a {thing} is not present.", "the image does not contain a {thing}.")


def _caption(facts: list[tuple[str, bool]], rng: np.random.Generator) -> str:
    seen = {word for thing, there in facts if there for word in thing.split()}
    color = next((word for word in COLORS if word in seen), None)
    shape = next((word for word in SHAPES if word in seen), None)
    if not color and not shape:
        return ""
    templates = _BOTH if color and shape else _COLOR if color else _SHAPE
    return str(rng.choice(templates)).format(color=color, shape=shape)


def _statements(facts: list[tuple[str, bool]], rng: np.random.Generator) -> str:
    chosen = [facts[index] for index in rng.permutation(len(facts))[:4]]
    return " ".join(
        str(rng.choice(_PRESENT if there else _ABSENT)).format(thing=_noun(thing)) for thing, there in chosen
    )


def _noun(thing: str) -> str:
    return thing if thing.split()[-1] in SHAPES else f"{thing} shape"
