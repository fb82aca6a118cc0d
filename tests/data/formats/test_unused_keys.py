"""Keys of records that a format does not read: content rejects the record by name, what is unknown is counted."""

import json

import pytest
from sources import make_source

from finetune.data.conversation import RecordError, Turn, assistant, user
from finetune.data.formats import FORMATS
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import read_dialogues
from finetune.data.stats import MOST_NAMES, SourceStats, most_frequent

PNG = b"\x89PNG\r\n\x1a\n..."
ASKED = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
SAID = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}
TOLD = {"instruction": "Who?", "input": "", "output": "Me."}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in ("a.png", "7.jpg"):
        (folder / name).write_bytes(PNG)
    return ImageRoot(make_source("any", image_root=(folder,)))


@pytest.mark.parametrize(
    ("reason", "name", "record"),
    [
        ("video", "llava", {**SAID, "image": "a.png", "video": "v.mp4"}),
        ("video", "sharegpt", {**SAID, "videos": ["v.mp4"]}),
        ("video", "messages", {**ASKED, "Video": {"bytes": "..."}}),
        ("video", "pairs", {"jpg": "a.png", "txt": "A dog.", "mp4": b"..."}),
        ("audio", "alpaca", {**TOLD, "audios": ["a.wav"]}),
        ("audio", "text", {"text": "A dog.", "audio": {"path": "a.wav"}}),
        ("tool calls", "messages", {**ASKED, "tools": [{"type": "function"}]}),
        ("tool calls", "sharegpt", {**SAID, "tools": '[{"name": "look"}]'}),
        ("tool calls", "messages", {**ASKED, "functions": [{"name": "look"}]}),
        ("reasoning", "alpaca", {**TOLD, "reasoning": "It is me."}),
        ("text beside the dialogue", "messages", {**ASKED, "history": [["Hello.", "Hello."]]}),
        ("text beside the dialogue", "llava", {**SAID, "image": "a.png", "context": "A zoo."}),
        ("text beside the dialogue", "alpaca", {**TOLD, "context": "A zoo."}),
        ("text beside the dialogue", "ultrachat", {"data": ["Who?", "Me."], "input": "A zoo."}),
        ("text beside the dialogue", "text", {"text": "A dog.", "system": "Be kind."}),
        ("text beside the dialogue", "cauldron", {"images": [], "texts": [{"user": "Who?", "assistant": "Me."}],
                                                  "history": [["Hello.", "Hello."]]}),
        ("image not read", "ultrachat", {"data": ["Who?", "Me."], "image": "a.png"}),
        ("image not read", "sharegpt", {**SAID, "image_path": "a.png"}),
        ("image not read", "messages", {**ASKED, "img": {"bytes": PNG}}),
        ("image not read", "text", {"text": "A dog.", "image": "a.png"}),
        ("several questions", "qa", {"question": "Who?", "prompt": "Be brief.", "answer": "Me."}),
        ("several questions", "qa", {"query": "Who?", "input": "A zoo.", "response": "Me."}),
        ("nothing supervised", "messages", {**ASKED, "weight": 0}),
        ("nothing supervised", "sharegpt", {**SAID, "loss": False}),
        ("marked as a bad answer", "alpaca", {**TOLD, "kto_tag": False}),
    ],
)  # fmt: skip
def test_leftover_content_rejected(reason, name, record, root):
    with pytest.raises(RecordError) as caught:
        FORMATS[name].convert(record, root)
    assert caught.value.reason == reason


def test_leftover_names_its_repair(root):
    with pytest.raises(RecordError) as caught:
        FORMATS["sharegpt"].convert({**SAID, "image_path": "a.png"}, root)
    assert str(caught.value) == (
        'image not read: "image_path" is not read; `columns: {image: image_path}` reads it; '
        "`ignore: [image_path]` does without it"
    )


@pytest.mark.parametrize(
    ("name", "record", "ignored"),
    [
        ("messages", {**ASKED, "id": 7, "source": "coco", "metadata": {"score": 1}, "video": None, "tools": []}, ()),
        ("sharegpt", {**SAID, "tools": "[]", "history": [], "audio": "", "image": None}, ()),
        ("sharegpt", {**SAID, "weight": 1, "audio": False, "safe": False}, ("weight", "audio", "safe")),
        ("sharegpt", {**SAID, "score": 0, "chosen": "Me.", "kto_tag": True}, ("score", "chosen", "kto_tag")),
        ("llava", {**SAID, "image": "a.png", "image_url": "https://example.org/a.png"}, ("image_url",)),
        ("lrv", {"image_id": 7, "question": "Who?", "answer": "Me.", "task": "negative"}, ()),
        ("cauldron", {"images": [], "texts": [{"user": "Who?", "assistant": "Me.", "source": "x", "level": 2}]},
         ("texts[].level",)),
        ("mimic_it", {"instruction": "Who?", "answer": "Me.", "images": ["a.png"], "level": 2,
                      "related": [{"instruction": "Who?", "answer": "Me.", "images": ["a.png"], "grade": 1}]},
         ("level", "related[].grade")),
        ("pairs", {"image": "a.png", "text": "A cat.", "similarity": 0.3, "width": 9}, ("similarity",)),
    ],
)  # fmt: skip
def test_leftover_unknown_counted(name, record, ignored, root):
    assert FORMATS[name].convert(record, root).ignored == ignored


def test_instruction_and_input_are_one_question(root):
    record = {"instruction": "Translate.", "input": "Chat", "response": "Cat", "score": 1}
    dialogue = FORMATS["qa"].convert(record, root)
    assert (dialogue.turns, dialogue.ignored) == ((user("Translate.\nChat"), assistant("Cat")), ("score",))


def test_leftover_ignored_by_source(root, tmp_path):
    bad = [{**message, "tool_calls": [{"id": 1}]} for message in ASKED["messages"]]
    records = [{**ASKED, "tools": ["look"], "score": 1}, {"messages": bad}, {**ASKED, "video": "v.mp4"}, ASKED]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = make_source("messages", (tmp_path / "data.jsonl",), ignore=("tools", "tool_calls"))
    stats = SourceStats("x")
    found = [dialogue.turns for _, dialogues in read_dialogues(source, stats) for dialogue in dialogues]
    assert found == [(user("Who?"), assistant("Me."))] * 3
    assert (stats.rejected, stats.ignored) == ({"video": 1}, {"score": 1})


def test_system_and_history_fields(root):
    before = {"system": "Be kind.", "history": [["Hello.", "Hello."]]}
    opened = (Turn("system", ("Be kind.",)), user("Hello."), assistant("Hello."))
    assert FORMATS["alpaca"].convert({**TOLD, **before}, root).turns == (*opened, user("Who?"), assistant("Me."))
    lrv = {"image": "a.png", "question": "Who?", "answer": "Me.", **before}
    turns = FORMATS["lrv"].convert(lrv, root).turns
    assert [turn.text for turn in turns] == ["Be kind.", "Hello.", "Hello.", "Who?", "Me."]
    assert [len(turn.images) for turn in turns] == [0, 1, 0, 0, 0]
    for name, record in (("sharegpt", SAID), ("messages", ASKED), ("ultrachat", {"data": ["Who?", "Me."]})):
        turns = FORMATS[name].convert({**record, "system": "Be kind."}, root).turns
        assert turns == (Turn("system", ("Be kind.",)), user("Who?"), assistant("Me."))


def test_ignored_names_bounded():
    stats = SourceStats("x")
    stats.ignore(f"key{number}" for number in range(MOST_NAMES + 5))
    stats.ignore(["key0", "\ud800", "k" * 1000])
    assert len(stats.ignored) == MOST_NAMES + 1
    assert (stats.ignored["key0"], stats.ignored["other keys"]) == (2, 7)
    alone = SourceStats("x")
    alone.ignore(["\ud800", "k" * 1000])
    assert dict(alone.ignored) == {"\\ud800": 1, "k" * 80: 1}
    assert SourceStats.from_json(json.loads(json.dumps(alone.to_json()))) == alone
    assert SourceStats("x").to_json().get("ignored") is None


def test_ignored_names_most_frequent_first():
    counts = {f"k{number}": number for number in range(1, 12)}
    assert most_frequent(counts) == "k11 11, k10 10, k9 9, k8 8, k7 7, k6 6, k5 5, k4 4 and 3 more"
    stats = SourceStats("x")
    stats.ignore(["score", "url", "score"])
    assert stats.loss == "not used of records: score 2, url 1"
