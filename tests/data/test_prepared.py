"""A prepared set as it lies on disk, and several of them seen as one."""

import json
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data.arrow import DamagedError
from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, Slice, Turn, assistant, user
from finetune.data.images import open_image
from finetune.data.prepare import prepare
from finetune.data.prepared import (
    IMAGE_SCHEMA,
    PreparedSet,
    View,
    dialogue_from_json,
    dialogue_to_json,
    image_from_row,
    image_row,
)
from finetune.data.stale_images import find_changes
from finetune.data.tokenize import tokenize

A, B = Image(Path("a.png")), Image(Path("b.png"))


def test_a_view_makes_its_items_when_asked():
    asked = []
    view = View(lambda number: asked.append(number) or 10 * number, 4)
    assert asked == []
    assert (len(view), view[1], view[-1], view[np.int64(2)]) == (4, 10, 30, 20)
    assert asked == [1, 3, 2]
    assert (view[1:3], view[::-2], list(view)) == ([10, 20], [30, 10], [0, 10, 20, 30])
    for index in (4, -5):
        with pytest.raises(IndexError):
            view[index]


DIALOGUES = {
    "images between texts": Dialogue((user(A, "Who?", B), assistant("Me."))),
    "references": Dialogue((user("1?"), assistant("one", references=("one", "1")), user(A), assistant("two"))),
    "system, image in an answer": Dialogue((Turn("system", ("Be kind.",)), user("é\n猫?"), assistant("So", A))),
    "an answer not trained on": Dialogue((user("1?"), Turn("assistant", ("two",), supervised=False))),
    "document": Dialogue((Turn("document", (A, "A dog.", A)),)),
    "document that goes on": Dialogue((Turn("document", ("A dog.",)),), goes_on=True),
}


@pytest.mark.parametrize("dialogue", DIALOGUES.values(), ids=DIALOGUES)
def test_a_dialogue_is_the_same_after_it_was_written(dialogue):
    text = dialogue_to_json(dialogue)
    again = dialogue_from_json(text, dialogue.images)
    assert again == dialogue
    assert [turn.references for turn in again.turns] == [turn.references for turn in dialogue.turns]
    assert "png" not in text


def test_a_dialogue_is_written_compactly_without_its_images():
    assert dialogue_to_json(DIALOGUES["images between texts"]) == (
        '{"turns":[["user",[null,"Who?",null],[]],["assistant",["Me."],[]]],"goes_on":false}'
    )


@pytest.mark.parametrize(
    ("image", "path"),
    [
        (Image(Path("/data/a.png")), b"/data/a.png"),
        (Image(Slice(Path("/data/a.zip"), 7, 9, "deflate")), b"/data/a.zip"),
        (Image(Slice(Path("/made/images/0.bin"), 7, 9)), b"images/0.bin"),
        (Image(Path("/data/d\udcf6g \N{CAT}.png")), b"/data/d\xf6g \xf0\x9f\x90\x88.png"),
    ],
)
def test_an_image_is_found_again_from_its_row_whatever_its_name(image, path):
    row = image_row(image, b"x" * 32, Path("/made"))
    assert (row["digest"], row["path"]) == (b"x" * 32, path)
    assert pa.RecordBatch.from_pylist([row], IMAGE_SCHEMA).to_pylist() == [row]
    assert image_from_row(row, Path("/made")) == image


def test_references_that_are_no_unicode_are_written_as_escapes():
    dialogue = Dialogue((user("1?"), assistant("one", references=("\udcff\n", "\u2028"))))
    text = dialogue_to_json(dialogue)
    assert text.encode().count(b"\\udcff") == 1
    assert "\n" not in text
    assert dialogue_from_json(text, ()).turns[1].references == ("\udcff\n", "\u2028")


def ask(*images, question="Who?", answer="Me."):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        PIL.Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    (folder / "also-a.png").write_bytes((folder / "a.png").read_bytes())
    files = {
        "first": [ask("a.png"), ask(), [*ask("b.png", "a.png", "b.png"), *ask(question="Why?", answer="So.")]],
        "second": [ask("c.png"), ask("also-a.png", question="And?")],
        "no images": [ask(question="Hi!", answer="Hello."), ask(question="Bye!", answer="Bye.")],
        "empty": [],
    }
    for name, records in files.items():
        text = "".join(json.dumps({"messages": messages}) + "\n" for messages in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def prepare_files(folder, tiny_tokenizer):
    def run(*names):
        sources = [make_source("messages", (folder / f"{name}.jsonl",)) for name in names]
        made = folder / "made"
        return prepare(sources, tiny_tokenizer, max_length=200, max_images=3, seed=0, folder=made)[0]

    return run


def test_examples_are_the_dialogues_tokenised(prepare_files, tiny_tokenizer):
    prepared = prepare_files("first", "second")
    assert len(prepared) == len(prepared.examples) == len(prepared.dialogues) == 5
    for example, dialogue, length in zip(prepared.examples, prepared.dialogues, prepared.lengths, strict=True):
        expected = tokenize(render(dialogue), tiny_tokenizer)
        for name in ("input_ids", "labels", "image_index"):
            assert getattr(example, name).tolist() == getattr(expected, name).tolist()
            assert getattr(example, name).dtype == np.int64
        assert length == len(expected)
    assert [dialogue.turns[0].text for dialogue in prepared.dialogues] == ["Who?", "Who?", "Who?", "Who?", "And?"]


def test_images_are_distinct_by_content_over_all_sets(prepare_files, folder):
    prepared = prepare_files("first", "second")
    (a,), (c,) = prepared.image_ids[0], prepared.image_ids[3]
    b = prepared.image_ids[2][0]
    assert len({a, b, c}) == len(prepared.images) == len(prepared.digests) == 3
    assert list(prepared.image_ids) == [(a,), (), (b, a, b), (c,), (a,)]
    assert prepared.image_counts.tolist() == [1, 0, 2, 1, 1]
    colors = {number: open_image(prepared.images[number]).getpixel((0, 0)) for number in (a, b, c)}
    assert colors == {a: (255, 0, 0), b: (0, 128, 0), c: (0, 0, 255)}
    assert prepared.images[a] == Image((folder / "a.png").resolve())


def test_examples_know_their_place_and_source(prepare_files):
    prepared = prepare_files("first", "empty", "second")
    assert prepared.sizes == [3, 0, 2]
    assert [prepared.source_of(index) for index in range(5)] == [0, 0, 0, 2, 2]
    assert [place.rpartition("/")[2] for place in prepared.record_ids] == [
        *("first.jsonl:1", "first.jsonl:2", "first.jsonl:3"),
        *("second.jsonl:1", "second.jsonl:2"),
    ]


def test_selected_examples_are_the_same_examples(prepare_files):
    prepared = prepare_files("first", "second")
    chosen = prepared.select(np.array([1, 2, 4]))
    again = chosen.select(np.array([1, 2]))
    assert (chosen.sizes, again.sizes, len(again)) == ([2, 1], [1, 1], 2)
    for index, original in enumerate((2, 4)):
        assert again.examples[index].input_ids.tolist() == prepared.examples[original].input_ids.tolist()
        assert again.dialogues[index] == prepared.dialogues[original]
        assert again.image_ids[index] == prepared.image_ids[original]
        assert again.lengths[index] == prepared.lengths[original]
        assert again.image_counts[index] == prepared.image_counts[original]
        assert again.record_ids[index] == prepared.record_ids[original]
        assert again.source_of(index) == prepared.source_of(original)
    assert len(again.images) == 3  # numbered as they were


def test_what_is_shown_and_asked_comes_with_its_example(prepare_files):
    prepared = prepare_files("first", "second")
    a, b, c = (bytes(prepared.digests[prepared.image_ids[row][0]]) for row in (0, 2, 3))
    examples, shown = prepared.shown_images()
    assert list(zip(examples.tolist(), map(bytes, shown), strict=True)) == [
        *((0, a), (2, b), (2, a), (2, b)),
        *((3, c), (4, a)),
    ]
    asking, keys = prepared.asked_questions()
    assert asking.tolist() == [0, 1, 2, 2, 3, 4]
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == 6
    chosen = prepared.select(np.array([2, 3]))
    examples, shown = chosen.shown_images()
    assert list(zip(examples.tolist(), map(bytes, shown), strict=True)) == [(0, b), (0, a), (0, b), (1, c)]
    asking, chosen_keys = chosen.asked_questions()
    assert asking.tolist() == [0, 0, 1]
    assert chosen_keys.tolist() == keys.tolist()[2:5]


@pytest.mark.parametrize("names", [(), ("empty",), ("empty", "empty")])
def test_nothing_at_all_is_a_set_like_any_other(names, prepare_files):
    prepared = prepare_files(*names)
    assert (len(prepared), prepared.sizes, list(prepared.examples)) == (0, [0] * len(names), [])
    assert (prepared.lengths.tolist(), prepared.image_counts.tolist()) == ([], [])
    assert (len(prepared.images), len(prepared.digests)) == (0, 0)
    assert [part.tolist() for part in (*prepared.shown_images(), *prepared.asked_questions())] == [[]] * 4
    assert len(prepared.select(np.zeros(0, np.int64))) == 0
    with pytest.raises(IndexError):
        prepared.examples[0]


def test_a_set_without_images_shows_none(prepare_files):
    prepared = prepare_files("no images")
    assert list(prepared.image_ids) == [(), ()]
    assert prepared.image_counts.tolist() == [0, 0]
    assert prepared.examples[0].image_index.tolist() == [-1] * len(prepared.examples[0])
    assert [part.tolist() for part in prepared.shown_images()] == [[], []]
    assert len(prepared.asked_questions()[0]) == 2
    both = prepare_files("no images", "first")
    assert list(both.image_ids)[:2] == [(), ()]
    assert len(both.image_ids[2]) == 1


def test_examples_count_from_the_end_and_stop_there(prepare_files):
    prepared = prepare_files("first")
    assert prepared.examples[-1].input_ids.tolist() == prepared.examples[2].input_ids.tolist()
    assert prepared.dialogues[-3] == prepared.dialogues[0]
    assert [len(example) for example in prepared.examples[1:]] == prepared.lengths[1:].tolist()
    for view in (prepared.examples, prepared.dialogues, prepared.record_ids, prepared.image_ids, prepared.images):
        for index in (len(view), -len(view) - 1):
            with pytest.raises(IndexError):
                view[index]


def seen(prepared):
    return (
        prepared.lengths.tolist(),
        [example.input_ids.tolist() for example in prepared.examples],
        list(prepared.image_ids),
        list(prepared.dialogues),
        [open_image(image).getpixel((0, 0)) for image in prepared.images],
    )


def test_another_process_sees_the_same(prepare_files):
    prepared = prepare_files("first", "second").select(np.array([0, 2, 4]))
    assert seen(pickle.loads(pickle.dumps(prepared))) == seen(prepared)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(seen, prepared).result() == seen(prepared)
        assert pool.submit(len, prepared.sets[0]).result() == 3


@given(
    name=st.sampled_from(["examples.arrow", "images.arrow", "files.arrow", "stats.json"]),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4),
    kept=st.floats(0, 1) | st.just(1.0),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz_of_a_set_that_is_opened_or_named_as_damaged(prepare_files, tmp_path, name, changes, kept):
    (made,) = prepare_files("first").sets
    shutil.copytree(made.folder, tmp_path / "set", dirs_exist_ok=True)
    content = bytearray((made.folder / name).read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    (tmp_path / "set" / name).write_bytes(content[: round(kept * len(content))])
    with suppress(DamagedError):
        opened = PreparedSet.open(tmp_path / "set")
        assert opened is not None
        find_changes(opened.folder)
        for row in range(len(opened)):
            assert len(opened.example(row)) == len(opened.examples.cell("supervised", row))
            opened.dialogue(row)


def test_a_set_is_opened_with_its_account(prepare_files):
    (made,) = prepare_files("first").sets
    opened = PreparedSet.open(made.folder)
    assert (len(opened), opened.stats.kept, opened.stats.images) == (3, 3, 2)
    assert opened.stats == made.stats
    assert PreparedSet.open(made.folder / "none") is None
