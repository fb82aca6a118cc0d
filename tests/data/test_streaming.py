"""Rows made while a source is read: the same for whoever asks, every record accounted for, memory bounded."""

import json
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice, pairwise
from threading import Event

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data import streaming as stream
from finetune.data.chunking import Limits, splitter
from finetune.data.conversation import RecordError
from finetune.data.images import Preprocessing
from finetune.data.prepare import prepare
from finetune.data.streaming import TOKENISED_AT_ONCE, Drawn, StreamedRows, downloads, prepared_epochs, streamed_epochs
from finetune.data.tokenize import Encoder, Example
from finetune.recipe.schema import Augment
from modeling.errors import UserError

PIXELS = Preprocessing((4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FILLER = 1


def drawn(number, length=1, *, epoch=0, source=0):
    """An example whose every token is `number`."""
    ids = np.full(length, number, np.int64)
    return Drawn(Example(ids, ids, np.full(length, -1)), (), source, epoch, "a record")


def counting(size, *, source=0, first=0):
    """A pass over `size` examples of one token, which is 1000 x the pass + their number from `first` on."""

    def one_pass(epoch, stats):
        stats.kept += size
        return (drawn(1000 * epoch + number, epoch=epoch, source=source) for number in range(first, first + size))

    return one_pass


def rows_of(*readers, **changes):
    names = [f"source {number}" for number in range(len(readers))]
    settings = {"rows": 10_000, "row_tokens": 8, "row_images": 2, "seed": 0, "weights": [None] * len(readers)}
    return StreamedRows(readers=readers, names=names, preprocessing=PIXELS, filler=FILLER, **{**settings, **changes})


def sequences(batch):
    """The token ids of each example of a row."""
    starts = batch["layout"].sequence_starts
    return [batch["input_ids"][0, start:stop].tolist() for start, stop in pairwise(starts)]


def taken(rows, wanted):
    """The first so many examples of counting epochs, row after row."""
    numbers = (ids[0] for number in count() for ids in sequences(rows.at(number)))
    return list(islice(numbers, wanted))


# mixed, pass after pass


def test_weights_decide_how_often_a_source_is_in_the_rows():
    window = 64 * 8
    numbers = taken(rows_of(counting(5), counting(50, source=1, first=5), weights=[1, 4], unit="tokens"), window)
    assert sum(number % 1000 < 5 for number in numbers) == round(window / 5)


@given(st.integers(1, 30), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_every_example_comes_once_a_pass(size, buffer):
    """Rows of a window are shuffled, so the last epochs are not whole."""
    numbers = taken(rows_of(counting(size), buffer=buffer), 2 * 64 * 8)
    times = Counter(numbers)
    assert set(times.values()) == {1}
    epochs = Counter(number // 1000 for number in numbers)
    whole, rest = divmod(len(numbers), size)
    assert [epochs[epoch] for epoch in range(whole)] == [size] * whole
    assert epochs[whole] == rest
    assert sum(epochs.values()) == whole * size + rest


def test_passes_of_a_run_have_their_own_orders(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 1)  # rows of one example in a window of one row: nothing else shuffles
    numbers = taken(rows_of(counting(20), row_tokens=1, buffer=20), 60)
    orders = [tuple(number % 1000 for number in numbers[start : start + 20]) for start in (0, 20, 40)]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert len(set(orders)) == 3
    assert [number // 1000 for number in numbers] == [0] * 20 + [1] * 20 + [2] * 20
    again = taken(rows_of(counting(20), row_tokens=1, buffer=20), 60)
    other = taken(rows_of(counting(20), row_tokens=1, buffer=20, seed=1), 60)
    assert again == numbers != other


def test_rows_of_a_window_are_shuffled_not_sorted_by_fill():
    def one_pass(epoch, stats):
        stats.kept += 30
        return (drawn(number, 1 + number % 6) for number in range(30))

    fills = [[rows.tokens(number) for number in range(40)] for rows in (rows_of(one_pass, seed=0) for _ in range(2))]
    assert fills[0] == fills[1] != sorted(fills[0], reverse=True)
    other = rows_of(one_pass, seed=1)
    assert [other.tokens(number) for number in range(40)] != fills[0]


def test_memory_is_bounded_by_the_buffer_and_a_window(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 4)
    alive, most = 0, []

    def gone():
        nonlocal alive
        alive -= 1

    def one_pass(epoch, stats):
        nonlocal alive
        stats.kept += 1
        for number in count():
            one = drawn(number)
            alive += 1
            most.append(alive)
            weakref.finalize(one, gone)
            yield one

    rows = rows_of(one_pass, row_tokens=8, buffer=50)
    taken(rows, 1000)
    assert len(most) >= 1000
    # of the window 4 x 8, of the buffer 50, one on its way into each of buffer, mix and window
    assert 50 + 4 * 8 <= max(most) <= 50 + 4 * 8 + 3


# who asks, and when


def read_on(rows, start=0):
    for number in range(start, 200):
        rows.at(number)


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer):
    return Encoder(tiny_tokenizer)


@pytest.fixture
def reading(encoder, monkeypatch):
    """reading(source, ...) -> rows read from these sources, in small windows."""
    monkeypatch.setattr(stream, "WINDOW_ROWS", 2)

    def make(*sources, max_length=256, readers=None, **changes):
        settings = {"row_tokens": 256, "row_images": 4, "buffer": 5} | changes
        limits = Limits(max_length, settings["row_images"])
        read = [
            streamed_epochs(source, splitter(source, encoder, limits, seed=0), number)
            for number, source in enumerate(sources)
        ]
        return rows_of(*(readers or read), **settings)

    return make


def messages(*images, question="what color is it?", answer="red"):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def written(folder, *records, name="data.jsonl"):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return make_source("messages", (folder / name,), stream=True)


@pytest.fixture
def folder(tmp_path):
    """Two images, one that is broken, one that is missing."""
    for name, color in (("a", "red"), ("b", "blue")):
        PIL.Image.new("RGB", (6, 5), color).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def equal(one, other):
    tensors = [key for key in one if key != "layout"]
    assert one.keys() == other.keys()
    return one["layout"] == other["layout"] and all(torch.equal(one[key], other[key]) for key in tensors)


ASKED = 10


@given(st.lists(st.integers(0, ASKED - 1), max_size=4))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_is_the_same_whoever_asks_and_whatever_was_asked_before(reading, dialogue_folder, numbers):
    """Ranks and workers ask for some, a run that goes on begins in the middle; nobody has to ask in order."""
    source = make_source("messages", (dialogue_folder / "dialogues.jsonl",), turns=1)

    def rows():
        return reading(source, augment=Augment(flip=True, shift=1), blank_image=True)

    in_order = rows()
    whole = [in_order.at(number) for number in range(ASKED)]
    assert not any(equal(one, other) for one, other in pairwise(whole))
    asked = rows()
    for number in numbers:
        assert equal(asked.at(number), whole[number])
        assert equal(asked.at(number), whole[number])
    tokens, epochs = zip(*((in_order.tokens(number), in_order.epoch(number)) for number in range(ASKED)), strict=True)
    assert tokens == tuple(batch["input_ids"].shape[1] for batch in whole)
    # of rows between those asked for, and beyond them
    assert [(asked.tokens(number), asked.epoch(number)) for number in range(ASKED)] == list(
        zip(tokens, epochs, strict=True)
    )
    assert rows().epoch(ASKED - 1) == epochs[-1] > 0
    assert asked.source_stats[0].to_json() == in_order.source_stats[0].to_json()


def test_augmentation_is_drawn_anew_for_each_row(reading, folder):
    halves = PIL.Image.new("RGB", (4, 4), "red")
    halves.paste("blue", (0, 0, 2, 4))
    halves.save(folder / "halves.png")
    rows = reading(written(folder, messages("halves.png")), row_tokens=96, augment=Augment(flip=True))
    assert len({rows.at(number)["pixel_values"][0].numpy().tobytes() for number in range(12)}) == 2


def test_a_row_without_images_carries_a_black_one_if_asked(reading, folder):
    source = written(folder, messages())
    assert reading(source).at(0)["pixel_values"].shape == (0, 3, 4, 4)
    assert torch.equal(reading(source, blank_image=True).at(0)["pixel_values"], torch.zeros(1, 3, 4, 4))


def test_opening_images_is_for_rows_that_are_asked_for(reading, folder, monkeypatch):
    opened = []
    monkeypatch.setattr(stream, "open_image", lambda image: opened.append(image) or PIL.Image.new("RGB", (4, 4)))
    rows = reading(written(folder, messages("a.png"), messages("b.png")))
    batch = rows.at(5)
    assert len(opened) == len(batch["pixel_values"]) > 0
    assert rows.tokens(4) > 0
    assert len(opened) == len(batch["pixel_values"])


@given(st.integers(80, 300), st.integers(1, 3), st.integers(1, 30))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_keeps_both_budgets(reading, dialogue_folder, row_tokens, row_images, buffer):
    source = make_source("messages", (dialogue_folder / "dialogues.jsonl",))
    rows = reading(source, max_length=row_tokens, row_tokens=row_tokens, row_images=row_images, buffer=buffer)
    for number in range(12):
        batch = rows.at(number)
        assert batch["input_ids"].shape[1] == rows.tokens(number) <= row_tokens
        assert len(batch["pixel_values"]) <= row_images
        assert batch["image_index"].max() < max(len(batch["pixel_values"]), 1)


def test_rows_hold_the_examples_of_the_records_and_their_images(reading, folder, tiny_tokenizer):
    rows = reading(written(folder, messages("a.png", answer="red"), messages("b.png", answer="blue")), row_tokens=512)
    batch = rows.at(0)
    texts = [tiny_tokenizer.decode(ids).replace(" ", "") for ids in sequences(batch)]
    fake = "<fake_token_around_image>"
    question = f"<s>User:{fake}<image>{fake}whatcolorisit?<end_of_utterance>\nAssistant:"
    assert set(texts) == {f"{question}{answer}<end_of_utterance></s>" for answer in ("red", "blue")}
    shown = {}
    for text, stop in zip(texts, batch["layout"].sequence_starts[1:], strict=True):
        image = batch["pixel_values"][batch["image_index"][0, stop - 1]]
        shown["red" in text] = image[:, 0, 0].tolist()
    assert shown == {True: [1, -1, -1], False: [-1, -1, 1]}  # of mean and deviation 0.5: all red, all blue


# source_stats


KINDS = {
    "good": (messages("a.png"), None),
    "no image": (messages(), None),
    "not JSON": ("{broken", "not JSON"),
    "empty answer": (messages(answer=" "), "empty answer"),
    "prompt": ({"messages": [{"role": "user", "content": "hi"}]}, "no answer to the last question"),
    "too long": (messages(question="what? " * 200), "too long"),
    "too many images": (messages("a.png", "b.png", "broken.png"), "too many images"),
    "corrupt": (messages("broken.png"), "corrupt image"),
    "corrupt, and another": (messages("a.png", "broken.png"), "corrupt image"),
    "missing": (messages("none.png"), "missing image"),
}


@given(
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=8),
    st.none() | st.integers(1, 8),
    st.integers(1, 10),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_is_kept_and_rejected_at_any_row_and_nothing_is_read_beyond_the_limit(
    reading, folder, monkeypatch, kinds, limit, buffer
):
    monkeypatch.setattr(stream, "TOKENISED_AT_ONCE", 2)
    kinds = ["good", *kinds]
    source = written(folder, *(KINDS[kind][0] for kind in kinds))
    rows = reading(make_source(source.format, source.paths, stream=True, limit=limit), buffer=buffer, row_images=2)
    for number in range(12):  # enough for every record to have been in a row, and in further epochs
        rows.at(number)
        (stats,) = rows.source_stats
        assert stats.to_json()["read"] <= len(kinds)
        assert stats.kept >= 0
    reasons = [KINDS[kind][1] for kind in kinds[:limit]]
    assert rows.epoch(11) > 0
    assert (stats.read, stats.limited) == (len(reasons), limit is not None and limit <= len(kinds))
    assert stats.kept == reasons.count(None)
    assert stats.rejected == Counter(reason for reason in reasons if reason)
    assert stats.parts_rejected == {}


def test_going_back_counts_nothing_twice(reading, folder):
    rows = reading(written(folder, messages("a.png"), messages("broken.png"), "{broken"))
    for number in (0, 1, 2, 0, 3):
        rows.at(number)
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept) == (3, 1)
    assert stats.rejected == {"corrupt image": 1, "not JSON": 1}
    assert stats.first_rejected["corrupt image"].startswith("data.jsonl:2: ")


def test_an_image_that_cannot_be_opened_takes_its_example_out_of_the_row_in_every_pass(reading, folder, tiny_tokenizer):
    records = [messages("a.png", answer="red"), messages("a.png", "broken.png", answer="two"), messages(answer="no")]
    rows = reading(written(folder, *records))
    texts = Counter(
        tiny_tokenizer.decode(ids).partition("Assistant: ")[2].partition("<")[0]
        for number in range(30)
        for ids in sequences(rows.at(number))
    )
    assert rows.epoch(29) > 2
    assert texts.keys() - {""} == {"red", "no"}  # "": a row of which nothing is left
    assert all(rows.at(number)["pixel_values"].isfinite().all() for number in range(30))


def test_document_goes_on_without_an_image_as_in_preparing(reading, folder, tiny_tokenizer, tmp_path):
    pages = [
        {"images": ["a.png", None, "broken.png", None], "texts": [None, "red", None, "two"]},
        {"images": ["broken.png", None], "texts": [None, "lost"]},
        {"images": ["none.png", None, "b.png", None], "texts": [None, "no", None, "blue"]},
    ]
    paths = written(folder, *pages).paths
    rows = reading(make_source("obelics", paths, stream=True), row_tokens=512)
    batch = rows.at(0)
    image = "<fake_token_around_image><image><fake_token_around_image>"
    texts = {tiny_tokenizer.decode(ids).replace(" ", "").replace("\n", "") for ids in sequences(batch)}
    assert texts == {f"<s>{image}red", "<s>two</s>", f"<s>no{image}blue</s>"}
    for number in range(1, 6):
        rows.at(number)
    (stats,) = rows.source_stats
    settings = {"max_length": 512, "max_images": 4, "seed": 0, "folder": tmp_path / "made"}
    _, (prepared,) = prepare([make_source("obelics", paths)], tiny_tokenizer, **settings)
    facts = ("read", "kept", "rejected", "parts_rejected")
    assert {name: getattr(stats, name) for name in facts} == {name: getattr(prepared, name) for name in facts}
    assert (stats.kept, stats.parts_rejected) == (2, {"corrupt image": 1, "missing image": 1})
    again = reading(make_source("obelics", paths, stream=True), row_tokens=512)
    again.restore(rows.state(6))
    again.at(0)
    assert again.source_stats == rows.source_stats


def test_a_row_of_which_nothing_is_left_is_one_unsupervised_token(reading, folder, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 1)
    rows = reading(written(folder, messages("broken.png"), messages(answer="blue")), row_tokens=96, max_length=96)
    lost = [number for number in range(8) if rows.at(number)["labels"].max() == -100]
    assert 0 < len(lost) < 8
    assert rows.at(lost[0])["input_ids"].tolist() == [[FILLER]]
    assert rows.tokens(lost[0]) == 0


def test_a_record_of_several_examples_is_rejected_with_its_last(reading, folder):
    turns = [turn for answer in ("a", "b", "c") for turn in messages(answer=answer)["messages"]]
    both = [*turns, *messages("broken.png")["messages"]]  # the last of four examples shows the broken image
    broken = [*messages("broken.png")["messages"], *turns]  # all four do
    source = written(folder, {"messages": both}, {"messages": broken})
    rows = reading(make_source(source.format, source.paths, stream=True, turns=1))
    for number in range(20):
        rows.at(number)
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.examples) == (2, 1, 8)
    assert stats.rejected == {"corrupt image": 1}
    assert stats.parts_rejected == {"corrupt image": 4}  # one of the first record, three of the second


def test_a_source_with_nothing_usable_is_an_error_with_the_reasons(reading, folder):
    good = written(folder, messages("a.png"), name="good.jsonl")
    bad = written(folder, "{broken", messages(answer=""), messages(answer=""), name="bad.jsonl")
    with pytest.raises(UserError) as raised:
        reading(good, bad, weights=[1, 1]).at(0)
    assert str(raised.value).splitlines()[0] == "source 1: no dialogue is left:"
    assert "source 1: 1 x not JSON (first: bad.jsonl:1: " in str(raised.value)
    assert "source 1: 2 x empty answer (first: bad.jsonl:2: turn 2)" in str(raised.value)
    with pytest.raises(UserError, match="source 0: no dialogue is left:\n  the sources are empty"):
        reading(written(folder, name="empty.jsonl")).at(0)


def test_a_source_whose_images_can_none_be_opened_is_an_error_once_that_is_known(reading, folder, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 1)
    rows = reading(written(folder, messages("broken.png"), messages("none.png")))
    with pytest.raises(UserError, match=r"source 0: 1 x corrupt image \(first: data\.jsonl:1: "):
        read_on(rows)


def test_a_source_that_has_become_empty_is_an_error(reading, folder):
    source = written(folder, messages())
    rows = reading(source)
    rows.at(0)
    written(folder)
    with pytest.raises(UserError, match="source 0: no dialogue is left"):
        read_on(rows, start=1)


# what the epochs do to records


def test_turns_bound_and_documents_are_cut(reading, encoder, folder):
    turns = [turn for answer in ("a", "b", "c") for turn in messages(answer=answer)["messages"]]
    source = written(folder, {"messages": turns}, messages())
    rows = reading(make_source(source.format, source.paths, stream=True, turns=2))
    rows.at(0)
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.dialogues, stats.examples) == (2, 2, 2, 3)

    (folder / "long.jsonl").write_text(json.dumps({"texts": ["a red ball. " * 4] * 6, "images": [None] * 6}) + "\n")
    rows = reading(make_source("obelics", (folder / "long.jsonl",), stream=True), max_length=64)
    for number in range(6):
        starts = rows.at(number)["layout"].sequence_starts
        assert max(stop - start for start, stop in pairwise(starts)) <= 64
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.documents_cut) == (1, 1, 1)
    assert stats.examples > 1


def test_a_stream_is_read_no_further_than_it_must(reading, folder, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 1)
    rows = reading(written(folder, *[messages()] * 400), row_tokens=64, max_length=64)
    rows.at(0)
    (stats,) = rows.source_stats
    assert stats.read == stats.kept == TOKENISED_AT_ONCE
    assert stats.examples == stats.dialogues == TOKENISED_AT_ONCE


def test_prepared_and_streamed_sources_together(reading, encoder, folder, tiny_tokenizer):
    streamed = written(folder, *[messages(answer="blue")] * 3)
    other = written(folder, messages("a.png", answer="red"), messages(answer="red"), "{broken", name="other.jsonl")
    prepared, _ = prepare([other], tiny_tokenizer, max_length=64, max_images=4, seed=0, folder=folder / "prepared")

    def rows():
        readers = [
            streamed_epochs(streamed, splitter(streamed, encoder, Limits(64, 4), seed=0), 0),
            prepared_epochs(prepared.sets[0], 1, 0),
        ]
        return reading(readers=readers, weights=[1, 3], row_tokens=128)

    first, alone = rows(), rows()
    answers = Counter()
    for number in range(64):
        batch = first.at(number)
        answers.update(tiny_tokenizer.decode(ids).partition("Assistant: ")[2][:3] for ids in sequences(batch))
    assert answers["red"] == pytest.approx(3 * answers["blu"], abs=12)
    assert answers.keys() == {"red", "blu"}
    assert equal(alone.at(63), batch)
    assert [stats.read for stats in first.source_stats] == [3, 3]
    assert first.source_stats[1].rejected == {"not JSON": 1}
    (folder / "a.png").unlink()
    with pytest.raises(RecordError, match="missing image"):
        read_on(first)


def test_a_prepared_source_of_which_nothing_is_left_says_why(reading, folder, tiny_tokenizer):
    bad = written(folder, "{broken", name="bad.jsonl")
    prepared, _ = prepare([bad], tiny_tokenizer, max_length=64, max_images=4, seed=0, folder=folder / "prepared")
    with pytest.raises(UserError, match="source 0: 1 x not JSON"):
        rows_of(prepared_epochs(prepared.sets[0], 0, 0)).at(0)


class Fetched:
    """Stands for a Downloader: knows one URL."""

    def __init__(self, known):
        self.known, self.asked = known, []

    def fetch_all(self, urls):
        self.asked.append(sorted(urls))
        return {url: self.known.get(url, RecordError("download failed", url)) for url in urls}


def test_images_that_are_urls_are_fetched_with_their_row(reading, folder):
    urls = ["https://example.org/a.png", "https://example.org/gone.png"]
    source = written(folder, *map(messages, urls))
    fetched = Fetched({urls[0]: folder / "a.png"})
    rows = reading(make_source(source.format, source.paths, stream=True, download=True), downloader=fetched)
    batch = rows.at(0)
    assert set(fetched.asked[0]) <= set(urls)
    for number in range(1, 8):
        batch = rows.at(number)
        assert len(batch["pixel_values"]) <= 1
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.rejected) == (2, 1, {"download failed": 1})
    assert stats.first_rejected == {"download failed": "data.jsonl:2: https://example.org/gone.png"}


def test_sizes_and_accounts_are_known_while_images_are_downloaded(reading, folder):
    url = "https://example.org/a.png"
    source, begun, go_on = written(folder, messages(url)), Event(), Event()

    class Slow(Fetched):
        def fetch_all(self, urls):
            begun.set()
            assert go_on.wait(30)
            return super().fetch_all(urls)

    streamed = make_source(source.format, source.paths, stream=True, download=True)
    rows = reading(streamed, downloader=Slow({url: folder / "a.png"}))
    with ThreadPoolExecutor(2) as pool:
        row = pool.submit(rows.at, 0)
        assert begun.wait(30)
        asked = pool.submit(lambda: (rows.tokens(0), rows.epoch(0), rows.source_stats[0].read, rows.state(9)))
        try:
            tokens, epoch, read, lost = asked.result(timeout=30)
        finally:
            go_on.set()
    assert (tokens, epoch, lost) == (len(row.result()["input_ids"][0]), 0, [])
    assert read >= 1


def test_only_sources_that_allow_it_download(folder):
    assert downloads(folder, [make_source("messages"), make_source("obelics")]) is None
    assert downloads(folder, [make_source("messages"), make_source("obelics", download=True)]) is not None


def test_a_streamed_file_that_breaks_off_ends_the_run_or_is_kept_and_reported_once(folder, reading):
    lines = [json.dumps(messages()) for _ in range(3)]
    path = folder / "broken.json"
    path.write_text(f"[{', '.join(lines)}, tru")
    with pytest.raises(UserError, match=r"broken\.json: the file breaks off: not JSON: .* 3 records were read before"):
        reading(make_source("messages", (path,), stream=True)).at(0)
    rows = reading(make_source("messages", (path,), stream=True, on_broken="keep"), buffer=2)
    for number in range(8):
        rows.at(number)
    (stats,) = rows.source_stats
    assert rows.epoch(7) > 1
    assert (stats.read, stats.kept, dict(stats.rejected)) == (3, 3, {})
    (broken,) = stats.broken
    assert broken.startswith(f"{path} breaks off: not JSON: Expecting value at byte ")
