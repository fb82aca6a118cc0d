"""easy-VQA's questions and the captions made of them."""

import hashlib
from pathlib import Path

import pytest
from sources import make_source

from finetune.data.conversation import Dialogue, Image, RecordError, assistant, user
from finetune.data.formats import FORMATS, easy_vqa
from finetune.data.io.image_roots import ImageRoot
from modeling.errors import UserError


def refusal(function, *arguments):
    with pytest.raises(RecordError) as caught:
        function(*arguments)
    return caught.value.reason


@pytest.fixture
def root():
    return ImageRoot(make_source("easy_vqa"))


@pytest.mark.parametrize(("split", "count"), [("train", 38_575), ("test", 9_673)])
def test_easy_vqa_count(split, count):
    assert sum(1 for _ in easy_vqa.read(make_source("easy_vqa", split=split))) == count


def first_record(name, split):
    record_id, record = next(iter(FORMATS[name].read(make_source(name, split=split))))
    return record_id, {**record, "image": "/".join(Path(record["image"]).parts[-3:])}


def test_easy_vqa_first_records(root):
    question = {"question": "what is the blue shape?", "answer": "rectangle", "image": "train/images/0.png"}
    assert first_record("easy_vqa", "train") == ("train#0", question)
    question = {"question": "what is the red shape?", "answer": "triangle", "image": "test/images/0.png"}
    assert first_record("easy_vqa", "test") == ("test#0", question)
    assert easy_vqa.convert(question, root) == Dialogue(
        (user(Image(Path("test/images/0.png")), "what is the red shape?"), assistant("triangle"))
    )


def test_easy_vqa_splits():
    with pytest.raises(UserError, match="expected split train or test, got 'validation'"):
        next(easy_vqa.read(make_source("easy_vqa", split="validation")))


@pytest.mark.parametrize(
    ("question", "answer", "facts"),
    [
        ("what is the blue shape?", "rectangle", [("blue", True), ("rectangle", True)]),
        ("what color is the shape?", "blue", [("blue", True)]),
        ("what color is the circle?", "teal", [("circle", True), ("teal", True)]),
        ("what is the color of the triangle?", "red", [("triangle", True), ("red", True)]),
        ("what is the color of the shape?", "gray", [("gray", True)]),
        ("what shape does the image contain?", "circle", [("circle", True)]),
        ("what shape is present?", "triangle", [("triangle", True)]),
        ("does the image contain a rectangle?", "yes", [("rectangle", True)]),
        ("does the image contain a green shape?", "no", [("green", False)]),
        ("does the image not contain a circle?", "yes", [("circle", False)]),
        ("does the image not contain a brown shape?", "no", [("brown", True)]),
        ("is there a triangle in the image?", "no", [("triangle", False)]),
        ("is there not a black shape?", "yes", [("black", False)]),
        ("is there not a circle in the image?", "no", [("circle", True)]),
        ("is no yellow shape present?", "yes", [("yellow", False)]),
        ("is no circle present?", "no", [("circle", True)]),
    ],
)
def test_easy_vqa_facts(question, answer, facts):
    assert list(easy_vqa._facts(question, answer)) == facts


@pytest.fixture(scope="module")
def captions():
    return list(easy_vqa.read_captions(make_source("easy_vqa_captions")))


def test_easy_vqa_captions_follow_questions(captions, root):
    assert len(captions) == 2 * 4000
    assert [record_id for record_id, _ in captions[:3]] == [
        "train/0.png/caption",
        "train/0.png/statements",
        "train/1.png/caption",
    ]
    denied = silent = 0
    for record_id, record in captions[:600]:
        facts = {fact for asked in record["questions"] for fact in easy_vqa._facts(asked["question"], asked["answer"])}
        if record_id.endswith("caption") and not any(there for _, there in facts):
            assert refusal(easy_vqa.convert_caption, record, root) == "nothing to say"
            silent += 1
            continue
        (turn,) = easy_vqa.convert_caption(record, root).turns
        image, text = turn.parts
        assert turn.role == "document"
        assert image == Image(Path(record["image"]))
        assert "?" not in text
        for sentence in text.removesuffix(".").split(". "):
            named = {word for word in sentence.split() if word in easy_vqa.COLORS + easy_vqa.SHAPES}
            there = " not " not in sentence
            denied += not there
            assert named
            assert all((thing, True) in facts for thing in named) == there, (record_id, sentence)
    assert denied > 300
    assert 0 < silent < 10


def test_easy_vqa_no_facts_no_caption(root):
    record = {"image": "7.png", "kind": "caption", "questions": [{"question": "is there a circle?", "answer": "no"}]}
    assert refusal(easy_vqa.convert_caption, record, root) == "nothing to say"
    statement = easy_vqa.convert_caption({**record, "kind": "statements"}, root).turns[0].text
    assert statement in ("a circle is not present.", "a circle is not in the image.")
    assert (
        refusal(easy_vqa.convert_caption, {**record, "kind": "statements", "questions": []}, root) == "nothing to say"
    )


def test_easy_vqa_captions_no_test_image(captions):
    def digests(paths):
        return {hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}

    captioned = digests({record["image"] for _, record in captions})
    tested = digests({record["image"] for _, record in easy_vqa.read(make_source("easy_vqa", split="test"))})
    assert (len(captioned), len(tested), len(captioned & tested)) == (4000, 1000, 0)
