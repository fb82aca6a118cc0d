"""Messages -> dialogues, and every reason for which a message is refused; weights, system messages, history."""

import json

import pytest
from sources import make_source

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats import FORMATS
from finetune.data.formats.conversations import convert_messages
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import to_dialogue

PNG = b"\x89PNG\r\n\x1a\n..."


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
    (tmp_path / "images" / "dogs").mkdir(parents=True)
    for name in ("cat.jpg", "dog.jpg", "a.jpg", "b.jpg"):
        (tmp_path / "images" / name).write_bytes(PNG)
    return ImageRoot(make_source("messages", image_root=(tmp_path / "images",)))


@pytest.fixture
def cat(tmp_path):
    return Image((tmp_path / "images" / "cat.jpg").resolve())


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
        {"messages": [asked(TEXT), ANSWER], "images": "cat.jpg"},
        {"messages": [asked(TEXT), ANSWER], "image": "cat.jpg"},
        {"messages": [asked({"type": "image", "image": "./dogs/../cat.jpg"}, TEXT), ANSWER], "images": None},
    ],
)
def test_messages_image_spellings(record, root, cat):
    assert convert_messages(record, root) == Dialogue((user(cat, "Who?"), assistant("Me.")))


def test_messages_parts_in_order(root, cat, tmp_path):
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
    assert convert_messages(record, root).turns == (
        Turn("system", ("Be kind.",)),
        user("Who?", cat, "And?", Image((tmp_path / "images" / "dog.jpg").resolve())),
        assistant("Me."),
        user(cat),
        assistant("Me."),
    )


def test_messages_listed_images_after_system(root, cat):
    record = {"images": ["cat.jpg"], "messages": [{"role": "system", "content": "Be kind."}, asked(TEXT), ANSWER]}
    assert convert_messages(record, root).turns[1] == user(cat, "Who?")


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
        ("image count", {"messages": [asked(TEXT), ANSWER], "images": ["a.jpg"], "image": "b.jpg"}),
        ("not an image reference", {"messages": [asked(TEXT), ANSWER], "images": 7}),
        ("not an image reference", {"messages": [asked(TEXT), ANSWER], "images": [None]}),
        ("not an image reference", {"messages": [asked({**IMAGE, "image": 7}, TEXT), ANSWER]}),
        ("image is a URL", {"messages": [asked({**IMAGE, "url": "https://a.b/c.jpg"}, TEXT), ANSWER]}),
        ("roles do not alternate", {"messages": [ANSWER]}),
        ("empty answer", {"messages": [asked(TEXT), {"role": "assistant", "content": " "}]}),
        ("empty question", {"messages": [asked(), ANSWER]}),
    ],
)
def test_messages_refused(reason, record, root):
    assert refusal(convert_messages, record, root) == reason


def weighted(**weights):
    """Two questions; the first answer has these weights."""
    bad = {"role": "assistant", "content": "You.", **weights}
    return {"messages": [asked(TEXT), bad, asked(TEXT), ANSWER]}


@pytest.mark.parametrize(
    "weights",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"training": 0}, {"weight": 1, "loss": False}],
)
def test_weight_zero(weights, root):
    turns = convert_messages(weighted(**weights), root).turns
    assert [turn.supervised for turn in turns] == [True, False, True, True]
    assert turns[1] == Turn("assistant", ("You.",), supervised=False)


@pytest.mark.parametrize("weights", [{}, {"weight": 1}, {"weight": None}, {"loss": True, "train": 1.0}])
def test_weight_one(weights, root):
    assert convert_messages(weighted(**weights), root).turns[1] == assistant("You.")


@pytest.mark.parametrize("weights", [{"weight": "0"}, {"weight": 0.5}, {"loss": "false"}, {"train": []}, {"weight": 2}])
def test_weight_unknown(weights, root):
    assert refusal(convert_messages, weighted(**weights), root) == "unknown weight"


def test_weight_of_question_counted(root):
    record = {"messages": [{**asked(TEXT), "weight": 1, "loss": False}, ANSWER]}
    assert convert_messages(record, root).ignored == ("messages[].weight of a user message",)


def test_weight_all_zero(root):
    record = {"system": "Be kind.", "messages": [asked(TEXT), {**ANSWER, "weight": 0}]}
    with pytest.raises(RecordError, match=r"^nothing supervised: every answer has a weight of 0"):
        to_dialogue("line 1", record, root)


KIND, BRIEF = {"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}


@pytest.mark.parametrize(
    ("record", "system"),
    [
        ({"messages": [BRIEF, asked(TEXT), ANSWER]}, ("Be brief.",)),
        ({"messages": [KIND, BRIEF, asked(TEXT), ANSWER]}, ("Be kind.", "Be brief.")),
        ({"system": "In French.", "messages": [asked(TEXT), ANSWER]}, ("In French.",)),
        ({"system": "In French.", "messages": [KIND, asked(TEXT), ANSWER]}, ("In French.", "Be kind.")),
        ({"system": "Be kind.", "messages": [KIND, asked(TEXT), ANSWER]}, ("Be kind.",)),
        ({"system_prompt": "In French.", "system": None, "messages": [asked(TEXT), ANSWER]}, ("In French.",)),
        ({"system": " ", "messages": [{**KIND, "content": ""}, asked(TEXT), ANSWER]}, None),
    ],
)
def test_system_messages_joined(record, system, root):
    opened = (Turn("system", system),) if system else ()
    assert convert_messages(record, root).turns == (*opened, user("Who?"), assistant("Me."))


@pytest.mark.parametrize("system", [7, ["Be kind."], {"text": "Be kind."}, True])
def test_system_not_text(system, root):
    assert refusal(convert_messages, {"system": system, "messages": [asked(TEXT), ANSWER]}, root) == "unknown content"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("tool calls", {"content": None, "tool_calls": [{"id": "1", "type": "function"}]}),
        ("tool calls", {"content": "", "function_call": {"name": "look"}}),
        ("tool calls", {"tool_calls": [{"id": "1"}]}),
        ("refusal", {"content": None, "refusal": "I cannot."}),
        ("reasoning", {"reasoning_content": "It has whiskers."}),
        ("reasoning", {"thinking": "It has whiskers."}),
        ("audio", {"audio": {"id": "a"}}),
        ("video", {"videos": ["v.mp4"]}),
        ("answer trained in part", {"train_detail": [{"begin_offset": 0}]}),
        ("answer trained in part", {"content": [{**TEXT, "weight": 0}, TEXT]}),
        ("unknown content", {"content": None}),
        ("unknown content", {"content": [{"type": "video", "video": "v.mp4"}]}),
        ("unknown content", {"content": [{"type": "image", "image": "cat.jpg", "text": "A cat."}]}),
        ("image not read", {"content": [{"type": "text", "text": "Me.", "image": "cat.jpg"}]}),
    ],
)
def test_message_leftover_rejected(reason, change, root):
    assert refusal(convert_messages, {"messages": [asked(TEXT), {**ANSWER, **change}]}, root) == reason


def test_message_leftover_counted(root):
    empty = {"tool_calls": [], "function_call": None, "refusal": None, "audio": "", "reasoning_content": " "}
    known = {"id": "7", "timestamp": 1, "name": "Tom", "emotion": "calm"}
    record = {"messages": [asked({**TEXT, "image": None, "url": "", "lang": "en"}), {**ANSWER, **empty, **known}]}
    dialogue = convert_messages(record, root)
    assert dialogue.turns == (user("Who?"), assistant("Me."))
    assert dialogue.ignored == ("messages[].name", "messages[].emotion")


@pytest.mark.parametrize(
    "history", [7, "Who?", [7], [["Who?"]], [["Who?", "Me.", "Why?"]], [["Who?", 7]], [{"user": "Who?"}], ["Who?"]]
)
def test_history_bad_shape(history, root):
    record = {"instruction": "Who?", "output": "Me.", "history": history}
    assert refusal(FORMATS["alpaca"].convert, record, root) == "unknown content"


def test_history_turns(root, cat):
    record = {"instruction": "Why?", "output": "So.", "system": "Be kind.", "images": ["cat.jpg"]}
    turns = FORMATS["alpaca"].convert({**record, "history": [["Who?", "Me."]]}, root).turns
    assert turns == (Turn("system", ("Be kind.",)), user(cat, "Who?"), assistant("Me."), user("Why?"), assistant("So."))


def test_messages_surrogate_refused(root):
    record = json.loads('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert refusal(convert_messages, record, root) == "text is not Unicode"
