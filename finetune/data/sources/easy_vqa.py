"""easy-VQA (PyPI, MIT): drawn 64 x 64 images of one coloured shape, 38,575 training and 9,673 test questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.dialogue import Dialogue, Image, RecordError, assistant, user
from finetune.data.sources.files import ImageRoot
from modeling.errors import UserError


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
