"""A record of each dataset family, as its files have it -> the dialogue it is, written out by hand."""

import base64
import json
import textwrap
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import PNG as PICTURE
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data import formats
from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats import FORMATS
from finetune.data.formats.questions import DIFFERENCES
from finetune.data.formats.recognise import recognise
from finetune.data.io.image_roots import ImageRoot
from finetune.data.prepare import prepare
from finetune.data.read_dialogues import resolve_source
from finetune.recipe.schema import CAPTIONS, DOCUMENTS, need_end_of_utterance
from modeling.errors import UserError

PNG, JPEG = b"\x89PNG\r\n\x1a\n...", b"\xff\xd8\xff..."
PNG64, JPEG64 = (base64.b64encode(data).decode() for data in (PNG, JPEG))
FILES = (
    "cat.jpg",
    "dog.jpg",
    "7.jpg",
    "2392588.jpg",
    "2019.png",
    "2019_2.png",
    "COCO_train2014_000000000009.jpg",
    "COCO_val2014_000000391895.jpg",
)


def image(name):
    return Image(Path(name))


CAT, DOG = image("cat.jpg"), image("dog.jpg")


def document(*parts):
    return Dialogue((Turn("document", parts),))


def said(*values, speakers=("human", "gpt")):
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


def about(*images):
    """Two questions and their answers, the images before the first."""
    return Dialogue((user(*images, "Who?"), assistant("Me."), user("Why?"), assistant("So.")))


TALK = ("Who?", "Me.", "Why?", "So.")
TEN = ["net", "tent", "net", "Net", "tent", "fish", "net", "tent", "a net", "tent"]
OBELIX = "https://example.org/obelix.jpg"

CASES = [
    ("messages", {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
     Dialogue((user("Who?"), assistant("Me.")))),
    ("messages", {"prompt": "Who?", "prompt_id": "f0", "messages": [{"role": "user", "content": "Who?", "name": None}]},
     Dialogue((user("Who?"),))),
    # the order of text and image is the record's
    ("llava", {"id": "33", "image": "cat.jpg", "conversations": said("<image>\nWho?", "Me.", "Why?", "So.")},
     Dialogue((user(CAT, "\nWho?"), assistant("Me."), user("Why?"), assistant("So.")))),
    ("llava", {"id": "33", "image": "cat.jpg", "conversations": said("Who?\n<image>", "Me.")},
     Dialogue((user("Who?\n", CAT), assistant("Me.")))),
    ("llava", {"image": ["cat.jpg", "dog.jpg"], "conversations": said("In <image> and <image>?", "A.", "Why?", "So.")},
     Dialogue((user("In ", CAT, " and ", DOG, "?"), assistant("A."), user("Why?"), assistant("So.")))),
    ("llava", {"images": ["cat.jpg", "dog.jpg"], "conversations": said("<image>\nWho?", "Me.", "<image>", "So.")},
     Dialogue((user(CAT, "\nWho?"), assistant("Me."), user(DOG), assistant("So.")))),
    ("llava", {"images": ["cat.jpg", "dog.jpg"], "conversations": said(*TALK)}, about(CAT, DOG)),
    ("llava", {"image": {"bytes": PNG, "path": None}, "conversations": said(*TALK)}, about(Image(PNG))),
    ("llava", {"image": "cat.jpg", "conversations": said("Which tag?", "It is <image>.")},
     Dialogue((user(CAT, "Which tag?"), assistant("It is <image>.")))),
    ("llava", {"image": "cat.jpg", "conversations": [{"from": "system", "value": "Be kind."}, *said(*TALK)]},
     Dialogue((Turn("system", ("Be kind.",)), *about(CAT).turns))),
    ("sharegpt", {"id": "wg1", "conversations": said(*TALK)}, about()),
    ("sharegpt", {"id": "wg1", "image": None, "conversations": said(*TALK, speakers=("user", "chatgpt"))}, about()),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be kind."}, *said(*TALK, speakers=("user", "bard"))]},
     Dialogue((Turn("system", ("Be kind.",)), *about().turns))),
    ("svit", {"image_id": 7, "conversations": [{"content": said("Who?", "Me.", speakers=("user", "gpt"))},
                                               {"content": said("Why?", "So.", speakers=("user", "gpt"))}]},
     about(image("7.jpg"))),
    ("svit", {"image_id": "7", "conversations": said(*TALK)}, about(image("7.jpg"))),
    ("svit", {"image_id": 7, "conversations": said("Who?\n<image>", "Me.")},
     Dialogue((user("Who?\n", image("7.jpg")), assistant("Me.")))),
    ("ultrachat", {"id": "0", "data": ["Who?", "Me.", "Why?", "So."]}, about()),
    ("lrv", {"image_id": "2392588", "question": "Is there a red car?", "answer": "No, it is blue.", "task": "negative"},
     Dialogue((user(image("2392588.jpg"), "Is there a red car?"), assistant("No, it is blue.")))),
    ("lrv", {"image": "cat.jpg", "image_id": "1", "question": "Who?", "answer": "Me."},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("m3it", {"instruction": "Answer.", "inputs": "Who?", "image_base64_str": [PNG64, JPEG64], "outputs": "Me."},
     Dialogue((user(Image(PNG), Image(JPEG), "Answer.\nWho?"), assistant("Me.")))),
    ("m3it", {"instruction": "Describe.", "inputs": "", "image_base64_str": PNG64, "outputs": "Me."},
     Dialogue((user(Image(PNG), "Describe."), assistant("Me.")))),
    ("m3it", {"instruction": "Describe.", "inputs": None, "image": {"bytes": JPEG, "path": "a.jpg"}, "outputs": "Me."},
     Dialogue((user(Image(JPEG), "Describe."), assistant("Me.")))),
    ("mimic_it", {"instruction": "Who?", "answer": "Me.", "images": ["cat.jpg", "dog.jpg"]},
     Dialogue((user(CAT, DOG, "Who?"), assistant("Me.")))),
    ("mimic_it", {"instruction": "Who?", "answer": "Me.", "image_ids": ["cat.jpg"], "rel_ins_ids": []},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("alpaca", {"instruction": "Translate.", "input": "Chat", "output": "Cat"},
     Dialogue((user("Translate.\nChat"), assistant("Cat")))),
    ("alpaca", {"instruction": "Who?", "input": "", "output": "Me.", "system": "Be kind."},
     Dialogue((Turn("system", ("Be kind.",)), user("Who?"), assistant("Me.")))),
    ("alpaca", {"instruction": "Who?", "output": "Me.", "system": "", "images": ["cat.jpg"]},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("spot_the_diff", {"img_id": "2019", "sentences": ["the truck is gone", " a man appeared. ", "why?", ""]},
     Dialogue((user(image("2019.png"), image("2019_2.png"), DIFFERENCES),
               assistant("The truck is gone. A man appeared. Why?")))),
    ("cauldron", {"images": ["cat.jpg", "dog.jpg"], "texts": [{"user": "Who?", "assistant": "Me.", "source": "VQAv2"},
                                                            {"user": "Why?", "assistant": "So.", "source": "VQAv2"}]},
     about(CAT, DOG)),
    ("vqa", {"image_id": 9, "question": "What?", "question_id": 9000, "question_type": "what", "answer_type": "other",
             "data_subtype": "train2014", "multiple_choice_answer": "net",
             "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": 1} for text in TEN]},
     Dialogue((user(image("COCO_train2014_000000000009.jpg"), "What?"), assistant("tent", references=tuple(TEN))))),
    ("vqa", {"image_id": "7", "question": "What?", "question_id": 5, "answers": ["b", "a", "a", "b"]},
     Dialogue((user(image("7.jpg"), "What?"), assistant("b", references=("b", "a", "a", "b"))))),
    ("vqa", {"image": "cat.jpg", "image_id": 9, "question": "What?", "multiple_choice_answer": "net", "answers": []},
     Dialogue((user(CAT, "What?"), assistant("net")))),
    ("vqa", {"questionId": 337, "question": "What?", "docId": 279, "image": "cat.jpg", "answers": ["net", "a net"]},
     Dialogue((user(CAT, "What?"), assistant("net", references=("net", "a net"))))),
    ("vqa", {"query": "How many?", "imgname": "cat.jpg", "label": [14, 14]},
     Dialogue((user(CAT, "How many?"), assistant("14", references=("14", "14"))))),
    ("lrv", {"image": "cat.jpg", "question": "Cats?", "answer": 3}, Dialogue((user(CAT, "Cats?"), assistant("3")))),
    ("lrv", {"image_id": 7, "question": "A cat?", "answer": True},
     Dialogue((user(image("7.jpg"), "A cat?"), assistant("true")))),
    ("lrv", {"image": "cat.jpg", "question": "How much?", "answer": 0.5},
     Dialogue((user(CAT, "How much?"), assistant("0.5")))),
    ("qa", {"query": "Why?", "response": "So.", "history": [["Who?", "Me."]], "images": ["cat.jpg"]}, about(CAT)),
    ("qa", {"query": "Why?", "response": "So.", "system": "Be kind.", "history": []},
     Dialogue((Turn("system", ("Be kind.",)), user("Why?"), assistant("So.")))),
    ("qa", {"id": 1, "system_prompt": "", "question": "How many?", "response": 2},
     Dialogue((user("How many?"), assistant("2")))),
    ("qa", {"instruction": "Who?", "context": "Obelix is fat.", "response": "Obelix.", "category": "closed_qa"},
     Dialogue((user("Who?\nObelix is fat."), assistant("Obelix.")))),
    ("qa", {"question": "Who?", "answers": {"text": ["Me", "I"], "answer_start": [0, 3]}},
     Dialogue((user("Who?"), assistant("Me")))),
    ("qa", {"question": "Who?", "answers": ["Me", "I"]},
     Dialogue((user("Who?"), assistant("Me", references=("Me", "I"))))),
    ("qa", {"query": "Who?", "label": "Me.", "image_id": 7},
     Dialogue((user(image("7.jpg"), "Who?"), assistant("Me.")))),
    ("prompt_completion", {"prompt": "Who?", "completion": "Me."}, Dialogue((user("Who?"), assistant("Me.")))),
    ("prompt_completion", {"prompt": [{"role": "user", "content": [{"type": "image"},
                                                                   {"type": "text", "text": "Who?"}]}],
                           "completion": [{"role": "assistant", "content": "Me."}], "images": ["cat.jpg"]},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("preference", {"prompt": "Who?", "chosen": "Me.", "rejected": "You.", "images": ["cat.jpg"]},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("preference", {"prompt": [{"role": "user", "content": "Who?"}],
                    "chosen": [{"role": "assistant", "content": "Me."}],
                    "rejected": [{"role": "assistant", "content": "You."}]},
     Dialogue((user("Who?"), assistant("Me.")))),
    ("preference", {"question": "Who?", "chosen": "Me.", "rejected": "You.", "image": "cat.jpg"},
     Dialogue((user(CAT, "Who?"), assistant("Me.")))),
    ("preference", {"instruction": "Answer.", "input": "Who?", "chosen": "Me.", "rejected": "You.", "system": "Hm."},
     Dialogue((Turn("system", ("Hm.",)), user("Answer.\nWho?"), assistant("Me.")))),
    ("preference", {"prompt": "Who?", "chosen": "Me."}, Dialogue((user("Who?"), assistant("Me.")))),
    ("preference", {"prompt": "Who?", "rejected": [], "chosen": [{"role": "user", "content": "Who?"},
                                                                 {"role": "assistant", "content": "Me."}]},
     Dialogue((user("Who?"), assistant("Me.")))),
    ("obelics", {"images": ["cat.jpg", None, "dog.jpg", {"bytes": PNG, "path": None}, None],
                 "texts": [None, "One.\n\nTwo,\nlonger.\n \n", None, None, "Three."],
                 "metadata": "[{}, null]", "general_metadata": "{}"},
     document(CAT, "One.", "Two,\nlonger.", DOG, Image(PNG), "Three.")),
    ("pairs", {"image": "cat.jpg", "text": "A cat.", "source": "coco", "meta": "{}"}, document(CAT, "A cat.")),
    ("pairs", {"image": "cat.jpg", "caption": "A cat."}, document(CAT, "A cat.")),
    ("pairs", {"image": "cat.jpg", "filepath": "val2014", "filename": "COCO.jpg", "cocoid": 391895,
               "sentences": {"tokens": ["a", "cat"], "raw": "A cat.", "sentid": 1}}, document(CAT, "A cat.")),
    ("pairs", {"image": "cat.jpg", "sentences": [{"raw": "A cat."}, {"raw": "A pet."}]}, document(CAT, "A cat.")),
    ("pairs", {"image": "cat.jpg", "captions": ["A cat.", "A pet."]}, document(CAT, "A cat.")),
    ("pairs", {"__key__": "0001", "jpg": {"bytes": JPEG, "path": None}, "txt": "A cat."},
     document(Image(JPEG), "A cat.")),
    ("pairs", {"__key__": "0001", "png": {"bytes": PNG, "path": None}, "json": {"caption": "A cat.", "width": 9}},
     document(Image(PNG), "A cat.")),
    ("pairs", {"URL": "cat.jpg", "TEXT": "A cat.", "pwatermark": 0.1}, document(CAT, "A cat.")),
    ("pairs", {"file_name": "cat.jpg", "text": "A cat."}, document(CAT, "A cat.")),
    ("pairs", {"image_path": "cat.jpg", "caption": "A cat.", "split": "train"}, document(CAT, "A cat.")),
    ("pairs", {"path": "cat.jpg", "captions": [" ", "A cat."]}, document(CAT, "A cat.")),
    ("pairs", {"image": JPEG64 * 9, "text": "A cat."}, document(Image(base64.b64decode(JPEG64 * 9)), "A cat.")),
    ("text", {"path": "notes.md", "text": "One."}, document("One.")),
    ("text", {"text": "One.\r\n\r\nTwo.\n\n\n\nThree."}, document("One.", "Two.", "Three.")),
    ("text", {"id": "1", "url": "https://example.org/wiki/Gaul", "title": "Gaul", "text": "It is divided."},
     document("Gaul", "It is divided.")),
    ("text", {"title": "Gaul", "text": "Gaul is divided.\n\nInto three."}, document("Gaul is divided.", "Into three.")),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in FILES:
        (folder / name).write_bytes(PNG)
    return ImageRoot(make_source("any", image_root=(folder,)))


def convert(name, record, root):
    """The dialogue, its images relative to the root."""
    folder = root.source.image_roots[0].resolve()

    def relative(part):
        inside = isinstance(part, Image) and isinstance(part.source, Path)
        return Image(part.source.relative_to(folder)) if inside else part

    dialogue = FORMATS[name].convert(record, root)
    return Dialogue(tuple(replace(turn, parts=tuple(map(relative, turn.parts))) for turn in dialogue.turns))


def refusal(name, record, root):
    with pytest.raises(RecordError) as caught:
        FORMATS[name].convert(record, root)
    return caught.value.reason, caught.value.detail


def by_hand(cases):
    return pytest.mark.parametrize(
        ("name", "record", "expected"), cases, ids=[f"{case[0]}-{index}" for index, case in enumerate(cases)]
    )


@by_hand(CASES)
def test_convert_by_hand(name, record, expected, root):
    """Each format converts a record into the dialogue written here by hand."""
    dialogue = convert(name, record, root)
    assert dialogue == expected
    assert all(turn.role == "document" for turn in dialogue.turns) == FORMATS[name].documents


@by_hand(CASES)
def test_recognise_by_hand(name, record, expected):
    assert recognise([record])[0] == name


def test_every_format_has_a_case():
    assert set(FORMATS) - {name for name, _, _ in CASES} == {
        "image_folder",
        "class_folders",
        "easy_vqa",
        "easy_vqa_captions",
    }


def test_recognise_majority():
    llava, sharegpt = ({"conversations": said(*TALK)} | image for image in ({"image": "cat.jpg"}, {}))
    assert recognise([sharegpt, llava, llava])[0] == "llava"
    assert recognise([sharegpt, sharegpt, llava])[0] == "sharegpt"
    assert recognise([llava, {"foo": 1}, {"foo": 1}]) == ("llava", {None: 2})
    both = {"messages": [{"role": "user", "content": "Who?"}], "text": "Who?"}
    assert recognise([both])[0] == "messages"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("vqa", {"image_id": 9, "question": "What?", "question_id": 9000}),
        ("vqa", {"image_id": 9, "question_id": 9000, "multiple_choice_answer": "net", "answers": [{"answer": "net"}]}),
        ("lrv", {"image_id": 9, "question_id": 9000, "question": "What?", "answer": "A net."}),
        ("mimic_it", {"meta": {}, "data": {"I1": {"instruction": "Who?", "answer": "Me.", "image_ids": ["X"]}}}),
        ("text", {"url": "https://example.org", "text": "A page.", "timestamp": "2019"}),
        ("pairs", {"url": "https://example.org/a.jpg", "caption": "A cat."}),
    ],
)
def test_recognise_official_file(name, record):
    assert recognise([record])[0] == name


@pytest.mark.parametrize("records", [[], [{}], [{"foo": 1, "Bar": 2}], [{"messages": None}, {"text": 7}]])
def test_recognise_unknown_keys(records):
    with pytest.raises(UserError) as caught:
        recognise(records)
    keys = ", ".join(sorted({key for record in records for key in record})) or "(none)"
    assert f"{len(records)} records with the keys {keys} are of no known format" in str(caught.value)
    assert "formats: messages, svit, llava" in str(caught.value)


MISSING, UNKNOWN, COUNT = "missing field", "unknown content", "image count"
PAGE = "images and texts do not match"

REFUSED = [
    ("llava", {}, (MISSING, 'expected "conversations", got keys []')),
    ("llava", {"conversations": None, "id": 1},
     (MISSING, "expected \"conversations\", got keys ['conversations', 'id']")),
    ("llava", {"conversations": {"from": 1}}, (UNKNOWN, "\"conversations\": expected a list, got {'from': 1}")),
    ("llava", {"conversations": ["Who?"]}, (UNKNOWN, "\"conversations[0]\": expected an object, got 'Who?'")),
    ("llava", {"conversations": [None]}, (UNKNOWN, '"conversations[0]": expected an object, got None')),
    ("llava", {"conversations": [{"from": 7, "value": "x"}]}, (UNKNOWN, '"from": expected text, got 7')),
    ("llava", {"conversations": [{"from": "human"}]}, (MISSING, "expected \"value\", got keys ['from']")),
    ("llava", {"conversations": said("Who?", {"a": 7})},
     (UNKNOWN, '"value": expected text or a list of text and image parts, got {')),
    ("llava", {"conversations": said("Who?", "Me.", speakers=("human", "tool"))}, ("unknown role", "got 'tool'")),
    ("llava", {"conversations": said("Who?", "Me.", speakers=("gpt", "human"))},
     ("roles do not alternate", "assistant, user")),
    ("llava", {"conversations": []}, ("no turns", "")),
    ("llava", {"conversations": said(*TALK), "image": 7}, ("not an image reference", "got int")),
    ("llava", {"conversations": said(*TALK), "image": [None]}, ("not an image reference", "got nothing")),
    ("llava", {"conversations": said("<image> Who?", "Me.")}, (COUNT, "0 images for 1 <image> in the questions")),
    ("llava", {"conversations": said("<image><image>", "Me."), "image": "cat.jpg"}, (COUNT, "1 images for 2 <image>")),
    ("llava", {"conversations": said("<image>", "Me."), "image": ["cat.jpg", "dog.jpg"]},
     (COUNT, "2 images for 1 <image>")),
    ("llava", {"conversations": said(*TALK), "image": "cat.jpg", "images": ["dog.jpg"]},
     (COUNT, "got image and images")),
    ("svit", {"conversations": said(*TALK)}, ("no image name", "'image_id'")),
    ("svit", {"image_id": 7, "conversations": [{"content": said("Who?")}, {"content": said("Me.", speakers=("gpt",))}]},
     ("roles do not alternate", "got assistant")),
    ("svit", {"image_id": 7, "conversations": [{"content": said("Who?", "Me.")}, *said("Why?")]}, (MISSING, "content")),
    ("svit", {"image_id": 7, "conversations": [{"content": []}]}, ("no turns", "")),
    ("ultrachat", {"data": "Who?"}, (UNKNOWN, "\"data\": expected a list, got 'Who?'")),
    ("ultrachat", {"data": ["Who?", None]}, (UNKNOWN, '"data[1]": expected text, got None')),
    ("ultrachat", {"data": ["Who?", " "]}, ("empty answer", "turn 2")),
    ("lrv", {"image_id": 7, "question": "Who?"}, (MISSING, 'expected "answer"')),
    ("lrv", {"image_id": 7, "question": "How many?", "answer": {"n": 2}}, (UNKNOWN, '"answer": expected text, got')),
    ("m3it", {"instruction": "Who?", "image_base64_str": [7], "outputs": "Me."},
     (UNKNOWN, '"image_base64_str[0]": expected text')),
    ("m3it", {"instruction": "Who?", "image_base64_str": ["?"], "outputs": "Me."}, ("corrupt image", "")),
    ("m3it", {"instruction": "Who?", "inputs": [], "outputs": "Me."}, (UNKNOWN, '"inputs": expected text, got []')),
    ("mimic_it", {"instruction": "Who?", "answer": "Me.", "image_ids": [7]}, ("not an image reference", "got int")),
    ("mimic_it", {"instruction": "Who?", "answer": "Me.", "related": [7]},
     (UNKNOWN, '"related[0]": expected an object')),
    ("alpaca", {"instruction": "Who?", "output": "Me.", "system": 7}, (UNKNOWN, '"system": expected text, got 7')),
    ("spot_the_diff", {"img_id": "2019", "sentences": []}, ("empty answer", "turn 2")),
    ("spot_the_diff", {"img_id": "2019", "sentences": "It is gone."}, (UNKNOWN, '"sentences": expected a list')),
    ("cauldron", {"images": ["cat.jpg"], "texts": []}, ("no turns", "")),
    ("cauldron", {"images": ["cat.jpg"], "texts": [{"user": "Who?"}]}, (MISSING, 'expected "assistant"')),
    ("vqa", {"image_id": 7, "question": "What?"}, ("no answer", '"answers" or "multiple_choice_answer"')),
    ("vqa", {"image_id": 7, "question": "What?", "answers": []}, ("no answer", "")),
    ("vqa", {"image_id": 7, "question": "What?", "answers": [{"id": 1}]}, (MISSING, 'expected "answer"')),
    ("vqa", {"image_id": 7, "question": "What?", "answers": ["a", None]},
     (UNKNOWN, '"answers[1]": expected text, got None')),
    ("obelics", {"images": ["cat.jpg"], "texts": [None, "One."]}, (PAGE, "1 images, 2 texts")),
    ("obelics", {"images": ["cat.jpg"], "texts": ["One."]}, (PAGE, "position 0: expected one of the two, got both")),
    ("obelics", {"images": ["cat.jpg", None], "texts": [None, None]},
     (PAGE, "position 1: expected one of the two, got neither")),
    ("obelics", {"images": [None], "texts": [7]}, (UNKNOWN, '"texts[0]": expected text, got 7')),
    ("obelics", {"images": [OBELIX], "texts": [None]}, ("image is a URL", "obelix.jpg")),
    ("obelics", {"images": [], "texts": []}, ("empty document", "")),
    ("pairs", {"image": "cat.jpg"}, (MISSING, "expected one of text, caption, TEXT")),
    ("pairs", {"text": "A cat."}, (MISSING, "expected one of image, images, image_path")),
    ("pairs", {"image": "cat.jpg", "text": " \u200b\n"}, ("empty caption", "\"text\": expected words, got ' ")),
    ("pairs", {"image": "cat.jpg", "captions": ["", " "]}, ("empty caption", '"captions": expected words')),
    ("pairs", {"url": OBELIX, "caption": "A cat."}, ("image is a URL", "obelix.jpg")),
    ("pairs", {"image": "cat.jpg", "captions": []}, (UNKNOWN, '"captions": expected text, got []')),
    ("pairs", {"image": "cat.jpg", "sentences": [{"tokens": []}]}, (MISSING, 'expected "caption"')),
    ("text", {"text": 7}, (UNKNOWN, '"text": expected text, got 7')),
    ("text", {"text": "\n \n"}, ("empty document", "")),
    ("text", {"title": ["Gaul"], "text": "One."}, (UNKNOWN, '"title": expected text')),
    ("easy_vqa", {"image": None, "question": "Who?", "answer": "Me."}, (MISSING, 'expected "image"')),
    ("easy_vqa_captions", {"image": "cat.png", "questions": []}, (UNKNOWN, "got 'cat.png'")),
]  # fmt: skip


@by_hand(REFUSED)
def test_convert_refused_by_hand(name, record, expected, root):
    reason, detail = refusal(name, record, root)
    assert reason == expected[0]
    assert expected[1] in detail


KEYS = sorted({key for _, record, _ in [*CASES, *REFUSED] for key in record} | {"related", "kind", "questions"})
INNER = ("from", "value", "role", "content", "type", "text", "image", "user", "assistant", "answer", "raw", "caption")
INNER += ("instruction", "image_ids", "bytes", "path", "url", "question")
WORDS = st.sampled_from(
    ("human", "gpt", "user", "assistant", "cat.jpg", "7", "<image>", PNG64, "\ud800", "", "A.", "\0")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INNER) | WORDS, inner, max_size=3),
    max_leaves=12,
)


def places(value, above=()):
    """Where in a record something stands: the keys and indices that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from places(item, (*above, key))


@st.composite
def altered(draw, records):
    """A record with up to two of its values, however deep, replaced by any JSON."""
    record = deepcopy(draw(st.sampled_from(records)))
    for _ in range(draw(st.integers(0, 2))):
        *above, key = draw(st.sampled_from(list(places(record))))
        inner = record
        for step in above:
            inner = inner[step]
        inner[key] = draw(JSON)
    return record


class Watched:
    """An image root that remembers what it gave out."""

    def __init__(self, root):
        self.root, self.source, self.given = root, root.source, []

    def image(self, reference):
        if isinstance(reference, Image):
            return reference  # given out before
        return self._give(self.root.image(reference))

    def base64(self, text):
        return self._give(self.root.base64(text))

    def named(self, record, default):
        return self._give(self.root.named(record, default))

    def _give(self, image):
        self.given.append(image)
        return image


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_convert_any_json(name, root, data):
    """Any JSON is a dialogue or refused, and no image is lost."""
    records = [record for case, record, _ in CASES if case == name] or [record for _, record, _ in CASES]
    record = data.draw(altered(records) | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5))
    assert all(family.fits(record) in (True, False) for family in FORMATS.values())
    watched = Watched(root)
    try:
        dialogue = FORMATS[name].convert(record, watched)
    except RecordError:
        return
    assert isinstance(dialogue, Dialogue)
    if name == "mimic_it":  # shows an image once for several questions
        assert set(watched.given) == set(dialogue.images)
    elif not name.startswith("easy_vqa"):  # its package names the files
        assert Counter(watched.given) == Counter(dialogue.images)


def test_format_properties():
    def those(wanted):
        return {name for name, family in FORMATS.items() if wanted(family)}

    assert those(lambda family: not family.ordered) == {"m3it", "cauldron", "vqa", "lrv", "easy_vqa"}
    assert those(lambda family: family.documents) == set(DOCUMENTS)
    assert those(lambda family: family.captions) == set(CAPTIONS)
    assert set(DOCUMENTS) == {*("obelics", "pairs", "image_folder", "class_folders", "text", "easy_vqa_captions")}
    assert need_end_of_utterance([make_source("text"), make_source("lrv")])
    assert not need_end_of_utterance([make_source("text"), make_source("pairs")])
    assert need_end_of_utterance([make_source("text"), make_source("pairs", prompt=("What is it?",))])


def test_add_format(tmp_path, tiny_tokenizer, monkeypatch):
    """The format in the package's docstring, added as it says there, prepares a dataset."""
    monkeypatch.setitem(FORMATS, "riddle", None)  # removed again after the test
    example = "\n".join(line for line in formats.__doc__.splitlines() if not line or line.startswith("    "))
    exec(textwrap.dedent(example), {**vars(formats)})
    (tmp_path / "cat.png").write_bytes(PICTURE)
    records = [
        {"picture": "cat.png", "asked": "Who is in <image>?", "answered": "A cat."},
        {"picture": "cat.png", "asked": "How many?", "answered": 1, "who": "nobody reads this"},
        {"picture": "cat.png", "asked": "Why?"},
    ]
    (tmp_path / "riddles.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = resolve_source(make_source("auto", tmp_path / "riddles.jsonl"))
    assert source.format == "riddle"
    prepared, (stats,) = prepare(
        [source], tiny_tokenizer, max_length=100, max_images=2, seed=0, folder=tmp_path / "made"
    )
    image = Image((tmp_path / "cat.png").resolve())
    assert list(prepared.dialogues) == [
        Dialogue((user("Who is in ", image, "?"), assistant("A cat."))),
        Dialogue((user(image, "How many?"), assistant("1"))),
    ]
    assert stats.rejected == {"missing field": 1}
    assert stats.ignored == {"who": 1}
