"""Where a placeholder in a text puts an image of its record, in every format; and what is rejected, by its name."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.formats import FORMATS
from finetune.data.formats.placeholders import hide, kinds_in
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import read_dialogues
from finetune.data.stats import SourceStats

PNG = b"\x89PNG\r\n\x1a\n..."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images").resolve()
    for name in ("a.png", "b.png", "7.jpg"):
        (folder / name).write_bytes(PNG)
    return folder


def convert(name, record, folder):
    """The dialogue, its images by their names."""
    dialogue = FORMATS[name].convert(record, ImageRoot(make_source(name, image_root=(folder,))))
    return named(dialogue)


def named(dialogue):
    return Dialogue(
        tuple(
            Turn(turn.role, tuple(name_of(part) for part in turn.parts), turn.references, turn.supervised)
            for turn in dialogue.turns
        ),
        ignored=dialogue.ignored,
    )


def name_of(part):
    return Image(Path(part.source.name)) if isinstance(part, Image) and isinstance(part.source, Path) else part


A, B, SEVEN = (Image(Path(name)) for name in ("a.png", "b.png", "7.jpg"))
BOTH = ["a.png", "b.png"]


def asked(*questions, key="content", speakers=("role", "user", "assistant")):
    """Questions, each answered "Yes."."""
    role, asks, answers = speakers
    return [said for text in questions for said in ({role: asks, key: text}, {role: answers, key: "Yes."})]


def talk(*questions):
    """The dialogue of these questions, each as its parts."""
    turns = [turn for parts in questions for turn in (user(*parts), assistant("Yes."))]
    return Dialogue(tuple(turns))


SHAREGPT = {"key": "value", "speakers": ("from", "human", "gpt")}

PLACED = [
    ("messages", {"messages": asked("<image>Which?", "<image>And?"), "images": BOTH}, talk((A, "Which?"), (B, "And?"))),
    ("messages", {"messages": asked("In <image> or <image>?"), "images": BOTH}, talk(("In ", A, " or ", B, "?"))),
    ("messages", {"messages": asked("Which?", "And <image>\n"), "images": ["b.png"]}, talk(("Which?",), ("And ", B))),
    ("messages", {"image": "a.png", "messages": asked("Which?\n<image>")}, talk(("Which?\n", A))),
    ("messages", {"messages": asked("<image>", "So?"), "image": "a.png"}, talk((A,), ("So?",))),
    ("messages", {"messages": asked([{"type": "text", "text": "In <image>?"}]), "images": ["a.png"]},
     talk(("In ", A, "?"))),
    # image parts without a file and placeholders, in the order in which they stand
    ("messages", {"messages": asked([{"type": "image"}, {"type": "text", "text": "Which?"}], "And <image>"),
                  "images": BOTH}, talk((A, "Which?"), ("And ", B))),
    ("messages", {"messages": asked("<image>Which?", [{"type": "text", "text": "And?"}, {"type": "image"}]),
                  "images": BOTH}, talk((A, "Which?"), ("And?", B))),
    ("messages", {"messages": asked([{"type": "image", "index": 1}, {"type": "image", "index": 0},
                                     {"type": "text", "text": "Which?", "index": None}]), "images": BOTH},
     talk((B, A, "Which?"))),
    # an image part and the placeholder right beside it are one image
    ("messages", {"messages": asked([{"type": "image", "path": "a.png"}, {"type": "text", "text": "<image>\nWhich?"}])},
     talk((A, "\nWhich?"))),
    ("messages", {"messages": asked([{"type": "image"}, {"type": "text", "text": "<image>Which?"}]), "images": "b.png"},
     talk((B, "Which?"))),
    # images of one message
    ("messages", {"messages": [*asked("Hello."), {"role": "user", "content": "In <image>?", "images": ["b.png"]},
                               {"role": "assistant", "content": "Yes."}]}, talk(("Hello.",), ("In ", B, "?"))),
    ("sharegpt", {"conversations": asked("Which <image>?", "<image>", **SHAREGPT), "images": BOTH},
     talk(("Which ", A, "?"), (B,))),
    ("llava", {"conversations": asked("<image>Which?", "<image>And?"), "images": BOTH},
     talk((A, "Which?"), (B, "And?"))),
    ("svit", {"image_id": 7, "conversations": asked("Which?", "And <image>?", **SHAREGPT)},
     talk(("Which?",), ("And ", SEVEN, "?"))),
    ("alpaca", {"instruction": "Compare.", "input": "<image> and <image>", "output": "Yes.", "images": BOTH},
     talk(("Compare.\n", A, " and ", B))),
    ("alpaca", {"instruction": "<image>And?", "output": "Yes.", "history": [["<image>Which?", "Yes."]], "images": BOTH},
     talk((A, "Which?"), (B, "And?"))),
    ("m3it", {"instruction": "Look at it.", "inputs": "In <image>?", "outputs": "Yes.", "image": "b.png"},
     talk(("Look at it.\nIn ", B, "?"))),
    ("lrv", {"question": "Is <image> red?", "answer": "Yes.", "image_id": 7}, talk(("Is ", SEVEN, " red?"))),
    ("cauldron", {"images": BOTH, "texts": [{"user": "In <image>?", "assistant": "Yes."},
                                            {"user": "In <image>?", "assistant": "Yes."}]},
     talk(("In ", A, "?"), ("In ", B, "?"))),
    ("mimic_it", {"instruction": "In <image> or <image>?", "answer": "Yes.", "image_ids": BOTH,
                  "related": [{"instruction": "In <image>?", "answer": "Yes.", "image_ids": ["a.png"]}]},
     talk(("In ", A, "?"), ("In ", A, " or ", B, "?"))),
]  # fmt: skip


def by_hand(cases):
    return pytest.mark.parametrize(
        ("name", "record", "expected"), cases, ids=[f"{case[0]}-{index}" for index, case in enumerate(cases)]
    )


@by_hand(PLACED)
def test_placeholder_places(name, record, expected, folder):
    dialogue = convert(name, record, folder)
    assert dialogue == expected
    assert dialogue.ignored == ()


@pytest.mark.parametrize(
    "written",
    [
        *("<image>", "<Image>", "<IMAGE>", "<image/>", "< image >", "<images>", "<|image|>", "<|image_pad|>", "<img>"),
        *("<Img>", "[IMG]", "[IMAGE]", "<ImageHere>", "<image_here>", "<Img><ImageHere></Img>", "<image>./</image>"),
        *("<IMG_CONTEXT>", "<image_placeholder>", "<image_soft_token>", "<start_of_image>", "<image_token>"),
        *("<image_1>", "<image 1>", "<image1>", "<|image_1|>", "<img_1>", "<image_00>", "[IMG1]", "<image-1>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<fake_token_around_image><image><fake_token_around_image>",
    ],
)
def test_placeholder_spellings(written, folder):
    record = {"messages": asked(f"In {written}?"), "images": ["a.png"]}
    assert convert("messages", record, folder) == talk(("In ", A, "?"))
    with pytest.raises(RecordError, match=r"^image count: 0 images for 1 "):
        convert("messages", {"messages": asked(f"In {written}?")}, folder)


def test_placeholder_numbered(folder):
    record = {"messages": asked("<image_2> or <image_1>?", "And <image_2>?"), "images": BOTH}
    assert convert("messages", record, folder) == talk((B, " or ", A, "?"), ("And ", B, "?"))
    from_zero = {"messages": asked("<image_1> or <image_0>?"), "images": BOTH}
    assert convert("messages", from_zero, folder) == talk((B, " or ", A, "?"))


def test_placeholder_with_file_name(folder):
    record = {"messages": asked("Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nWhich?")}
    assert convert("messages", record, folder) == talk(("Picture 1: ", A, "\nPicture 2: ", B, "\nWhich?"))
    with pytest.raises(RecordError, match=r"^image outside the image root: "):
        convert("messages", {"messages": asked("<img>../secret.png</img>")}, folder)


COUNT = [
    ({"messages": asked("<image><image>Compare."), "images": ["a.png"]}, "1 images for 2 <image> in the questions"),
    ({"messages": asked("<image>Which?"), "images": BOTH}, "2 images for 1 <image> in the questions"),
    ({"messages": asked("<image>Which?")}, "0 images for 1 <image> in the questions; `placeholders: text` keeps them"),
    ({"messages": asked("Which?", "<|image|>And?")}, "0 images for 1 <|image|> in the questions"),
    ({"messages": asked("<image_1> or <image_3>?"), "images": BOTH}, "2 images for 2 <image_1>"),
    ({"messages": asked("<image_1> or <image>?"), "images": BOTH}, "2 images for 2 <image_1>"),
    ({"messages": asked([{"type": "image", "image": "a.png"}], "<image>And?")}, "0 images for 1 <image>"),
    ({"messages": asked([{"type": "image", "image": "a.png"}]), "images": ["b.png"]}, "1 images listed beside others"),
    ({"messages": asked([{"type": "image"}, {"type": "text", "text": "<image> <image>"}]), "images": BOTH},
     "2 images for 3 <image>"),
    ({"messages": [*asked("Which?"), {"role": "user", "content": "<image><image>", "images": ["a.png"]}]},
     "1 images for 2 <image>"),
    ({"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes.", "image": "a.png"}]},
     "1 images listed in a assistant message"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "detail"), COUNT, ids=range(len(COUNT)))
def test_placeholder_count(record, detail, folder):
    with pytest.raises(RecordError) as caught:
        convert("messages", record, folder)
    assert caught.value.reason == "image count"
    assert caught.value.detail.startswith(detail)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("sharegpt", {"conversations": asked("<image>\nWhich?", **SHAREGPT)}),
        ("ultrachat", {"data": ["What is in <image>?", "A cat."]}),
        ("alpaca", {"instruction": "<image>Which?", "input": "", "output": "Yes."}),
        ("cauldron", {"images": [], "texts": [{"user": "<image>Which?", "assistant": "Yes."}]}),
        ("m3it", {"instruction": "<image>Which?", "outputs": "Yes."}),
        ("mimic_it", {"instruction": "<image>Which?", "answer": "Yes."}),
    ],
)
def test_placeholder_without_image(name, record, folder):
    with pytest.raises(RecordError, match=r"^image count: 0 images for 1 <image>"):
        convert(name, record, folder)


@pytest.mark.parametrize(
    ("reason", "written"),
    [
        *(("video", text) for text in ("<video>", "<|video_pad|>", "<video>v.mp4</video>", "<VideoHere>", "<video_1>")),
        *(("audio", text) for text in ("<audio>", "<|AUDIO|>", "<audio>a.wav</audio>", "<speech>")),
        *(("grounding", text) for text in ("<bbox>", "<ref-object>")),
    ],
)
def test_placeholder_of_other_media(reason, written, folder):
    for images in ([], ["a.png"]):
        with pytest.raises(RecordError) as caught:
            convert("messages", {"messages": asked(f"In {written}?"), "images": images}, folder)
        assert (caught.value.reason, caught.value.detail) == (reason, f"{written}: only images can be shown")


def test_placeholder_in_answer(folder):
    said = [{"role": "system", "content": "No <video>."}, {"role": "user", "content": "Which tag?"}]
    record = {"messages": [*said, {"role": "assistant", "content": "It is <image>."}], "images": ["a.png"]}
    dialogue = convert("messages", record, folder)
    assert dialogue == Dialogue((Turn("system", ("No <video>.",)), user(A, "Which tag?"), assistant("It is <image>.")))
    assert dialogue.ignored == ("<video> as text", "<image> as text")


def test_placeholder_beside_own_image(folder):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Is <image> a tag?"}]
    dialogue = convert("messages", {"messages": asked(parts)}, folder)
    assert dialogue == talk((A, "Is <image> a tag?"))
    assert dialogue.ignored == ("<image> as text",)


@pytest.mark.parametrize("text", ['<img src="a.png">', "</image>", "<imagery>", "a < image", "[img]", "<p>", "<<>>"])
def test_no_placeholder(text, folder):
    assert kinds_in(text) == []
    assert convert("messages", {"messages": asked(text)}, folder) == talk((text,))


def test_placeholders_as_text(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "Is <image> or [IMG] a tag?"},'
        ' {"from": "gpt", "value": "<image> is, and <video>v</video>."}], "image": "a.png"}\n'
    )
    source = make_source("llava", (tmp_path / "data.jsonl",), image_root=(folder,), placeholders="text")
    stats = SourceStats("tags")
    ((_, (dialogue,)),) = read_dialogues(source, stats)
    assert named(dialogue) == Dialogue(
        (user(A, "Is <image> or [IMG] a tag?"), assistant("<image> is, and <video>v</video>."))
    )
    assert (stats.rejected, stats.ignored) == ({}, {})


TOKENS = ("<image>", "<|image|>", "[IMG]", "a", " ", "\n", "<", "<b>", "</p>", "<img>")


@given(
    st.lists(st.lists(st.sampled_from(TOKENS), max_size=6).map("".join), min_size=1, max_size=3),
    st.lists(st.sampled_from(("a.png", "b.png", "7.jpg")), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_placeholders_in_order(folder, questions, images):
    """All placeholders become images in their order, or the record is rejected."""
    try:
        dialogue = convert("messages", {"messages": asked(*questions), "images": images}, folder)
    except RecordError:
        return
    assert [name_of(image).source.name for image in dialogue.images] == images
    assert [kind for turn in dialogue.turns for kind in kinds_in(turn.text)] == []
    written = [len(kinds_in(question)) for question in questions]
    shown = [len(turn.images) for turn in dialogue.turns[::2]]
    assert shown == (written if any(written) else [len(images), *[0] * (len(questions) - 1)])


def test_placeholder_linear_time():
    """A text of a few megabytes that could make a careless pattern search for hours."""
    for text in ("<" * 10**6, "<img>" + " " * 10**6, "<fake_token_around_image>" * 10**5, "<image" + "\n" * 10**6):
        assert len(kinds_in(text)) <= 1
        assert hide({"text": [text]})["text"][0].replace("\ufdd0", "") == text
