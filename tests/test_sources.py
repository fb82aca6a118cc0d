"""Records of each dataset family -> dialogues, by hand; and every reason for which one is refused."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from finetune.data.dialogue import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.sources import FORMATS, easy_vqa, messages
from finetune.data.sources.files import ImageRoot, read_jsonl
from modeling.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n..."
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
TEXT, IMAGE = {"type": "text", "text": "Who?"}, {"type": "image"}
ANSWER = {"role": "assistant", "content": "Me."}


def asked(*content):
    return {"role": "user", "content": list(content)}


def refusal(function, *arguments):
    with pytest.raises(RecordError) as caught:
        function(*arguments)
    return caught.value.reason


@pytest.fixture
def root(tmp_path):
    return ImageRoot(tmp_path / "images")


@pytest.fixture
def cat(root):
    return Image(root.folder / "cat.jpg")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [asked({"type": "image", "image": "cat.jpg"}, TEXT), ANSWER]},
        {"messages": [asked({"type": "image", "path": "cat.jpg"}, TEXT), ANSWER]},
        {"messages": [asked({"type": "image", "url": "cat.jpg"}, TEXT), ANSWER]},
        {"messages": [asked({"type": "image_url", "image_url": {"url": "cat.jpg"}}, TEXT), ANSWER]},
        {"messages": [asked({"type": "image_url", "image_url": "cat.jpg"}, TEXT), ANSWER]},
        {"messages": [asked(IMAGE, TEXT), ANSWER], "images": ["cat.jpg"]},
        {"messages": [asked(TEXT), ANSWER], "images": ["cat.jpg"]},
        {"messages": [{"role": "user", "content": "Who?"}, ANSWER], "images": ["cat.jpg"], "id": 7},
        {"messages": [asked({"type": "image", "image": "./dogs/../cat.jpg"}, TEXT), ANSWER], "images": None},
    ],
)
def test_every_way_to_name_the_image(record, root, cat):
    assert messages.convert(record, root) == Dialogue((user(cat, "Who?"), assistant("Me.")))


def test_a_long_conversation_with_its_parts_in_order(root, cat):
    record = {
        "images": ["cat.jpg", "dog.jpg", "cat.jpg"],
        "messages": [
            {"role": "system", "content": "Be kind."},
            asked(TEXT, IMAGE, {"type": "text", "text": "And?"}, IMAGE),
            {"role": "assistant", "content": [{"type": "text", "text": "Me."}]},
            asked(IMAGE),
            ANSWER,
        ],
    }
    assert messages.convert(record, root).turns == (
        Turn("system", ("Be kind.",)),
        user("Who?", cat, "And?", Image(root.folder / "dog.jpg")),
        assistant("Me."),
        user(cat),
        assistant("Me."),
    )


def test_listed_images_open_the_first_user_turn_after_a_system_message(root, cat):
    record = {"images": ["cat.jpg"], "messages": [{"role": "system", "content": "Be kind."}, asked(TEXT), ANSWER]}
    assert messages.convert(record, root).turns[1] == user(cat, "Who?")


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("no messages", {}),
        ("no messages", {"messages": "Who?"}),
        ("no messages", {"messages": None}),
        ("no turns", {"messages": []}),
        ("unknown role", {"messages": [{"role": "tool", "content": "42"}]}),
        ("unknown role", {"messages": [{"role": "document", "content": "A text."}]}),
        ("unknown role", {"messages": [{"content": "Who?"}]}),
        ("unknown role", {"messages": [{"role": ["user"], "content": "Who?"}]}),
        ("unknown role", {"messages": ["Who?"]}),
        ("unknown content", {"messages": [{"role": "user", "content": None}]}),
        ("unknown content", {"messages": [{"role": "user", "content": {"type": "text"}}]}),
        ("unknown content", {"messages": [asked("Who?")]}),
        ("unknown content", {"messages": [asked({"type": "text", "text": 7})]}),
        ("unknown content", {"messages": [asked({"type": "audio", "audio": "a.wav"})]}),
        ("unknown content", {"messages": [asked({"type": ["text"], "text": "Who?"})]}),
        ("image count", {"messages": [asked(IMAGE, TEXT), ANSWER]}),
        ("image count", {"messages": [asked(IMAGE, IMAGE, TEXT), ANSWER], "images": ["a.jpg"]}),
        ("image count", {"messages": [asked(IMAGE, TEXT), ANSWER], "images": ["a.jpg", "b.jpg"]}),
        ("image count", {"messages": [asked({**IMAGE, "path": "a.jpg"}, TEXT), ANSWER], "images": ["a.jpg"]}),
        ("not an image reference", {"messages": [asked(TEXT), ANSWER], "images": "a.jpg"}),
        ("not an image reference", {"messages": [asked(TEXT), ANSWER], "images": [{"path": "a.jpg"}]}),
        ("not an image reference", {"messages": [asked(TEXT), ANSWER], "images": [None]}),
        ("not an image reference", {"messages": [asked({**IMAGE, "image": 7}, TEXT), ANSWER]}),
        ("image is a URL", {"messages": [asked({**IMAGE, "url": "https://a.b/c.jpg"}, TEXT), ANSWER]}),
        ("roles do not alternate", {"messages": [ANSWER]}),
        ("empty answer", {"messages": [asked(TEXT), {"role": "assistant", "content": " "}]}),
        ("empty question", {"messages": [asked(), ANSWER]}),
    ],
)
def test_a_record_that_is_no_dialogue_is_refused(reason, record, root):
    assert refusal(messages.convert, record, root) == reason


def test_jsonl_lines_and_their_places(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}\r',
        b"",
        b"  \t",
        '{"a": "é\u2028"}'.encode(),
        b'{"a": 1',
        b"[1]",
        b"7",
        b"null",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": 1} {"a": 2}',
        b'{"a": 3}',
    ]
    path.write_bytes(b"\n".join(lines))
    read = list(read_jsonl(path, "train"))
    assert [(place, getattr(record, "reason", record)) for place, record in read] == [
        ("data.jsonl:1", {"a": 1}),
        ("data.jsonl:4", {"a": "é\u2028"}),
        ("data.jsonl:5", "not JSON"),
        ("data.jsonl:6", "not an object"),
        ("data.jsonl:7", "not an object"),
        ("data.jsonl:8", "not an object"),
        ("data.jsonl:9", "not JSON"),
        ("data.jsonl:10", "not JSON"),
        ("data.jsonl:11", "not JSON"),
        ("data.jsonl:12", "not JSON"),
        ("data.jsonl:13", "not JSON"),
        ("data.jsonl:14", {"a": 3}),
    ]


def test_an_empty_file_has_no_records_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert list(read_jsonl(tmp_path / "empty.jsonl", "train")) == []
    with pytest.raises(UserError, match=r"expected a \.jsonl file, found nothing"):
        list(read_jsonl(tmp_path / "none.jsonl", "train"))
    with pytest.raises(UserError, match="found a folder"):
        list(read_jsonl(tmp_path, "train"))


def test_an_image_inside_the_root(root):
    assert root.image("a/b.jpg") == Image(root.folder / "a" / "b.jpg")
    assert root.image("a/../b.jpg") == Image(root.folder / "b.jpg")
    assert root.image(str(root.folder / "b.jpg")) == Image(root.folder / "b.jpg")
    assert root.image(URL) == Image(PNG)


@pytest.mark.parametrize(
    ("reason", "reference"),
    [
        ("image outside the image root", "../cat.jpg"),
        ("image outside the image root", "a/../../cat.jpg"),
        ("image outside the image root", "../images-of-others/cat.jpg"),
        ("image outside the image root", "/etc/hostname"),
        ("image outside the image root", "link.jpg"),
        ("image outside the image root", "links/cat.jpg"),
        ("image is a URL", "http://example.org/cat.jpg"),
        ("image is a URL", "s3://bucket/cat.jpg"),
        ("image is a URL", "file:///etc/hostname"),
        ("image is a URL", "file:cat.jpg"),
        ("corrupt image", "data:image/png;base64,???"),
        ("corrupt image", "data:image/png;base64,abc"),
        ("corrupt image", "data:image/png;base64,é"),
        ("not an image reference", "cat\0.jpg"),
        ("not an image reference", "\ud800.jpg"),
        ("not an image reference", "loop.jpg"),
        ("not an image reference", ""),
        ("not an image reference", None),
        ("not an image reference", 7),
        ("not an image reference", ["cat.jpg"]),
    ],
)
def test_a_reference_to_anything_else_is_refused(reason, reference, root):
    outside = root.folder.parent / "outside"
    outside.mkdir()
    root.folder.mkdir()
    (outside / "cat.jpg").write_bytes(PNG)
    (root.folder / "link.jpg").symlink_to(outside / "cat.jpg")
    (root.folder / "links").symlink_to(outside)
    (root.folder / "loop.jpg").symlink_to(root.folder / "loop.jpg")
    assert refusal(root.image, reference) == reason


@pytest.mark.parametrize(("split", "count"), [("train", 38_575), ("test", 9_673)])
def test_every_question_of_easy_vqa_is_one_record(split, count):
    assert sum(1 for _ in easy_vqa.read(None, split)) == count


def first_record(name, split):
    place, record = next(iter(FORMATS[name].read(None, split)))
    return place, {**record, "image": "/".join(Path(record["image"]).parts[-3:])}


def test_the_first_records_of_easy_vqa(root):
    question = {"question": "what is the blue shape?", "answer": "rectangle", "image": "train/images/0.png"}
    assert first_record("easy_vqa", "train") == ("train#0", question)
    question = {"question": "what is the red shape?", "answer": "triangle", "image": "test/images/0.png"}
    assert first_record("easy_vqa", "test") == ("test#0", question)
    assert easy_vqa.convert(question, root) == Dialogue(
        (user(Image(Path("test/images/0.png")), "what is the red shape?"), assistant("triangle"))
    )


def test_easy_vqa_has_two_splits():
    with pytest.raises(UserError, match="expected split train or test, got 'validation'"):
        next(easy_vqa.read(None, "validation"))


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
def test_what_a_question_and_its_answer_say(question, answer, facts):
    assert list(easy_vqa._facts(question, answer)) == facts


@pytest.fixture(scope="module")
def captions():
    return list(easy_vqa.read_captions(None, "train"))


def test_captions_are_documents_and_say_what_the_questions_say(captions, root):
    assert len(captions) == 2 * 4000
    assert [place for place, _ in captions[:3]] == [
        "train/0.png/caption",
        "train/0.png/statements",
        "train/1.png/caption",
    ]
    denied = silent = 0
    for place, record in captions[:600]:
        facts = {fact for question in record["questions"] for fact in easy_vqa._facts(*question)}
        if place.endswith("caption") and not any(there for _, there in facts):
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
            assert all((thing, True) in facts for thing in named) == there, (place, sentence)
    assert denied > 300
    assert 0 < silent < 10


def test_an_image_of_which_nothing_is_known_has_no_caption(root):
    record = {"image": "7.png", "kind": "caption", "questions": [("is there a circle?", "no")]}
    assert refusal(easy_vqa.convert_caption, record, root) == "nothing to say"
    statement = easy_vqa.convert_caption({**record, "kind": "statements"}, root).turns[0].text
    assert statement in ("a circle is not present.", "a circle is not in the image.")
    assert (
        refusal(easy_vqa.convert_caption, {**record, "kind": "statements", "questions": []}, root) == "nothing to say"
    )


def test_no_training_caption_shows_a_test_image(captions):
    def digests(paths):
        return {hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}

    captioned = digests({record["image"] for _, record in captions})
    tested = digests({record["image"] for _, record in easy_vqa.read(None, "test")})
    assert (len(captioned), len(tested), len(captioned & tested)) == (4000, 1000, 0)


def test_only_captions_are_marked_as_documents():
    assert {name for name, family in FORMATS.items() if family.documents} == {"easy_vqa_captions"}


def test_a_surrogate_in_json_reaches_the_dialogue_and_is_refused(root):
    record = json.loads('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert refusal(messages.convert, record, root) == "text is not Unicode"
