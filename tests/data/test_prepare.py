"""Every record accounted for, every image token with its image; a set made once, and anew when anything changed."""

import base64
import itertools
import json
import multiprocessing
import os
import shutil
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data import chunking, join_questions, prepare_shards, shards
from finetune.data import prepare as module
from finetune.data import stale_images as changes
from finetune.data.arrow import ArrowFile, DamagedError, to_batches, write_arrow
from finetune.data.chat_template import render
from finetune.data.chunking import Limits, splitter
from finetune.data.conversation import Image, RecordError, Slice, as_unicode
from finetune.data.eval_split import split_by_image
from finetune.data.formats import FORMATS
from finetune.data.images import open_image
from finetune.data.prepare import prepare, prepare_share, prepare_source, require_examples
from finetune.data.prepared import EXAMPLE_SCHEMA, IMAGE_SCHEMA, Prepared, PreparedSet
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder
from modeling.errors import UserError
from modeling.tokens import IGNORED

COLORS = {"a": "red", "b": "green", "c": "blue"}
PICTURE = "<fake_token_around_image><image><fake_token_around_image>"


def record(*images, question="Who?", answer="Me."):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def talk(*images, count, answers=None):
    """`count` questions about the images, which stand in front of the first."""
    messages = record(*images, question="0?", answer="0!")["messages"]
    for number in range(1, count):
        messages += record(question=f"{number}?", answer=f"{number}!")["messages"]
    for number, answer in (answers or {}).items():
        messages[2 * number + 1]["content"] = answer
    return {"messages": messages}


def draw(folder):
    """Four readable images, two of them with the same content, all of the same size, and two broken ones."""
    folder.mkdir(exist_ok=True)
    for name, color in COLORS.items():
        PIL.Image.new("RGB", (8, 8), color).save(folder / f"{name}.bmp")
    (folder / "same-as-a.bmp").write_bytes((folder / "a.bmp").read_bytes())
    (folder / "broken.bmp").write_bytes((folder / "a.bmp").read_bytes()[:40])
    (folder / "empty.bmp").write_bytes(b"")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def folder(tmp_path):
    return draw(tmp_path / "data")


def write(folder, records):
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


@contextmanager
def parts_of(records):
    """A part for every so many records, of a small file too."""
    with (
        mock.patch.object(shards, "BLOCK", records),
        mock.patch.object(shards, "LEAST_BYTES", 1),
        mock.patch.object(join_questions, "PART_DIALOGUES", records),
    ):
        yield


def run(folder, tokenizer, records=None, *, max_length=200, max_images=2, seed=0, workers=1, made=None, **source):
    """(prepared, its stats); sets are kept in `made`, or in a folder beside the data."""
    path = write(folder, records) if records is not None else folder / "data.jsonl"
    prepared, (stats,) = prepare(
        [make_source("messages", (path,), **source)],
        tokenizer,
        max_length=max_length,
        max_images=max_images,
        seed=seed,
        folder=made or folder.parent / "made",
        workers=workers,
    )
    return prepared, stats


def texts(prepared):
    return [render(dialogue).text for dialogue in prepared.dialogues]


KINDS = {
    "good": (record("a.bmp"), None),
    "good, no image": (record(), None),
    "good, the same content": (record("same-as-a.bmp", "a.bmp", "b.bmp", question="Same?"), None),
    "good, the same image alone": (record("same-as-a.bmp", question="Is it <image></s>?", answer="<s>No."), None),
    "good, several turns": (talk("b.bmp", count=4), None),
    "good, no words": (record("b.bmp", question=""), None),
    "good, the image late": ({"messages": [*record()["messages"], *record("c.bmp")["messages"]]}, None),
    "too long": (record(question="Who? " * 60), "too long"),
    "too long, about an image": (record("a.bmp", answer="Me. " * 60), "too long"),
    "too many images": (record("a.bmp", "b.bmp", "c.bmp"), "too many images"),
    "missing image": (record("none.bmp"), "missing image"),
    "corrupt image": (record("broken.bmp"), "corrupt image"),
    "empty image": (record("b.bmp", "empty.bmp"), "corrupt image"),
    "outside": (record("../a.bmp"), "image outside the image root"),
    "URL": (record("https://example.org/a.bmp"), "image is a URL"),
    "empty answer": (record(answer=" "), "empty answer"),
    "prompt": ({"messages": [{"role": "user", "content": "Who?"}]}, "no answer to the last question"),
    "broken line": ('{"messages": [', "not JSON"),
    "list": ("[]", "not an object"),
    "no messages": ({"text": "Who?"}, "no messages"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_reason_is_counted_with_the_place_of_the_first(kind, folder, tiny_tokenizer):
    line, reason = KINDS[kind]
    with parts_of(2):
        prepared, stats = run(folder, tiny_tokenizer, [record("a.bmp"), line, line])
    assert stats.read == 3
    assert stats.rejected == ({reason: 2} if reason else {})
    assert stats.kept == len(prepared) == (1 if reason else 3)
    assert list(stats.first_rejected) == list(stats.rejected)
    for place in stats.first_rejected.values():
        assert place.removeprefix(str(folder)).lstrip("/").startswith("data.jsonl:2")


def said(messages):
    """The (question, answer) pairs of a record, as texts."""
    turns = [part["content"] if isinstance(part["content"], str) else part["content"][-1]["text"] for part in messages]
    return list(zip(turns[::2], turns[1::2], strict=True))


@given(
    st.lists(st.sampled_from(sorted(KINDS)), max_size=12),
    st.none() | st.integers(1, 12),
    st.sampled_from((None, 1, 3)),
    st.sampled_from((None, False, True)),
)
@settings(max_examples=60, deadline=None)
def test_read_is_kept_and_rejected(pictures, tiny_tokenizer, kinds, limit, turns, ordered):
    lines = [KINDS[kind][0] for kind in kinds]
    with TemporaryDirectory() as made, parts_of(3):
        prepared, stats = run(
            pictures, tiny_tokenizer, lines, limit=limit, turns=turns, ordered=ordered, made=Path(made)
        )
        taken = [KINDS[kind][1] for kind in kinds[:limit]]
        assert stats.read == len(taken)
        assert stats.limited == (limit is not None and limit <= len(kinds))
        assert stats.kept == taken.count(None)
        assert stats.rejected == Counter(reason for reason in taken if reason)
        assert stats.read == stats.kept + sum(stats.rejected.values())
        assert stats.parts_rejected == {}
        assert SourceStats.from_json(json.loads(json.dumps(stats.to_json()))) == stats
        check_examples(prepared, stats, tiny_tokenizer, turns)
        asked = [
            pair
            for line, reason in zip(lines[:limit], taken, strict=True)
            if not reason
            for pair in said(line["messages"])
        ]
        trained = [
            (dialogue.turns[index].text, dialogue.turns[index + 1].text)
            for dialogue in prepared.dialogues
            for index in range(0, len(dialogue.turns), 2)
        ]
        assert sorted(trained) == sorted(asked)


def check_examples(prepared, stats, tokenizer, turns):
    image, fake = tokenizer.convert_tokens_to_ids(["<image>", "<fake_token_around_image>"])
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    for index, (example, dialogue) in enumerate(zip(prepared.examples, prepared.dialogues, strict=True)):
        ids = example.input_ids.tolist()
        assert ids.count(image) == len(dialogue.images) == len(prepared.image_ids[index])
        assert ids.count(fake) == sum(name == "<fake_token_around_image>" for name in specials(dialogue))
        assert (ids.count(bos), ids.count(eos)) == (1, 1)
        assert len(ids) == prepared.lengths[index] <= 200
        assert len(set(prepared.image_ids[index])) == prepared.image_counts[index] <= 2
        assert example.supervised > 0
        assert turns is None or len(dialogue.turns) <= 2 * turns
    assert stats.examples == len(prepared)
    assert stats.tokens == prepared.lengths.sum()
    assert stats.supervised_tokens == sum(example.supervised for example in prepared.examples)
    assert stats.images == len({image for ids in prepared.image_ids for image in ids})


def specials(dialogue):
    return [piece.name for piece in render(dialogue).pieces if hasattr(piece, "name")]


def test_what_is_counted_of_what_is_kept(folder, tiny_tokenizer):
    good = [record("a.bmp"), record("same-as-a.bmp", "b.bmp"), record()]
    bad = [record("none.bmp"), "[]", KINDS["too long"][0], record("c.bmp", "none.bmp")]
    _, stats = run(folder, tiny_tokenizer, good + bad, turns=1, ordered=False)
    assert (stats.read, stats.kept, stats.dialogues, stats.examples, stats.images) == (7, 3, 4, 3, 2)
    assert stats.loss == "4 of 7 records rejected: missing image 2, not an object 1, too long 1"
    assert stats.first_rejected == {
        "missing image": f"data.jsonl:4: {folder / 'none.bmp'}: No such file or directory",
        "not an object": "data.jsonl:5: expected a JSON object, got list",
        "too long": stats.first_rejected["too long"],
    }
    assert stats.source == f"{folder / 'data.jsonl'}[train]"


def test_the_first_of_a_reason_is_the_earliest_whatever_found_it(folder, tiny_tokenizer):
    """BrokenFileError base64 is found while converting, a broken file when it is opened."""
    _, stats = run(folder, tiny_tokenizer, [record("broken.bmp"), record("data:image/png;base64,!"), record()])
    assert stats.rejected == {"corrupt image": 2}
    assert stats.first_rejected["corrupt image"].startswith("data.jsonl:1: ")


def test_one_exchange_too_long_is_a_part_of_a_record_that_is_kept(folder, tiny_tokenizer):
    long = talk("a.bmp", count=4, answers={2: "no " * 200})
    prepared, stats = run(folder, tiny_tokenizer, [long], turns=4)
    assert (stats.read, stats.kept, stats.rejected, stats.parts_rejected) == (1, 1, {}, {"too long": 1})
    assert stats.loss == "parts of kept records left out: too long 1"
    assert [turn.text for dialogue in prepared.dialogues for turn in dialogue.turns] == [
        *("0?", "0!", "1?", "1!"),
        *("3?", "3!"),
    ]
    assert list(prepared.image_ids) == [(0,), (0,)]
    whole, stats = run(folder, tiny_tokenizer, [long])
    assert (len(whole), stats.rejected, stats.parts_rejected) == (0, {"too long": 1}, {})


def test_weight_of_an_answer_reaches_labels_questions_and_parts(folder, tiny_tokenizer):
    long = talk("a.bmp", count=3)
    long["messages"][1]["weight"] = 0
    long["score"] = 7
    whole, stats = run(folder, tiny_tokenizer, [long])
    (example,), (dialogue,) = whole.examples, whole.dialogues
    trained = tiny_tokenizer.decode(example.input_ids[example.labels != IGNORED])
    assert trained == "1!<end_of_utterance> 2!<end_of_utterance>"
    assert [turn.supervised for turn in dialogue.turns] == [True, False, True, True, True, True]
    assert [references for _, references in dialogue.prompts()] == [("1!",), ("2!",)]
    assert stats.ignored == {"score": 1}
    assert stats.loss == "not used of records: score 1"
    parts, stats = run(folder, tiny_tokenizer, [long], turns=1)
    assert texts(parts) == [text for text in texts(parts) if "0!" not in text]
    assert (len(parts), stats.kept, stats.parts_rejected) == (2, 1, {"nothing supervised": 1})


def test_images_of_equal_content_are_one(folder, tiny_tokenizer):
    records = [record("a.bmp"), record("same-as-a.bmp", "b.bmp", "a.bmp"), record(), record("b.bmp")]
    for size in (1, 2, 512):
        with parts_of(size):
            prepared, _ = run(folder, tiny_tokenizer, records, made=folder / f"made-{size}")
        a, b = prepared.image_ids[0][0], prepared.image_ids[3][0]
        assert list(prepared.image_ids) == [(a,), (a, b, a), (), (b,)]
        assert a != b
        assert list(prepared.image_counts) == [1, 2, 0, 1]
        assert {prepared.images[a], prepared.images[b]} == {Image(folder / "a.bmp"), Image(folder / "b.bmp")}
        assert len(prepared.images) == 2


def test_the_length_limit_is_exact(folder, tiny_tokenizer):
    (length,) = run(folder, tiny_tokenizer, [record("a.bmp")])[0].lengths
    assert len(run(folder, tiny_tokenizer, max_length=int(length))[0]) == 1
    _, stats = run(folder, tiny_tokenizer, max_length=int(length) - 1)
    assert stats.first_rejected == {"too long": f"data.jsonl:1: {length} tokens, max_length is {length - 1}"}


def test_a_file_is_decoded_once(folder, tiny_tokenizer, monkeypatch):
    opened = []
    original = prepare_shards.open_image
    monkeypatch.setattr(
        prepare_shards, "open_image", lambda image: (opened.append(image.source.name), original(image))[1]
    )
    with parts_of(2):
        run(folder, tiny_tokenizer, [record("a.bmp"), record("broken.bmp")] * 3)
    assert opened == ["a.bmp", "broken.bmp"]


def test_sources_keep_their_order_and_sizes(folder, tiny_tokenizer, tmp_path):
    first = make_source("messages", (write(folder, [record("a.bmp"), "[]", record("b.bmp")]),))
    nothing, few = first.at(tmp_path / "none.jsonl"), first.model_copy(update={"limit": 1})
    (tmp_path / "none.jsonl").write_text("[]")
    prepared, source_stats = prepare(
        [first, nothing, few], tiny_tokenizer, max_length=200, max_images=2, seed=0, folder=tmp_path / "made"
    )
    assert prepared.sizes == [2, 0, 1]
    assert [stats.kept for stats in source_stats] == [2, 0, 1]
    a, b = prepared.image_ids[0][0], prepared.image_ids[1][0]
    assert list(prepared.image_ids) == [(a,), (b,), (a,)]
    chosen = prepared.select(np.array([1, 2]))
    assert chosen.sizes == [1, 0, 1]
    assert list(chosen.image_ids) == [(b,), (a,)]
    assert prepared.select(np.array([], int)).sizes == [0, 0, 0]


def test_questions_about_one_image_become_turns_of_one_dialogue(folder, tiny_tokenizer):
    records = [
        record("a.bmp", question="1?", answer="one"),
        record("b.bmp", question="b?", answer="b"),
        record("same-as-a.bmp", question="2?", answer="two"),
    ]
    first = f"<s>User:{PICTURE}1?<end_of_utterance>\nAssistant: one<end_of_utterance>"
    second = f"<s>User:{PICTURE}2?<end_of_utterance>\nAssistant: two<end_of_utterance>"
    other = f"<s>User:{PICTURE}b?<end_of_utterance>\nAssistant: b<end_of_utterance></s>"
    either = (
        [f"{first}\nUser: 2?<end_of_utterance>\nAssistant: two<end_of_utterance></s>", other],
        [f"{second}\nUser: 1?<end_of_utterance>\nAssistant: one<end_of_utterance></s>", other],
    )
    with parts_of(1):
        seen = [texts(run(folder, tiny_tokenizer, records, turns=2, ordered=False, seed=seed)[0]) for seed in range(8)]
    assert all(joined in either for joined in seen)
    assert all(joined in seen for joined in either)
    apart, stats = run(folder, tiny_tokenizer, records, turns=1, ordered=False)
    assert sorted(texts(apart)) == sorted([f"{first}</s>", f"{second}</s>", other])
    assert (stats.kept, stats.dialogues) == (3, 3)


def test_joined_dialogues_are_of_at_most_so_many_turns_wherever_the_questions_stood(folder, tiny_tokenizer):
    names = ["a.bmp", "b.bmp", "same-as-a.bmp", "c.bmp"]
    records = [record(names[number % 4], question=f"{number}?", answer=f"{number}!") for number in range(24)]
    with parts_of(5):
        prepared, stats = run(folder, tiny_tokenizer, records, turns=5, ordered=False)
    asked = {image: [] for image in range(3)}
    for dialogue, images in zip(prepared.dialogues, prepared.image_ids, strict=True):
        assert images == (images[0],)
        assert dialogue.images == dialogue.turns[0].images
        pairs = list(zip(dialogue.turns[::2], dialogue.turns[1::2], strict=True))
        assert all(question.text[:-1] == answer.text[:-1] for question, answer in pairs)
        asked[images[0]].append([int(question.text[:-1]) for question, _ in pairs])
    assert sorted(sorted(map(len, parts)) for parts in asked.values()) == [[1, 5], [1, 5], [2, 5, 5]]
    by_image = sorted(sorted(number for part in parts for number in part) for parts in asked.values())
    assert by_image == [list(range(0, 24, 2)), list(range(1, 24, 4)), list(range(3, 24, 4))]
    assert (stats.kept, stats.dialogues, stats.examples) == (24, 24, 7)


def test_ordered_dialogues_stay_in_order_and_are_divided_one_after_the_other(folder, tiny_tokenizer):
    system = {"role": "system", "content": "Be kind."}
    spoken = {"messages": [system, *talk("a.bmp", count=3)["messages"]]}
    prepared, _ = run(folder, tiny_tokenizer, [spoken, talk("a.bmp", count=2)], turns=2)
    start = f"<s>Be kind.\nUser:{PICTURE}"
    assert texts(prepared) == [
        f"{start}0?<end_of_utterance>\nAssistant: 0!<end_of_utterance>"
        "\nUser: 1?<end_of_utterance>\nAssistant: 1!<end_of_utterance></s>",
        f"{start}2?<end_of_utterance>\nAssistant: 2!<end_of_utterance></s>",
        f"<s>User:{PICTURE}0?<end_of_utterance>\nAssistant: 0!<end_of_utterance>"
        "\nUser: 1?<end_of_utterance>\nAssistant: 1!<end_of_utterance></s>",
    ]


def test_dialogues_of_another_form_are_not_joined(folder, tiny_tokenizer):
    late = record("a.bmp")
    late["messages"][0]["content"].reverse()
    system = {"messages": [{"role": "system", "content": "Be kind."}, *record("a.bmp")["messages"]]}
    others = [late, system, record(), record("a.bmp", question="")]
    prepared, stats = run(folder, tiny_tokenizer, others * 2, turns=5, ordered=False)
    assert [len(dialogue.images) for dialogue in prepared.dialogues] == [1, 1, 0, 1] * 2
    assert stats.examples == 8


def test_questions_about_the_same_two_images_are_joined(folder, tiny_tokenizer):
    records = [record("a.bmp", "b.bmp"), record("b.bmp", "a.bmp"), record("same-as-a.bmp", "b.bmp"), record("a.bmp")]
    prepared, _ = run(folder, tiny_tokenizer, records, turns=5, ordered=False)
    assert [len(dialogue.turns) // 2 for dialogue in prepared.dialogues] == [2, 1, 1]
    assert list(prepared.image_counts) == [2, 2, 1]


def test_documents_are_cut_and_their_parts_counted(folder, tiny_tokenizer):
    lines = [
        {"images": ["a.bmp", None, None], "texts": [None, "A dog is here. " * 4, "A cat is there. " * 4]},
        {"images": [None], "texts": ["Both run."]},
        {"images": [None, None], "texts": ["No end " * 60, "The end."]},
    ]
    prepared, source_stats = prepare(
        [make_source("obelics", (write(folder, lines),))],
        tiny_tokenizer,
        max_length=80,
        max_images=2,
        seed=0,
        folder=folder / "made",
    )
    (stats,) = source_stats
    assert [dialogue.turns[0].text[:8] for dialogue in prepared.dialogues] == [
        "A dog is",
        "A cat is",
        "Both run",
        "The end.",
    ]
    assert list(prepared.image_ids) == [(0,), (0,), (), ()]
    assert [dialogue.goes_on for dialogue in prepared.dialogues] == [True, False, False, False]
    eos = tiny_tokenizer.convert_tokens_to_ids("</s>")
    assert [eos in example.input_ids for example in prepared.examples] == [False, True, True, True]
    assert (stats.kept, stats.examples, stats.documents_cut) == (3, 4, 2)
    assert stats.parts_rejected == {"too long": 1}
    assert max(prepared.lengths) <= 80


def test_a_document_goes_on_without_an_image_that_cannot_be_shown_while_it_has_another(folder, tiny_tokenizer):
    lines = [
        {"images": ["none.bmp", None, "a.bmp", None], "texts": [None, "Gone.", None, "Here."]},
        {"images": ["none.bmp", None, "none.bmp"], "texts": [None, "Both gone.", None]},
        {"images": ["b.bmp", None], "texts": [None, "Here."]},
    ]
    source = make_source("obelics", (write(folder, lines),))
    limits = {"max_length": 80, "max_images": 4}
    prepared, (stats,) = prepare([source], tiny_tokenizer, **limits, seed=0, folder=folder / "made")
    (turn,), _ = (dialogue.turns for dialogue in prepared.dialogues)
    assert [part if isinstance(part, str) else part.source.name for part in turn.parts] == ["Gone.", "a.bmp", "Here."]
    assert [prepared.images[image].source.name for (image,) in prepared.image_ids] == ["a.bmp", "b.bmp"]
    assert (stats.kept, stats.rejected, stats.parts_rejected) == (2, {"missing image": 1}, {"missing image": 1})


def test_a_document_is_cut_where_a_lost_image_would_leave_its_text_another(folder, tiny_tokenizer):
    lines = [
        {"images": ["a.bmp", None, "none.bmp", None, "b.bmp", None], "texts": [None, "A.", None, "Gone.", None, "B."]}
    ]
    source = make_source("obelics", (write(folder, lines),))
    limits = {"max_length": 80, "max_images": 4}
    prepared, (stats,) = prepare([source], tiny_tokenizer, **limits, seed=0, folder=folder / "made")
    assert [
        [part if isinstance(part, str) else part.source.name for part in dialogue.turns[0].parts]
        for dialogue in prepared.dialogues
    ] == [["a.bmp", "A."], ["Gone.", "b.bmp", "B."]]
    assert [dialogue.goes_on for dialogue in prepared.dialogues] == [True, False]
    assert (stats.kept, stats.dialogues, stats.examples, stats.documents_cut) == (1, 1, 2, 1)
    assert stats.parts_rejected == {"missing image": 1}


MIXED = [
    record("a.bmp", question="1?"),
    "[]",
    record("same-as-a.bmp", question="2?"),
    record("b.bmp"),
    record("none.bmp"),
    record(question="too long " * 60),
    talk("c.bmp", count=7),
    record("a.bmp", question="3?"),
]


def content(prepared_set):
    return {
        path.relative_to(prepared_set.folder).as_posix(): path.read_bytes()
        for path in sorted(prepared_set.folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("ordered", [True, False])
def test_workers_do_not_change_what_is_made(ordered, folder, tiny_tokenizer):
    with parts_of(3):
        one, two = (
            run(folder, tiny_tokenizer, MIXED, turns=2, ordered=ordered, workers=workers, made=folder / f"{workers}")
            for workers in (1, 2)
        )
    assert content(one[0].sets[0]) == content(two[0].sets[0])
    assert set(content(one[0].sets[0])) == {"stats.json", "examples.arrow", "files.arrow", "images.arrow"}
    assert one[1] == two[1]


@pytest.fixture
def converted(monkeypatch):
    """Converted records, by their first question; `stop_at` in it is where the converter is interrupted."""
    questions = []
    family = FORMATS["messages"]

    def convert(record, root):
        dialogue = family.convert(record, root)
        if dialogue.turns[0].text == questions_to_stop_at:
            raise Interrupted
        questions.append(dialogue.turns[0].text)
        return dialogue

    questions_to_stop_at = None

    def stop_at(question):
        nonlocal questions_to_stop_at
        questions_to_stop_at = question

    monkeypatch.setitem(FORMATS, "messages", replace(family, converter=convert))
    return questions, stop_at


class Interrupted(Exception):  # noqa: N818
    pass


NUMBERED = [record("abc"[number % 3] + ".bmp", question=f"{number}?") for number in range(12)]


def test_what_is_prepared_is_opened_and_not_made_again(folder, tiny_tokenizer, converted):
    questions, _ = converted
    first, stats = run(folder, tiny_tokenizer, NUMBERED)
    assert len(questions) == 12
    before = {path: path.stat().st_mtime_ns for path in first.sets[0].folder.rglob("*")}
    again, same_account = run(folder, tiny_tokenizer)
    assert len(questions) == 12
    assert again.sets[0].folder == first.sets[0].folder
    assert before == {path: path.stat().st_mtime_ns for path in first.sets[0].folder.rglob("*")}
    assert same_account == stats
    assert stats.kept == 12


@pytest.mark.parametrize("stop", ["1?", "4?", "11?"])
def test_interrupted_while_converting_it_goes_on_at_the_part(stop, folder, tiny_tokenizer, converted):
    questions, stop_at = converted
    with parts_of(3):
        whole, _ = run(folder, tiny_tokenizer, NUMBERED, turns=2, made=folder / "whole")
        questions.clear()
        stop_at(stop)
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, turns=2)
        stop_at(None)
        finished = int(stop[:-1]) // 3 * 3
        assert questions == [f"{number}?" for number in range(int(stop[:-1]))]
        questions.clear()
        prepared, _ = run(folder, tiny_tokenizer, turns=2)
    assert questions == [f"{number}?" for number in range(finished, 12)]
    assert content(prepared.sets[0]) == content(whole.sets[0])


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_interrupted_while_tokenising_it_goes_on_at_the_part(stop, folder, tiny_tokenizer, converted, monkeypatch):
    questions, _ = converted
    tokenise, calls = chunking.tokenize_all, []

    def stopping(rendered, encoder):
        calls.append(len(rendered))
        if len(calls) > stop >= 0:
            raise Interrupted
        return tokenise(rendered, encoder)

    with parts_of(3):
        whole, _ = run(folder, tiny_tokenizer, NUMBERED, turns=2, ordered=True, made=folder / "whole")
        monkeypatch.setattr(chunking, "tokenize_all", stopping)
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, turns=2, ordered=True)
        questions.clear()
        calls.clear()
        stop = -1
        prepared, _ = run(folder, tiny_tokenizer, turns=2, ordered=True)
    assert questions == []
    assert content(prepared.sets[0]) == content(whole.sets[0])


def test_finished_parts_are_not_tokenised_again(folder, tiny_tokenizer, monkeypatch):
    tokenise, seen = chunking.tokenize_all, []

    def stopping(rendered, encoder):
        seen.append([one.pieces[-3].text for one in rendered])
        if len(seen) == 3:
            raise Interrupted
        return tokenise(rendered, encoder)

    monkeypatch.setattr(chunking, "tokenize_all", stopping)
    records = [record(answer=f"{number}!") for number in range(12)]
    with parts_of(3):
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, records)
        run(folder, tiny_tokenizer)
    parts = [[f"\nAssistant: {number}!" for number in range(start, start + 3)] for start in (0, 3, 6, 9)]
    seen = [part for part in seen if part]  # of shards without records
    assert seen == [parts[0], parts[1], parts[2], parts[2], parts[3]]


@pytest.mark.parametrize("turns", [None, 2])
def test_shares_made_one_after_the_other_are_joined_to_the_same_set(turns, folder, tiny_tokenizer, converted):
    """As an array of jobs makes them, in any order, each converting its own records."""
    questions, _ = converted
    with parts_of(3):
        whole, stats = run(folder, tiny_tokenizer, NUMBERED, turns=turns, made=folder / "whole")
        questions.clear()
        source = make_source("messages", (folder / "data.jsonl",), turns=turns)
        settings = {"max_length": 200, "max_images": 2, "seed": 0, "folder": folder / "shares"}
        assert prepare_share([source], tiny_tokenizer, share=(1, 2), **settings) == [(8, 16)]
        assert questions == ["3?", "4?", "5?", "9?", "10?", "11?"]
        assert prepare_share([source], tiny_tokenizer, share=(0, 2), **settings) == [(16, 16)]
        questions.clear()
        joined, same = run(folder, tiny_tokenizer, turns=turns, made=folder / "shares")
    assert questions == []
    assert content(joined.sets[0]) == content(whole.sets[0])
    assert same == stats


@pytest.mark.parametrize("share", [False, True])
def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_of_it_is_kept(
    share, folder, tiny_tokenizer, monkeypatch
):
    path = write(folder, [record(answer="old") for _ in range(12)])
    source, convert, count = make_source("messages", (path,)), prepare_shards.try_dialogue, itertools.count(1)

    def changing(*arguments):
        if next(count) == 7:
            write(folder, [record(answer="new") for _ in range(12)])
        return convert(*arguments)

    settings = {"max_length": 200, "max_images": 2, "seed": 0, "folder": folder.parent / "made"}
    make = partial(prepare_share, share=(0, 1)) if share else prepare
    with parts_of(3):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_shards, "try_dialogue", changing)
            with pytest.raises(UserError, match="its files changed while they were prepared; give the same command ag"):
                make([source], tiny_tokenizer, **settings)
        assert [path.name for path in (folder.parent / "made").iterdir() if path.is_dir()] == []
        new, _ = run(folder, tiny_tokenizer)
        old, _ = run(folder, tiny_tokenizer, [record(answer="old") for _ in range(12)])
    assert {text.rpartition(": ")[2] for text in texts(new)} == {"new<end_of_utterance></s>"}
    assert {text.rpartition(": ")[2] for text in texts(old)} == {"old<end_of_utterance></s>"}


@pytest.mark.parametrize("late", [1, 5])
def test_a_share_that_is_overtaken_by_a_process_that_prepares_all_ends_well(late, folder, tiny_tokenizer, monkeypatch):
    with parts_of(3):
        whole, _ = run(folder, tiny_tokenizer, NUMBERED, made=folder / "whole")
        source = make_source("messages", (folder / "data.jsonl",))
        settings = {"max_length": 200, "max_images": 2, "seed": 0, "folder": folder.parent / "made"}
        convert, count = prepare_shards.try_dialogue, itertools.count(1)

        def overtaken(*arguments):
            if next(count) == late:
                run(folder, tiny_tokenizer)
            return convert(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(prepare_shards, "try_dialogue", overtaken)
            assert prepare_share([source], tiny_tokenizer, share=(0, 2), **settings) == [(16, 16)]
        prepared, _ = run(folder, tiny_tokenizer)
    assert content(prepared.sets[0]) == content(whole.sets[0])
    assert [path for path in (folder.parent / "made").iterdir() if path.is_dir()] == [prepared.sets[0].folder]


def test_a_share_of_what_is_prepared_already_does_nothing(folder, tiny_tokenizer, converted):
    questions, _ = converted
    os.utime(write(folder, NUMBERED), ns=(10**18, 10**18))  # the hash of a file that has just changed is not kept
    run(folder, tiny_tokenizer, made=folder / "made")
    questions.clear()
    source = make_source("messages", (folder / "data.jsonl",))
    settings = {"max_length": 200, "max_images": 2, "seed": 0, "folder": folder / "made"}
    assert prepare_share([source], tiny_tokenizer, share=(0, 2), **settings) == [(1, 1)]
    assert questions == []


def test_set_holds_no_parts_whose_removal_was_interrupted(folder, tiny_tokenizer, monkeypatch):
    remove = shutil.rmtree

    def stopping(path, **options):
        if Path(path).name == "joined":
            raise Interrupted
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopping)
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, NUMBERED, turns=2)
    assert [*folder.parent.glob("made/.*.work/joined")]
    prepared, _ = run(folder, tiny_tokenizer, turns=2)
    assert sorted(path.name for path in prepared.sets[0].folder.iterdir()) == [
        "examples.arrow",
        "files.arrow",
        "images.arrow",
        "stats.json",
    ]


def test_records_of_any_size_are_worked_on_a_bounded_number_of_bytes_at_once(folder, tiny_tokenizer, monkeypatch):
    """Blocks are of fixed numbers of records; the images inside them may be large."""
    sizes, rows = [], prepare_shards._PrepareShard._rows

    def noted(self, records, images, stats):
        sizes.append(len(records))
        return rows(self, records, images, stats)

    monkeypatch.setattr(prepare_shards._PrepareShard, "_rows", noted)
    large = inside(folder / "a.bmp")  # 336 characters
    records = [record(large) for _ in range(7)]
    monkeypatch.setattr(prepare_shards, "CHUNK_BYTES", 1000)
    with parts_of(5):
        prepared, _ = run(folder, tiny_tokenizer, records)
    assert [size for size in sizes if size] == [3, 2, 2]
    assert len(prepared) == 7


def test_only_its_account_makes_a_set_whole(folder, tiny_tokenizer, converted, monkeypatch):
    questions, _ = converted
    with monkeypatch.context() as patch:
        patch.setattr(SourceStats, "to_json", lambda self: (_ for _ in ()).throw(Interrupted()))
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, NUMBERED)
    (work,) = (path for path in (folder.parent / "made").iterdir() if path.is_dir())
    assert (work / "examples.arrow").is_file()
    assert PreparedSet.open(work) is None
    prepared, _ = run(folder, tiny_tokenizer)
    made = prepared.sets[0].folder
    assert len(questions) == 12
    assert not work.exists()
    whole = content(prepared.sets[0])
    (made / "stats.json").unlink()
    prepared, _ = run(folder, tiny_tokenizer)
    assert len(questions) == 24
    assert content(prepared.sets[0]) == whole


def prepare_at_once(source, splitter, folder, start, results):
    """In a process of its own: tell the steps it took and what it got."""
    steps = []
    start.wait(timeout=60)
    made = prepare_source(
        source, splitter, folder=folder, workers=1, track=lambda items, step: (steps.append(step), items)[1]
    )
    results.put((steps, made.folder.name, made.stats.kept, texts(Prepared([made]))))


def test_an_empty_set_is_whole_and_opened_as_any_other(folder, tiny_tokenizer, converted):
    questions, _ = converted
    for _ in range(2):
        prepared, stats = run(folder, tiny_tokenizer, [record("none.bmp")])
        assert (len(prepared), stats.rejected) == (0, {"missing image": 1})
    assert len(questions) == 1


def test_of_two_processes_one_makes_the_set_and_both_get_it(folder, tiny_tokenizer):
    source = make_source("messages", (write(folder, NUMBERED),))
    how = splitter(source, Encoder(tiny_tokenizer), Limits(200, 2), seed=0)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    arguments = (source, how, folder / "made", start, results)
    processes = [context.Process(target=prepare_at_once, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    one, other = sorted((results.get(timeout=60) for _ in processes), key=lambda result: len(result[0]))
    for process in processes:
        process.join()
    assert one[0] == []
    assert other[0] == ["prepare data.jsonl"]
    assert one[1:] == other[1:]
    assert one[2] == 12


def name(prepared):
    return prepared.sets[0].folder.name


CHANGES = {
    "max_length": {"max_length": 199},
    "max_images": {"max_images": 3},
    "turns": {"turns": 3},
    "limit": {"limit": 5},
    "ordered": {"ordered": False},
    "columns": {"columns": {"messages": "messages"}},
    "seed, with turns": {"seed": 1, "turns": 2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_another_set(change, folder, tiny_tokenizer):
    before = {"turns": 2} if "turns" in CHANGES[change] else {}
    first, _ = run(folder, tiny_tokenizer, NUMBERED, **before)
    changed, _ = run(folder, tiny_tokenizer, **CHANGES[change])
    assert name(changed) != name(first)
    assert name(run(folder, tiny_tokenizer, **before)[0]) == name(first)
    assert name(first).startswith("data.jsonl-")


@pytest.mark.parametrize("unimportant", [{"license": "cc-by-4.0"}, {"seed": 1}])
def test_what_does_not_matter_to_a_set_does_not_name_it(unimportant, folder, tiny_tokenizer):
    first, _ = run(folder, tiny_tokenizer, NUMBERED)
    assert name(run(folder, tiny_tokenizer, **unimportant)[0]) == name(first)


def test_another_content_tokenizer_or_code_is_another_set(
    folder, tiny_tokenizer, llama_tokenizer, tmp_path, monkeypatch
):
    first, _ = run(folder, tiny_tokenizer, NUMBERED)
    tokenizer, _ = run(folder, llama_tokenizer)
    changed, stats = run(folder, tiny_tokenizer, [*NUMBERED[:-1], record(question="x?")])
    shutil.copytree(Path(module.__file__).parent, tmp_path / "code")
    (tmp_path / "code" / "formats" / "more.py").write_text("MORE = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "code" / "prepare.py"))
    code, _ = run(folder, tiny_tokenizer, NUMBERED)
    assert len({name(prepared) for prepared in (first, tokenizer, changed, code)}) == 4
    assert [dialogue.turns[0].text for dialogue in changed.dialogues][-1] == "x?"
    assert stats.kept == 12


def touch(path, content=None):
    """Change a file, and its time for certain."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    if content is not None:
        path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


@pytest.mark.parametrize("changed", ["a.bmp", "same-as-a.bmp"])
@pytest.mark.parametrize("size", [1, 512])
def test_a_changed_image_makes_another_set_beside_its_own(changed, size, folder, tiny_tokenizer):
    records = [record("a.bmp", question="1?"), record("same-as-a.bmp", question="2?"), record("b.bmp")]
    with parts_of(size):
        first, _ = run(folder, tiny_tokenizer, records, turns=5, ordered=False)
        assert len(first) == 2
        whole, old = content(first.sets[0]), (folder / changed).read_bytes()
        touch(folder / changed, (folder / "c.bmp").read_bytes())
        assert (folder / changed).stat().st_size == len(old)
        second, _ = run(folder, tiny_tokenizer, turns=5, ordered=False)
        assert name(second) == f"{name(first)}-2"
        assert content(first.sets[0]) == whole
        assert (len(second), len(second.images)) == (3, 3)
        colors = {open_image(image).getpixel((0, 0)) for image in second.images}
        assert colors == {(255, 0, 0), (0, 128, 0), (0, 0, 255)}
        again, _ = run(folder, tiny_tokenizer, turns=5, ordered=False)
        assert name(again) == name(second)
        touch(folder / changed, old)
        back, _ = run(folder, tiny_tokenizer, turns=5, ordered=False)
        assert name(back) == name(first)
        touch(folder / changed, (folder / "b.bmp").read_bytes())
        assert name(run(folder, tiny_tokenizer, turns=5, ordered=False)[0]) == f"{name(first)}-3"


def test_a_missing_and_a_broken_image_that_were_mended_make_another_set(folder, tiny_tokenizer):
    records = [record("none.bmp"), record("broken.bmp"), record("a.bmp")]
    first, stats = run(folder, tiny_tokenizer, records)
    assert stats.rejected == {"missing image": 1, "corrupt image": 1}
    touch(folder / "none.bmp", (folder / "b.bmp").read_bytes())
    second, stats = run(folder, tiny_tokenizer)
    assert (name(second), stats.rejected) == (f"{name(first)}-2", {"corrupt image": 1})
    touch(folder / "broken.bmp", (folder / "c.bmp").read_bytes())
    third, stats = run(folder, tiny_tokenizer)
    assert (name(third), stats.rejected, stats.kept, len(third.images)) == (f"{name(first)}-3", {}, 3, 3)
    (folder / "none.bmp").unlink()
    touch(folder / "broken.bmp", (folder / "a.bmp").read_bytes()[:40])
    assert name(run(folder, tiny_tokenizer)[0]) == name(first)


@pytest.mark.parametrize("names", [["a.bmp", "broken.bmp"], ["none.bmp", "b.bmp", "a.bmp"]])
def test_files_with_equal_content_are_the_same_whenever_they_were_written(names, folder, tiny_tokenizer, monkeypatch):
    first, _ = run(folder, tiny_tokenizer, [record(one) for one in names])
    for one in names:
        if (folder / one).exists():
            touch(folder / one, (folder / one).read_bytes())
    assert name(run(folder, tiny_tokenizer)[0]) == name(first)
    monkeypatch.setattr(changes, "file_digest", lambda path: pytest.fail(f"{path} is read again"))
    assert name(run(folder, tiny_tokenizer)[0]) == name(first)
    assert len(list((folder.parent / "made").glob("data*"))) == 1


def test_why_a_set_is_made_anew_is_shown_with_the_progress(folder, tiny_tokenizer):
    steps = []

    def prepared():
        source = make_source("messages", (folder / "data.jsonl",))
        how = splitter(source, Encoder(tiny_tokenizer), Limits(200, 2), seed=0)
        steps.clear()
        return prepare_source(
            source, how, folder=folder / "made", workers=1, track=lambda items, step: (steps.append(step), items)[1]
        )

    write(folder, [record("a.bmp"), record("b.bmp"), record("none.bmp")])
    prepared()
    assert steps == ["prepare data.jsonl"]
    touch(folder / "a.bmp", (folder / "c.bmp").read_bytes())
    touch(folder / "b.bmp", b"BM")
    touch(folder / "none.bmp", (folder / "c.bmp").read_bytes())
    found = prepared()
    first, _, rest = steps[0].partition(" again: ")
    assert first == "prepare data.jsonl"
    assert rest == f"{folder / 'a.bmp'}: has other content, and 2 more"
    assert steps[1:] == []
    (found.folder / "stats.json").write_text("{}")
    prepared()
    assert steps[0] == "prepare data.jsonl again: stats.json was damaged"
    prepared()
    assert steps == []


def test_a_copied_archive_of_images_is_the_same_and_one_with_other_content_is_not(folder, tiny_tokenizer):
    def pack(*names):
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for one in names:
                archive.write(folder / one, "a.bmp")

    pack("a.bmp")
    first, _ = run(folder, tiny_tokenizer, [record("a.bmp")], image_root=(folder / "images.zip",))
    assert isinstance(first.images[0].source, Slice)
    touch(folder / "images.zip", (folder / "images.zip").read_bytes())
    assert name(run(folder, tiny_tokenizer, image_root=(folder / "images.zip",))[0]) == name(first)
    pack("b.bmp")
    second, _ = run(folder, tiny_tokenizer, image_root=(folder / "images.zip",))
    assert name(second).rpartition("-")[2] != name(first).rpartition("-")[2]
    assert open_image(second.images[0]).getpixel((0, 0)) == (0, 128, 0)


def test_a_missing_image_is_named_and_its_set_stays(folder, tiny_tokenizer):
    first, _ = run(folder, tiny_tokenizer, [record("a.bmp"), record("b.bmp"), record("c.bmp")])
    whole = content(first.sets[0])
    (folder / "b.bmp").rename(folder / "elsewhere")
    with pytest.raises(UserError) as error:
        run(folder, tiny_tokenizer)
    assert str(error.value) == (
        f"{folder / 'data.jsonl'}[train]: {folder / 'b.bmp'}: the image file is missing\n"
        f"  it was there when {first.sets[0].folder} was prepared: mount its disk or restore it; or "
        "delete that folder, to prepare without them"
    )
    assert content(first.sets[0]) == whole
    (folder / "elsewhere").rename(folder / "b.bmp")
    assert name(run(folder, tiny_tokenizer)[0]) == name(first)
    (folder / "b.bmp").unlink()
    shutil.rmtree(first.sets[0].folder)
    assert run(folder, tiny_tokenizer)[1].rejected == {"missing image": 1}


@pytest.mark.parametrize("roots", ["one", "two", "by name"])
def test_of_a_disk_that_is_not_mounted_the_folder_is_named(roots, folder, tiny_tokenizer):
    disk = folder / "disk"
    (disk / "train").mkdir(parents=True)
    for one in ("b.bmp", "c.bmp"):
        (folder / one).rename(disk / "train" / one)
    prefix = "disk/train/" if roots == "by name" else "train/"
    images = {"one": (disk,), "two": (folder, disk), "by name": ()}[roots]
    records = [record(f"{prefix}b.bmp"), record(f"{prefix}c.bmp")] + [record("a.bmp")] * (roots != "one")
    first, _ = run(folder, tiny_tokenizer, records, image_root=images)
    shutil.rmtree(disk / "train")
    with pytest.raises(UserError) as error:
        run(folder, tiny_tokenizer, image_root=images)
    named = disk / "train" if roots == "by name" else disk
    assert f"none of the 2 image files below {named} is there; is its disk mounted?" in str(error.value)
    assert PreparedSet.open(first.sets[0].folder) is not None


def test_an_image_that_changed_between_two_attempts_is_told(folder, tiny_tokenizer, converted):
    _, stop_at = converted
    stop_at("5?")
    with parts_of(3):
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, NUMBERED)
        stop_at(None)
        touch(folder / "a.bmp", (folder / "b.bmp").read_bytes())
        with pytest.raises(UserError, match="its images changed while they were prepared; start again"):
            run(folder, tiny_tokenizer)
        assert run(folder, tiny_tokenizer)[1].kept == 12


def test_an_image_touched_between_two_attempts_is_the_same(folder, tiny_tokenizer, converted):
    _, stop_at = converted
    stop_at("5?")
    with parts_of(3):
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, NUMBERED)
        stop_at(None)
        touch(folder / "a.bmp")
        assert run(folder, tiny_tokenizer)[1].kept == 12


@pytest.mark.parametrize("harm", ["empty", "half", "garbage", "missing"])
@pytest.mark.parametrize(
    "file", ["examples.arrow", "images.arrow", "files.arrow", "images/000000.bin", "stats.json", "fingerprints.json"]
)
def test_a_damaged_set_is_made_anew(harm, file, folder, tiny_tokenizer):
    records = [record("a.bmp"), record(inside(folder / "b.bmp")), record("none.bmp")]
    first, _ = run(folder, tiny_tokenizer, records)
    whole, path = content(first.sets[0]), first.sets[0].folder / file
    if file == "fingerprints.json":
        path = first.sets[0].folder.parent / file
    harmed(path, harm)
    again, stats = run(folder, tiny_tokenizer)
    assert (name(again), stats.kept) == (name(first), 2)
    written = content(again.sets[0])
    assert len(written.pop("files.arrow")) == len(whole.pop("files.arrow"))  # it holds when images/*.bin was written
    assert written == whole
    assert sorted(open_image(image).getpixel((0, 0)) for image in again.images) == [(0, 128, 0), (255, 0, 0)]


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"source": 5}', '{"read": "x"}'])
def test_an_account_that_is_none_is_made_anew(text, folder, tiny_tokenizer):
    first, _ = run(folder, tiny_tokenizer, [record("a.bmp")])
    whole = content(first.sets[0])
    (first.sets[0].folder / "stats.json").write_text(text)
    assert content(run(folder, tiny_tokenizer)[0].sets[0]) == whole


def test_a_set_is_made_anew_whose_numbers_lead_outside(folder, tiny_tokenizer):
    first, _ = run(folder, tiny_tokenizer, [record("a.bmp"), record()])
    made = first.sets[0].folder
    whole = content(first.sets[0])
    (batch,) = ArrowFile(made / "examples.arrow").batches
    ids, shown = batch.column("input_ids"), batch.column("images")
    wrong = {
        "offset beyond the values": pa.ListArray.from_arrays(
            pa.array([0, 10**6, len(ids.values)], pa.int32()), ids.values
        ),
        "offsets that fall": pa.ListArray.from_arrays(pa.array([9, 0, len(ids.values)], pa.int32()), ids.values),
        "image that is not there": pa.ListArray.from_arrays(shown.offsets, pa.array([7], pa.int32())),
        "fewer examples": None,
    }
    for what, column in wrong.items():
        name = "images" if "image" in what else "input_ids"
        harmed_batch = (
            batch.slice(1) if column is None else batch.set_column(batch.schema.get_field_index(name), name, column)
        )
        write_arrow(made / "examples.arrow", EXAMPLE_SCHEMA, [harmed_batch], image_token=str(first.sets[0].image_token))
        with pytest.raises(DamagedError, match=r"examples\.arrow: damaged"):
            PreparedSet.open(made)
        assert content(run(folder, tiny_tokenizer)[0].sets[0]) == whole, what


@pytest.mark.parametrize("harm", ["empty", "half", "garbage", "missing"])
@pytest.mark.parametrize(
    "file", ["000000/examples.arrow", "000001/images.arrow", "000001/files.arrow", "000000/stats.json"]
)
def test_a_damaged_part_is_converted_anew(harm, file, folder, tiny_tokenizer, converted):
    questions, stop_at = converted
    stop_at("8?")
    with parts_of(3):
        with pytest.raises(Interrupted):
            run(folder, tiny_tokenizer, NUMBERED)
        stop_at(None)
        (parts,) = (folder.parent / "made").glob(".*/parts")
        harmed(parts / file, harm)
        questions.clear()
        assert run(folder, tiny_tokenizer)[1].kept == 12
    assert len(questions) == 3 + 6


def harmed(path, harm):
    """What a power cut, a full disk or an editor can leave of a file."""
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff\0<" * (len(data) // 3)}[harm])


def test_names_that_are_not_utf_8_lose_nothing(tmp_path, tiny_tokenizer):
    folder = draw(tmp_path / os.fsdecode(b"d\xffta"))
    odd = os.fsdecode(b"d\xf6g.bmp")
    (folder / "a.bmp").rename(folder / odd)
    lines = [record(odd), record("b.bmp", inside(folder / "c.bmp")), record("\ud83d.bmp"), record(question="\udcff")]
    path = folder / os.fsdecode(b"l\xffnes.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for _ in range(2):  # made, and opened
        made = prepare(
            [make_source("messages", (path,))], tiny_tokenizer, max_length=200, max_images=2, seed=0, folder=folder
        )
        prepared, (stats,) = made
        assert [open_image(image).getpixel((0, 0)) for image in prepared.dialogues[0].images] == [(255, 0, 0)]
        assert [image.source for image in prepared.dialogues[0].images] == [folder / odd]
        assert list(prepared.record_ids) == ["l\\udcffnes.jsonl:1", "l\\udcffnes.jsonl:2"]
        assert stats.source == as_unicode(f"{path}[train]")
        assert stats.rejected == {"not an image reference": 1, "text is not Unicode": 1}
        assert stats.first_rejected["text is not Unicode"].startswith("l\\udcffnes.jsonl:4: ")
    json.dumps(stats.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    (folder / odd).unlink()
    with pytest.raises(UserError, match="the image file is missing"):
        prepare([make_source("messages", (path,))], tiny_tokenizer, max_length=200, max_images=2, seed=0, folder=folder)


def inside(path):
    return f"data:image/bmp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_images_inside_records_are_kept_as_they_came_once_in_a_part(folder, tiny_tokenizer):
    a, b = inside(folder / "a.bmp"), inside(folder / "b.bmp")
    with parts_of(3):
        prepared, stats = run(folder, tiny_tokenizer, [record(a), record(b), record(a), record("c.bmp"), record(b, a)])
    kept = prepared.sets[0].folder / "images"
    red, green = (folder / "a.bmp").read_bytes(), (folder / "b.bmp").read_bytes()
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        "000000.bin": red + green,
        "000001.bin": green + red,
    }
    pixels = [[open_image(prepared.images[image]).getpixel((3, 3)) for image in ids] for ids in prepared.image_ids]
    assert pixels == [[(255, 0, 0)], [(0, 128, 0)], [(255, 0, 0)], [(0, 0, 255)], [(0, 128, 0), (255, 0, 0)]]
    places = {prepared.images[image].source for ids in prepared.image_ids for image in ids}
    assert places == {
        Slice(kept / "000000.bin", 0, len(red)),
        Slice(kept / "000000.bin", len(red), len(green)),
        folder / "c.bmp",
    }
    assert stats.images == 3
    assert len(run(folder, tiny_tokenizer)[0].images) == 3
    (kept / "000000.bin").unlink()
    assert [open_image(image).size for image in run(folder, tiny_tokenizer)[0].images] == [(8, 8)] * 3


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "1"])
def test_pictures_in_memory_are_kept_with_equal_pixels(mode, folder, tiny_tokenizer, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    picture = PIL.Image.fromarray(noise).convert(mode)
    family = replace(FORMATS["messages"], read=lambda source: iter([("hub:0", record(picture))]), whole=bool)
    monkeypatch.setitem(FORMATS, "messages", family)
    prepared, stats = run(folder, tiny_tokenizer, [])
    assert (stats.kept, stats.rejected) == (1, {})
    expected = np.asarray(open_image(Image(picture)))
    assert (np.asarray(open_image(prepared.images[0])) == expected).all()


def test_no_pixels_are_stored_of_images_on_disk(folder, tiny_tokenizer):
    rng = np.random.default_rng(0)
    for number in range(50):
        PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
    prepared, _ = run(folder, tiny_tokenizer, [record(f"{number}.png") for number in range(50)])
    assert len(prepared.images) == 50
    assert sum(map(len, content(prepared.sets[0]).values())) < 60_000


def write_set(folder, image_ids):
    """A prepared set of which only the images matter."""
    folder.mkdir()
    rows = [
        {
            "input_ids": [1],
            "supervised": [False],
            "images": ids,
            "shown": len(set(ids)),
            "questions": [],
            "record_id": str(row),
            "dialogue": "",
        }
        for row, ids in enumerate(image_ids)
    ]
    images = [
        {"digest": bytes([number]) * 32, "path": b"x", "offset": -1, "length": -1, "coding": "raw"}
        for number in range(16)
    ]
    write_arrow(folder / "examples.arrow", EXAMPLE_SCHEMA, to_batches(rows, EXAMPLE_SCHEMA), image_token="9")
    write_arrow(folder / "images.arrow", IMAGE_SCHEMA, to_batches(images, IMAGE_SCHEMA))
    return PreparedSet(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made((0, 1), (2,), sizes=[1, 1]): examples that show these images, in sets of these sizes."""

    def make(*image_ids, sizes=None):
        folder, bounds = tmp_path_factory.mktemp("sets"), np.cumsum([0, *(sizes or [len(image_ids)])])
        return Prepared(
            [
                write_set(folder / str(number), image_ids[start:stop])
                for number, (start, stop) in enumerate(pairwise(bounds))
            ]
        )

    return make


def sides(prepared, fraction, seed):
    return [list(side.record_ids) for side in split_by_image(prepared, fraction, seed=seed)]


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=1, max_size=15),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_no_image_is_on_both_sides_and_no_example_is_lost(made, image_ids, fraction, seed):
    prepared = made(*image_ids)
    wanted = max(1, round(fraction * len(image_ids))) if fraction else 0
    lonely = [ids for ids in image_ids if sum(bool(set(ids) & set(other)) for other in image_ids) < 2]
    try:
        training, held = split_by_image(prepared, fraction, seed=seed)
    except UserError:
        assert wanted == len(image_ids) or not lonely  # one that shares no image can always be held out
        return
    assert not {i for ids in training.image_ids for i in ids} & {i for ids in held.image_ids for i in ids}
    assert sorted([*training.image_ids, *held.image_ids]) == sorted(image_ids)
    assert (training.sizes, held.sizes) == ([len(training)], [len(held)])
    assert bool(wanted) <= len(held) <= wanted
    assert sides(prepared, fraction, seed) == sides(prepared, fraction, seed)


@pytest.mark.parametrize("seed", range(6))
def test_examples_chained_by_their_images_stay_together(seed, made):
    prepared = made((0, 1), (5,), (1, 2), (), (3, 2), (6,), sizes=[3, 3])
    training, held = split_by_image(prepared, 0.3, seed=seed)
    chain = {(0, 1), (1, 2), (3, 2)}
    assert chain <= set(training.image_ids) or chain <= set(held.image_ids)
    assert 1 <= len(held) <= 2
    assert [a + b for a, b in zip(training.sizes, held.sizes, strict=True)] == [3, 3]


def test_a_split_is_about_its_fraction_and_depends_on_its_seed(made):
    prepared = made(*[(image,) for image in range(16)], *[()] * 24)
    assert [len(side) for side in split_by_image(prepared, 0.25, seed=0)] == [30, 10]
    assert [len(side) for side in split_by_image(prepared, 0.0, seed=0)] == [40, 0]
    assert sides(prepared, 0.25, 0) != sides(prepared, 0.25, 1)


def test_a_split_that_cannot_be_is_told(made):
    with pytest.raises(UserError) as caught:
        split_by_image(made((0,), (0, 1), (1,)), 0.4, seed=0)
    assert str(caught.value) == (
        "data.eval_split: 0.4 of 3 examples cannot be held out: they share images, and the smallest group that does "
        "has 3; set eval_sources, or a larger share"
    )


def test_nothing_to_train_on_is_an_error_with_its_reasons(folder, tiny_tokenizer):
    prepared, stats = run(folder, tiny_tokenizer, ["[]", record("none.bmp"), "[]"])
    with pytest.raises(UserError) as caught:
        require_examples(prepared, [stats])
    where, missing = stats.source, folder.resolve() / "none.bmp"
    assert str(caught.value).splitlines() == [
        "no dialogue is left:",
        f"  {where}: 2 x not an object (first: data.jsonl:1: expected a JSON object, got list)",
        f"  {where}: 1 x missing image (first: data.jsonl:2: {missing}: No such file or directory)",
    ]


def test_empty_sources_are_an_error_that_says_so(made):
    with pytest.raises(UserError, match="the sources are empty"):
        require_examples(made(), [SourceStats("x")])
    require_examples(made(()), [SourceStats("x")])


def test_a_lost_record_is_never_reported():
    stats = SourceStats("x", read=2, kept=1)
    with pytest.raises(AssertionError, match="records lost"):
        stats.to_json()
    stats.reject("data.jsonl:1", RecordError("too long"))
    assert stats.to_json()["first_rejected"] == {"too long": "data.jsonl:1"}


def test_accounts_of_parts_add_up_and_keep_the_first_place():
    whole, second = (
        SourceStats("x", read=8, limited=True),
        SourceStats("", kept=2, tokens=7, broken=["f.json breaks off"]),
    )
    whole.reject("x:1", RecordError("too long", "9 tokens"))
    whole.reject_part("x:2", RecordError("corrupt image"))
    second.reject("x:5", RecordError("missing image", "a.bmp"))
    second.reject("x:6", RecordError("too long", "8 tokens"))
    second.reject_part("x:7", RecordError("too many images", "3"), parts=2)
    whole.add(second)
    whole.kept += 3
    assert whole.to_json() == {
        "source": "x",
        "read": 8,
        "kept": 5,
        "limited": True,
        "broken": ["f.json breaks off"],
        "rejected": {"too long": 2, "missing image": 1},
        "first_rejected": {
            "too long": "x:1: 9 tokens",
            "corrupt image": "x:2",
            "missing image": "x:5: a.bmp",
            "too many images": "x:7: 3",
        },
        "parts_rejected": {"corrupt image": 1, "too many images": 2},
        "documents_cut": 0,
        "dialogues": 0,
        "examples": 0,
        "tokens": 7,
        "supervised_tokens": 0,
        "images": 0,
        "draws_per_epoch": None,
        "repeats_per_epoch": None,
    }
    assert list(whole.to_json()["first_rejected"]) == ["too long", "corrupt image", "missing image", "too many images"]
    assert SourceStats.from_json(whole.to_json()) == whole
    assert whole.loss == (
        "f.json breaks off; 3 of 8 records rejected: too long 2, missing image 1; "
        "parts of kept records left out: corrupt image 1, too many images 2"
    )
    assert SourceStats("x", read=1, kept=1).loss is None


def test_a_file_that_breaks_off_is_prepared_as_far_as_it_goes_where_that_is_asked(folder, tiny_tokenizer, tmp_path):
    lines = [json.dumps(record("a.bmp")), "[]", json.dumps(record("b.bmp"))]
    path = folder / "data.json"
    path.write_text(f"[{', '.join(lines)}, tru")
    options = {"max_length": 200, "max_images": 2, "seed": 0, "folder": tmp_path / "made"}
    with pytest.raises(UserError, match=r"data\.json: the file breaks off: not JSON: .*; 3 records were read before, "):
        prepare([make_source("messages", (path,))], tiny_tokenizer, **options)
    prepared, (stats,) = prepare([make_source("messages", (path,), on_broken="keep")], tiny_tokenizer, **options)
    assert len(prepared) == 2
    assert (stats.read, stats.kept, stats.rejected) == (3, 2, {"not an object": 1})
    size = path.stat().st_size
    lost = f"3 records were read before, 0.9 % of the file was not read, from byte {size - 3} of {size} on"
    told = f"{path} breaks off: not JSON: Expecting value at byte {size - 3}; {lost}"
    assert stats.broken == [told]
    assert stats.loss == f"{told}; 1 of 3 records rejected: not an object 1"
