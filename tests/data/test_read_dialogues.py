"""Records -> dialogues: check, prepare and streams take and reject the same ones, for the same reasons."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source
from streamed import reader_of

from finetune.data.chat_template import render
from finetune.data.chunking import Limits, splitter
from finetune.data.conversation import Dialogue, Image, RecordError, assistant, user
from finetune.data.io.image_roots import ImageRoot
from finetune.data.prepare import prepare
from finetune.data.read_dialogues import to_dialogue
from finetune.data.stream_sources import Place
from finetune.data.tokenize import Encoder, tokenize, tokenize_all
from finetune.planning.check import _encoder, first_records
from finetune.recipe.schema import Recipe
from modeling.loading import load_processor

MAX_LENGTH, MAX_IMAGES = 100, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, one of them twice, a file that is none, and an empty one."""
    made = tmp_path_factory.mktemp("records")
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        PIL.Image.new("RGB", (8, 8), color).save(made / f"{name}.bmp")
    (made / "same.bmp").write_bytes((made / "a.bmp").read_bytes())
    (made / "broken.bmp").write_bytes((made / "a.bmp").read_bytes()[:40])
    (made / "empty.bmp").write_bytes(b"")
    return made


def said(*images, question="Who?", answer="Me.", **more):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer, **more}]}


def twice(first, second):
    return {"messages": [*first["messages"], *second["messages"]]}


DIALOGUES = [
    said("a.bmp"),
    said("same.bmp", question="And?"),
    said("a.bmp", "same.bmp", "b.bmp", question="Alike?"),
    said("a.bmp", "b.bmp", "c.bmp", question="Alike?"),
    twice(said("a.bmp"), said(question="Why?" * 60)),
    twice(said("a.bmp"), said("b.bmp", question="And?")),
    said("a.bmp", answer="Me. " * 60),
    said("none.bmp"),
    said("b.bmp", "broken.bmp"),
    said("empty.bmp"),
    said("../a.bmp"),
    said(answer=" "),
    said(answer="\u200b"),
    said(weight=0),
    {"messages": [{"role": "user", "content": "Who?"}]},
    {"messages": [{"role": "tool", "content": "42"}]},
    {"text": "Who?"},
    '{"messages": [',
    "[]",
]

PAGES = [
    {"images": ["a.bmp", None], "texts": [None, "One."]},
    {"images": ["a.bmp", None, "none.bmp", None], "texts": [None, "One.", None, "Two."]},
    {"images": ["broken.bmp", None, "b.bmp", None, None], "texts": [None, "One.", None, "Two.", "Three. " * 60]},
    {"images": ["broken.bmp", "empty.bmp", None], "texts": [None, None, "One."]},
    {"images": ["a.bmp", "b.bmp", "c.bmp", None], "texts": [None, None, None, "One."]},
    {"images": ["a.bmp", "b.bmp"], "texts": [None, None]},
    {"images": ["a.bmp", None], "texts": [None, " \u200b"]},
    {"images": [None], "texts": ["Some. " * 90]},
    {"images": [None], "texts": ["One.\n\nTwo."]},
    {"images": ["a.bmp"], "texts": ["One."]},
    "{",
]

CAPTIONS = [
    {"image": "a.bmp", "text": "Red."},
    {"image": "b.bmp", "caption": "Green. " * 60},
    {"image": "none.bmp", "text": "None."},
    {"image": "broken.bmp", "text": "Broken."},
    {"image": "c.bmp", "text": "\t"},
    {"image": "c.bmp"},
]


def recipe_of(base="unused", **data):
    sections = {"model": {"base": str(base)}, "training": {"steps": 1, "row_tokens": 200, "row_images": MAX_IMAGES}}
    return Recipe.model_validate(
        {**sections, "data": {"sources": [{"path": "x"}], "max_length": MAX_LENGTH, **data}, "output": "x"}
    )


FACTS = ("read", "rejected", "parts_rejected", "first_rejected", "ignored", "broken")


@given(
    st.sampled_from((("messages", DIALOGUES), ("obelics", PAGES), ("pairs", CAPTIONS))).flatmap(
        lambda kind: st.tuples(st.just(kind[0]), st.lists(st.sampled_from(kind[1]), min_size=1, max_size=12))
    ),
    st.integers(1, 12),
    st.sampled_from((None, 1, 3)),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_check_counts_of_the_first_records_what_prepare_counts(folder, tiny_tokenizer, kind, limit, turns, asked):
    name, records = kind
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    prompt = ("What is it?", "What?") if asked and name == "pairs" else ()
    source = make_source(name, paths=(path,), limit=limit, turns=turns, prompt=prompt)
    with TemporaryDirectory() as made:
        settings = {"max_length": MAX_LENGTH, "max_images": MAX_IMAGES, "seed": 0, "folder": Path(made)}
        _, (stats,) = prepare([source], tiny_tokenizer, **settings)
    report, _ = first_records(source, recipe_of(), Encoder(tiny_tokenizer))
    assert report["usable"] == stats.kept
    assert {fact: report[fact] for fact in FACTS} == {fact: getattr(stats, fact) for fact in FACTS}


def test_streams_reject_what_prepare_rejects_before_images_are_opened(folder, tiny_tokenizer):
    records = [line for line in DIALOGUES if not any(name in json.dumps(line) for name in ("none", "broken", "empty"))]
    path = folder / "stream.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    source = make_source("messages", paths=(path,), stream=True)
    how = splitter(source, Encoder(tiny_tokenizer), Limits(MAX_LENGTH, MAX_IMAGES + 1), seed=0)
    counted = next(coming.stats for coming in reader_of(source, how).read(0, Place()) if coming.drawn.epoch == 1)
    with TemporaryDirectory() as made:
        settings = {"max_length": MAX_LENGTH, "max_images": MAX_IMAGES + 1, "seed": 0, "folder": Path(made)}
        _, (stats,) = prepare([source], tiny_tokenizer, **settings)
    assert counted.rejected == stats.rejected
    assert (counted.read, counted.kept) == (stats.read, stats.kept) == (16, 5)


def test_lengths_by_the_tokenizer_s_file_are_those_of_transformers(base_folder):
    encoder = _encoder(recipe_of(base_folder))
    tokenizer = load_processor(str(base_folder), instruct=True).tokenizer
    dialogue = Dialogue((user("What is it?"), assistant("A small dog."), user("é?"), assistant("No.")))
    own, (example,) = tokenize(render(dialogue), tokenizer), tokenize_all([render(dialogue)], encoder)
    end = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert [end if id != own.input_ids[place] else id for place, id in enumerate(example.input_ids)] == [*own.input_ids]
    assert (own.labels == -100).tolist() == (example.labels == -100).tolist()


def test_no_length_is_checked_without_a_tokenizer_at_hand(folder, tmp_path):
    assert _encoder(recipe_of(tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    assert _encoder(recipe_of(tmp_path)) is None
    (folder / "long.jsonl").write_text(json.dumps(said(answer="Me. " * 900)))
    report, _ = first_records(make_source("messages", paths=(folder / "long.jsonl",)), recipe_of(), None)
    assert (report["usable"], report["length_checked"]) == (1, False)


@pytest.fixture
def captions(folder):
    def source(*prompt):
        return make_source("pairs", paths=(folder,), prompt=prompt)

    return source


def test_prompt_makes_a_dialogue_of_a_caption(captions, folder):
    picture = Image(folder.resolve() / "a.bmp")
    record = {"image": "a.bmp", "text": "Red."}
    dialogue = to_dialogue("d:1", record, ImageRoot(captions("What is it?")))
    assert dialogue == Dialogue((user(picture, "What is it?"), assistant("Red.")))
    assert to_dialogue("d:1", record, ImageRoot(captions())).is_document


def test_prompts_are_drawn_by_place_and_seed(captions):
    def drawn(seed):
        root = ImageRoot(captions("One?", "Two?", "Three?"))
        record = {"image": "a.bmp", "text": "Red."}
        return [to_dialogue(f"d:{n}", record, root, seed=seed).turns[0].text for n in range(300)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0)[:6] == ["Two?", "Two?", "Three?", "Two?", "Three?", "Three?"]
    assert all(70 < drawn(0).count(prompt) < 130 for prompt in ("One?", "Two?", "Three?"))


@pytest.mark.parametrize("blank", ["", " \n", "\u200b", "\ufeff\u2060", "\x00\x07"])
def test_blank_captions_and_texts_are_rejected_by_name(captions, folder, blank):
    for prompt in ((), ("What is it?",)):
        with pytest.raises(RecordError, match="empty caption"):
            to_dialogue("d:1", {"image": "a.bmp", "text": blank}, ImageRoot(captions(*prompt)))
    page = {"images": ["a.bmp", None], "texts": [None, blank]}
    for name, record in (("obelics", page), ("text", {"text": blank})):
        with pytest.raises(RecordError, match="empty document"):
            to_dialogue("d:1", record, ImageRoot(make_source(name, paths=(folder,))))
