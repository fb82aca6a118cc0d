"""`messages` records -> dialogues and every reason for which one is refused; the readers of dataset families."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from sources import make_source

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats import FORMATS, easy_vqa, messages
from finetune.data.formats.recognise import recognise_source
from finetune.data.io.image_roots import ImageRoot
from finetune.data.records import to_dialogue
from finetune.recipe.schema import CAPTIONS, DOCUMENTS, need_end_of_utterance
from modeling.errors import UserError

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
def test_every_way_to_name_the_image(record, root, cat):
    assert messages.convert(record, root) == Dialogue((user(cat, "Who?"), assistant("Me.")))


def test_a_long_conversation_with_its_parts_in_order(root, cat, tmp_path):
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
        user("Who?", cat, "And?", Image((tmp_path / "images" / "dog.jpg").resolve())),
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
def test_a_record_that_is_no_dialogue_is_refused(reason, record, root):
    assert refusal(messages.convert, record, root) == reason


def weighted(**weights):
    """Two questions; the first answer has these weights."""
    bad = {"role": "assistant", "content": "You.", **weights}
    return {"messages": [asked(TEXT), bad, asked(TEXT), ANSWER]}


@pytest.mark.parametrize(
    "weights",
    [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"training": 0}, {"weight": 1, "loss": False}],
)
def test_weight_of_an_answer_that_is_not_trained_on(weights, root):
    turns = messages.convert(weighted(**weights), root).turns
    assert [turn.supervised for turn in turns] == [True, False, True, True]
    assert turns[1] == Turn("assistant", ("You.",), supervised=False)


@pytest.mark.parametrize("weights", [{}, {"weight": 1}, {"weight": None}, {"loss": True, "train": 1.0}])
def test_weight_of_an_answer_that_is_trained_on(weights, root):
    assert messages.convert(weighted(**weights), root).turns[1] == assistant("You.")


@pytest.mark.parametrize("weights", [{"weight": "0"}, {"weight": 0.5}, {"loss": "false"}, {"train": []}, {"weight": 2}])
def test_weight_that_is_none(weights, root):
    assert refusal(messages.convert, weighted(**weights), root) == "unknown weight"


def test_weight_of_a_question_is_counted(root):
    record = {"messages": [{**asked(TEXT), "weight": 1, "loss": False}, ANSWER]}
    assert messages.convert(record, root).ignored == ("messages[].weight of a user message",)


def test_weight_of_no_answer_leaves_nothing_to_train_on(root):
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
def test_system_messages_are_one(record, system, root):
    opened = (Turn("system", system),) if system else ()
    assert messages.convert(record, root).turns == (*opened, user("Who?"), assistant("Me."))


@pytest.mark.parametrize("system", [7, ["Be kind."], {"text": "Be kind."}, True])
def test_system_that_is_no_text(system, root):
    assert refusal(messages.convert, {"system": system, "messages": [asked(TEXT), ANSWER]}, root) == "unknown content"


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
def test_field_of_a_message_that_is_not_read(reason, change, root):
    assert refusal(messages.convert, {"messages": [asked(TEXT), {**ANSWER, **change}]}, root) == reason


def test_field_of_a_message_that_holds_nothing_or_is_unknown(root):
    empty = {"tool_calls": [], "function_call": None, "refusal": None, "audio": "", "reasoning_content": " "}
    known = {"id": "7", "timestamp": 1, "name": "Tom", "emotion": "calm"}
    record = {"messages": [asked({**TEXT, "image": None, "url": "", "lang": "en"}), {**ANSWER, **empty, **known}]}
    dialogue = messages.convert(record, root)
    assert dialogue.turns == (user("Who?"), assistant("Me."))
    assert dialogue.ignored == ("messages[].name", "messages[].emotion")


@pytest.mark.parametrize(
    "history", [7, "Who?", [7], [["Who?"]], [["Who?", "Me.", "Why?"]], [["Who?", 7]], [{"user": "Who?"}], ["Who?"]]
)
def test_history_of_another_shape(history, root):
    record = {"instruction": "Who?", "output": "Me.", "history": history}
    assert refusal(FORMATS["alpaca"].convert, record, root) == "unknown content"


def test_history_becomes_earlier_turns(root, cat):
    record = {"instruction": "Why?", "output": "So.", "system": "Be kind.", "images": ["cat.jpg"]}
    turns = FORMATS["alpaca"].convert({**record, "history": [["Who?", "Me."]]}, root).turns
    assert turns == (Turn("system", ("Be kind.",)), user(cat, "Who?"), assistant("Me."), user("Why?"), assistant("So."))


@pytest.mark.parametrize(("split", "count"), [("train", 38_575), ("test", 9_673)])
def test_every_question_of_easy_vqa_is_one_record(split, count):
    assert sum(1 for _ in easy_vqa.read(make_source("easy_vqa", split=split))) == count


def first_record(name, split):
    place, record = next(iter(FORMATS[name].read(make_source(name, split=split))))
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
def test_what_a_question_and_its_answer_say(question, answer, facts):
    assert list(easy_vqa._facts(question, answer)) == facts


@pytest.fixture(scope="module")
def captions():
    return list(easy_vqa.read_captions(make_source("easy_vqa_captions")))


def test_captions_are_documents_and_say_what_the_questions_say(captions, root):
    assert len(captions) == 2 * 4000
    assert [place for place, _ in captions[:3]] == [
        "train/0.png/caption",
        "train/0.png/statements",
        "train/1.png/caption",
    ]
    denied = silent = 0
    for place, record in captions[:600]:
        facts = {fact for asked in record["questions"] for fact in easy_vqa._facts(asked["question"], asked["answer"])}
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
    record = {"image": "7.png", "kind": "caption", "questions": [{"question": "is there a circle?", "answer": "no"}]}
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
    tested = digests({record["image"] for _, record in easy_vqa.read(make_source("easy_vqa", split="test"))})
    assert (len(captioned), len(tested), len(captioned & tested)) == (4000, 1000, 0)


def test_what_formats_say_of_themselves():
    def those(wanted):
        return {name for name, family in FORMATS.items() if wanted(family)}

    assert those(lambda family: family.documents) == set(DOCUMENTS)
    assert those(lambda family: family.captions) == set(CAPTIONS)
    assert set(DOCUMENTS) == {"obelics", "pairs", "image_folder", "class_folders", "text", "easy_vqa_captions"}
    assert those(lambda family: not family.ordered) == {"m3it", "cauldron", "vqa", "lrv", "easy_vqa"}
    assert need_end_of_utterance([make_source("text"), make_source("lrv")])
    assert not need_end_of_utterance([make_source("text"), make_source("pairs")])
    assert need_end_of_utterance([make_source("text"), make_source("pairs", prompt=("What is it?",))])


def test_a_surrogate_in_json_reaches_the_dialogue_and_is_refused(root):
    record = json.loads('{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert refusal(messages.convert, record, root) == "text is not Unicode"


def written(folder, **contents):
    """Files of these contents (anything but text as JSON) in a new folder: their paths, in order."""
    paths = [folder / name.replace("__", ".") for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tuple(paths)


def read(name, *paths, **settings):
    """What a format reads of these paths: records, and errors by their reason."""
    records = [record for _, record in FORMATS[name].read(make_source(name, paths=paths, **settings))]
    return [(record.reason, record.detail) if isinstance(record, RecordError) else record for record in records]


QUESTIONS = {
    "info": {"year": 2014},
    "questions": [
        {"image_id": 9, "question": "What?", "question_id": 9000},
        {"image_id": 9, "question": "Where?", "question_id": 9001},
        {"image_id": 9, "question": "What again?", "question_id": 9000},
        {"image_id": 9, "question": "Why?"},
        "Who?",
        {"image_id": 8, "question": "How many?", "question_id": 8000},
    ],
    "data_subtype": "val2014",
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 8000, "image_id": 8, "multiple_choice_answer": "2", "answers": [{"answer": "2"}]},
        {"question_id": 7000, "image_id": 7, "multiple_choice_answer": "no", "answers": [{"answer": "no"}]},
        {"question_id": 9000, "image_id": 9, "multiple_choice_answer": "a net", "answers": [{"answer": "net"}]},
    ],
    "data_subtype": "val2014",
}
JOINED = [
    ("question_id repeated", "9000"),
    ("missing field", "expected \"question_id\", got {'image_id': 9, 'question': 'Why?'}"),
    {**QUESTIONS["questions"][5], **ANNOTATIONS["annotations"][0], "data_subtype": "val2014"},
    ("annotation without question", "question_id 7000"),
    {**QUESTIONS["questions"][0], **ANNOTATIONS["annotations"][2], "data_subtype": "val2014"},
    ("question without annotation", "question_id 9001"),
]


def test_vqa_questions_are_joined_with_their_annotations(tmp_path):
    questions, annotations = written(tmp_path, q__json=QUESTIONS, a__json=ANNOTATIONS)
    joined = read("vqa", questions, annotations)
    (no_object,) = [error for error in joined if error not in JOINED]
    assert "'Who?'" in no_object[1]
    assert [record for record in joined if record != no_object] == JOINED
    assert read("vqa", annotations, questions) == joined
    assert read("vqa", tmp_path) == joined


def test_a_vqa_record_names_coco_files(tmp_path):
    (tmp_path / "COCO_val2014_000000000008.jpg").write_bytes(PNG)
    paths = written(tmp_path, q__json=QUESTIONS, a__json=ANNOTATIONS)
    source = make_source("vqa", paths=paths, image_root=(tmp_path,))
    (record,) = [
        found for _, found in FORMATS["vqa"].read(source) if isinstance(found, dict) and found["question_id"] == 8000
    ]
    image = Image((tmp_path / "COCO_val2014_000000000008.jpg").resolve())
    expected = Dialogue((user(image, "How many?"), assistant("2", references=("2",))))
    assert FORMATS["vqa"].convert(record, ImageRoot(source)) == expected


def test_textvqa_and_copies_of_vqa_hold_both(tmp_path):
    record = {"question": "What?", "image_id": "0a", "answers": ["nous", "nous", "le"], "question_id": 1}
    paths = written(
        tmp_path, textvqa__json={"dataset_type": "val", "data": [record]}, copy__json=[record], copy__jsonl=record
    )
    assert read("vqa", *paths) == [record] * 3


def test_mimic_it_instructions_follow_those_they_are_related_to(tmp_path):
    first = {"instruction": "Who?", "answer": "Me.", "image_ids": ["cat.jpg"], "rel_ins_ids": []}
    second = {**first, "instruction": "Why?", "answer": "So.", "rel_ins_ids": ["I1"]}
    third = {**first, "instruction": "And?", "image_ids": ["dog.jpg", "cat.jpg"], "rel_ins_ids": ["I2", "I1"]}
    lost, twice = {**first, "rel_ins_ids": ["I1", "I9"]}, {**first, "rel_ins_ids": ["I1", "I6"]}
    data = {"I3": third, "I1": first, "I2": second, "I4": lost, "I5": 7, "I6": twice}
    (path,) = written(tmp_path, d__json={"meta": {"version": "1"}, "data": data})
    assert read("mimic_it", path) == [
        {**third, "related": [second, first]},
        {**first, "related": []},
        {**second, "related": [first]},
        ("related instruction missing", "I4 is related to I9, which is not there"),
        ("unknown content", '"I5": expected an object, got 7'),
        ("related instruction repeated", "I6 is related to I1, I6"),
    ]


def test_mimic_it_shows_images_again_only_after_others(root, cat, tmp_path):
    dog = Image((tmp_path / "images" / "dog.jpg").resolve())
    who = {"instruction": "Who?", "answer": "Me."}
    related = [{**who, "image_ids": ids} for ids in (["cat.jpg"], ["cat.jpg"], [], ["cat.jpg"], ["dog.jpg"])]
    turns = FORMATS["mimic_it"].convert({**who, "image_ids": ["cat.jpg"], "related": related}, root).turns
    assert [turn.images for turn in turns[::2]] == [(cat,), (), (), (), (dog,), (cat,)]
    assert {turn.text for turn in turns[::2]} == {"Who?"}


def test_mimic_it_copies_are_read_as_they_are(tmp_path):
    record = {"instruction": "Who?", "answer": "Me.", "images": ["cat.jpg"]}
    assert read("mimic_it", *written(tmp_path, c__jsonl=record)) == [record]
    paths = written(tmp_path, list__json=[record, record], lines__json=f"{json.dumps(record)}\n{json.dumps(record)}")
    assert [read("mimic_it", path) for path in paths] == [[record, record]] * 2


def test_an_image_folder_is_read_with_its_captions(tmp_path):
    (tmp_path / "sub").mkdir()
    images = ("b.PNG", "a.jpg", "sub/c.webp", "d.jpg", "e.jpg", "f.jpg")
    for name in images:
        (tmp_path / name).write_bytes(PNG)
    lines = [
        {"file_name": "a.jpg", "text": "An a."},
        {"file_name": "sub/c.webp", "text": "A c."},
        {"file_name": "a.jpg", "text": "Another a."},
        {"file_name": "../gone.jpg", "text": "Gone."},
        {"file_name": "f.jpg"},
        {"file_name": "e.jpg", "text": "An e."},
    ]
    written(tmp_path, metadata__jsonl="\n".join(map(json.dumps, lines)), b__txt="A b.\n", g__txt="A g.", e__txt="E.")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    records = list(FORMATS["image_folder"].read(make_source("image_folder", paths=(tmp_path,))))
    assert [(place, getattr(record, "reason", record)) for place, record in records] == [
        ("metadata.jsonl:3", "two captions"),
        ("metadata.jsonl:5", "missing field"),
        ("a.jpg", {"image": str(tmp_path / "a.jpg"), "text": "An a."}),
        ("b.PNG", {"image": str(tmp_path / "b.PNG"), "text": "A b.\n"}),
        ("d.jpg", "text is not Unicode"),
        ("e.jpg", "two captions"),
        ("f.jpg", "no caption"),
        ("sub/c.webp", {"image": str(tmp_path / "sub" / "c.webp"), "text": "A c."}),
        ("metadata.jsonl:4", "missing image"),
        ("g.txt", "missing image"),
    ]


def test_an_image_folder_with_a_table_of_its_own_columns(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PNG)
    written(tmp_path, metadata__csv='file_name,caption\na.jpg,"An a, and more."\n')
    source = make_source("image_folder", paths=(tmp_path,), columns={"text": "caption"})
    ((place, record),) = FORMATS["image_folder"].read(source)
    assert place == "a.jpg"
    dialogue = FORMATS["image_folder"].convert(record, ImageRoot(source))
    assert dialogue == Dialogue((Turn("document", (Image((tmp_path / "a.jpg").resolve()), "An a, and more.")),))


def test_an_image_folder_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        read("image_folder", tmp_path / "gone")
    (path,) = written(tmp_path, a__txt="A.")
    with pytest.raises(UserError, match="expected a folder of images, found a file"):
        read("image_folder", path)
    with pytest.raises(UserError, match=r"expected folders as path, got me/images\[train\]"):
        read("image_folder", hub="me/images")


def test_a_text_file_is_one_record_and_other_files_hold_many(tmp_path):
    paths = written(tmp_path, a__txt="\ufeffOne.\n\nTwo.", b__jsonl='{"text": "Three."}\n{"text": "Four."}')
    (tmp_path / "c.txt").write_bytes(b"\xff")
    assert read("text", *paths) == [{"text": "One.\n\nTwo."}, {"text": "Three."}, {"text": "Four."}]
    assert [reason for reason, _ in read("text", tmp_path / "c.txt")] == ["text is not Unicode"]


def test_a_folder_of_text_files_stands_for_them_and_any_other_for_its_records(tmp_path):
    for name in ("texts/of/mine", "records"):
        (tmp_path / name).mkdir(parents=True)
    written(tmp_path / "texts", b__txt="B.", a__txt="A.")
    written(tmp_path / "texts/of/mine", c__txt="C.")
    written(tmp_path / "records", d__jsonl={"text": "D."})
    expected = [{"text": text} for text in ("A.", "B.", "C.", "D.")]
    assert read("text", tmp_path / "records", tmp_path / "texts") == expected
    assert read("text", tmp_path / "texts" / "*.txt") == expected[:2]


def test_the_first_records_of_a_source_tell_its_format(tmp_path):
    def told(path):
        return recognise_source(make_source("auto", paths=(path,))).format

    mimic = {"meta": {}, "data": {"I1": {"instruction": "Who?", "answer": "Me.", "image_ids": ["X"]}}}
    paths = written(
        tmp_path,
        a__txt="A.",
        b__jsonl={"text": "A."},
        c__json=[{"data": ["A?", "B."]}],
        d__json=mimic,
        e__json=QUESTIONS,
    )
    assert list(map(told, paths)) == ["text", "text", "ultrachat", "mimic_it", "vqa"]


def test_compressed_official_files_are_joined_too(tmp_path):
    for name, content in (("q", QUESTIONS), ("a", ANNOTATIONS)):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    paths = (tmp_path / "q.json.gz", tmp_path / "a.json.gz")
    assert [record for record in read("vqa", *paths) if isinstance(record, dict)] == [JOINED[2], JOINED[4]]


def test_json_breaks_off_in_an_official_file(tmp_path):
    questions, annotations = written(tmp_path, q__json=QUESTIONS, a__json=json.dumps(ANNOTATIONS)[:-40])
    kept = {"on_broken": "keep"}
    reasons = [record[0] for record in read("vqa", questions, annotations, **kept) if isinstance(record, tuple)]
    assert reasons.count("not JSON") == 1
    assert read("mimic_it", annotations, **kept)[-1][0] == "not JSON"
    for paths in ((questions, annotations), (annotations, questions)):
        with pytest.raises(UserError, match=r"a\.json: the file breaks off: not JSON: "):
            read("vqa", *paths)
    with pytest.raises(UserError, match=r"a\.json: the file breaks off: "):
        read("mimic_it", annotations)


def test_json_breaks_off_in_the_metadata_of_an_image_folder(tmp_path):
    lines = gzip.compress(b'{"file_name": "a.png", "text": "A."}\n')
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "metadata.csv").write_text('file_name,text\na.png,"A.\n')
    with pytest.raises(UserError, match=r"metadata\.csv: the file breaks off: not CSV: a quote opens in line 2"):
        read("image_folder", tmp_path / "images")
    got = read("image_folder", tmp_path / "images", on_broken="keep")
    assert [record[0] for record in got] == ["not CSV"]
    (tmp_path / "cut.jsonl.gz").write_bytes(lines[:-4])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: the file breaks off: corrupt file"):
        read("pairs", tmp_path / "cut.jsonl.gz")
