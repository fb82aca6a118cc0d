"""Rows made while a source is read: the same for whoever asks, every record accounted for, memory bounded."""

import json
import weakref
from collections import Counter
from itertools import count, islice, pairwise

import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import make_source
from streamed import ASKED, FILLER, LANES, Counting, drawn, equal, messages, rows_of, sequences, written

from finetune.data import stream_sources
from finetune.data import streaming as stream
from finetune.data.conversation import RecordError
from finetune.data.prepare import prepare
from finetune.data.read_dialogues import try_dialogue
from finetune.data.stats import SourceStats
from finetune.data.stream_sources import Coming, Place
from finetune.data.streaming import downloaders
from finetune.recipe.schema import Augment
from modeling.errors import UserError


def taken(rows, wanted):
    """The first so many examples of counting epochs, row after row."""
    numbers = (ids[0] for number in count() for ids in sequences(rows.at(number)))
    return list(islice(numbers, wanted))


# mixed, epoch after epoch


def test_weights_decide_how_often_a_source_is_in_the_rows():
    drawn_ = 5 * (stream.WINDOW_ROWS + 1) * 8  # five windows
    numbers = taken(rows_of(Counting(5), Counting(50, source=1, first=5), weights=[1, 4], unit="tokens"), drawn_)
    assert sum(number % 1000 < 5 for number in numbers) == drawn_ / 5


@pytest.mark.parametrize("lanes", [1, 3, 4])
@given(st.integers(1, 15))
@settings(max_examples=8, deadline=None)
def test_every_example_comes_once_an_epoch_and_once_in_as_many_epochs_of_a_lane_as_there_are_lanes(lanes, size):
    """Rows of a window are shuffled, so the last epochs are not whole."""
    rows = rows_of(Counting(size, lanes=lanes), lanes=lanes, row_tokens=1)
    made = [(number % lanes, int(rows.at(number)["input_ids"][0, 0])) for number in range(lanes * 60)]
    numbers = Counter(number for _, number in made)
    assert set(numbers.values()) == {1}
    whole = min(number // 1000 for _, number in made[-8 * lanes :]) - 1
    by_epoch = Counter(number // 1000 for number in numbers)
    assert all(by_epoch[epoch] == size for epoch in range(whole))
    for lane in range(lanes):
        first = [number % 1000 for of, number in made if of == lane and number // 1000 < lanes]
        if whole >= lanes:
            assert sorted(first) == list(range(size))


def test_rows_of_a_window_are_shuffled_not_sorted_by_fill():
    def fills(seed):
        rows = rows_of(Counting(30, length=lambda number: 1 + number % 6), seed=seed)
        return [rows.at(number)["input_ids"].shape[1] for number in range(40)]

    assert fills(0) == fills(0) != sorted(fills(0), reverse=True)
    assert fills(1) != fills(0)


def test_memory_is_bounded_by_a_window_for_each_lane():
    alive, most = 0, []

    def gone():
        nonlocal alive
        alive -= 1

    class Endless:
        def read(self, lane, start):
            nonlocal alive
            for number in count():
                one = drawn(number)
                alive += 1
                most.append(alive)
                weakref.finalize(one, gone)
                yield Coming(one, Place(index=number), SourceStats("endless"))

    rows = rows_of(Endless(), row_tokens=8, lanes=3)
    taken(rows, 3000)
    assert len(most) >= 3000
    window = (stream.WINDOW_ROWS + 1) * 8
    assert 3 * window <= max(most) <= 3 * (window + 2)  # the next one of each lane, and one on its way


# who asks, and when


def read_on(rows, start=0):
    for number in range(start, 200):
        rows.at(number)


@pytest.fixture
def folder(tmp_path):
    """Two images, one that is broken, one that is missing."""
    for name, color in (("a", "red"), ("b", "blue")):
        PIL.Image.new("RGB", (6, 5), color).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def test_rows_in_any_order(make_lanes, whole):
    rows = make_lanes()
    for number in (3, 17, 17, 2, 38, 0, 5, 38, *range(ASKED)):
        assert equal(rows.at(number), whole[0][number])
    assert rows.source_stats[0] == whole[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_of_several_processes(make_lanes, whole, processes):
    """Every process makes its own rows alone; their states together are the state of one process."""
    ranks = [make_lanes() for _ in range(processes)]
    for number in range(ASKED):
        assert equal(ranks[number % processes].at(number), whole[0][number])
    gathered = make_lanes()
    gathered.restore([one for rank in ranks for one in rank.state(ASKED)])
    assert gathered.source_stats[0] == whole[1]
    assert [len(rank.state(ASKED)) for rank in ranks] == [LANES // processes] * processes


@pytest.mark.parametrize("trained", range(0, ASKED, 3))
def test_rows_go_on_from_the_state_of_those_trained_on(make_lanes, whole, trained):
    """Rows that were taken ahead of the last step are made again."""
    rows = make_lanes()
    for number in range(min(trained + 3, ASKED)):
        rows.at(number)
    resumed = make_lanes()
    resumed.restore(json.loads(json.dumps(rows.state(trained))))
    for number in range(trained, ASKED):
        assert equal(resumed.at(number), whole[0][number])
    assert resumed.source_stats[0] == whole[1]


@pytest.mark.parametrize(
    ("most", "processes", "workers"), [(0, 1, 0), (1, 1, 1), (5, 1, 4), (64, 1, 12), (5, 2, 3), (5, 12, 1)]
)
def test_workers_divide_the_lanes_evenly(most, processes, workers):
    assert rows_of(Counting(9), lanes=12).workers(most, processes=processes) == workers


def test_resuming_converts_the_last_blocks_alone(make_lanes, whole, monkeypatch):
    rows = make_lanes()
    for number in range(ASKED):
        rows.at(number)
    resumed, converted = make_lanes(), []
    resumed.restore(rows.state(ASKED))
    monkeypatch.setattr(stream_sources, "try_dialogue", lambda *args: converted.append(args[0]) or try_dialogue(*args))
    for number in range(ASKED, ASKED + LANES):
        resumed.at(number)
    assert 0 < len(converted) <= LANES * 6 * 5  # for each lane a window of two rows, and more to choose its end


def test_a_state_of_other_lanes_is_refused(make_lanes, whole):
    state = make_lanes().state(1)
    assert state == []
    with pytest.raises(UserError, match="expected that of 4 lanes, got 8\n  start the run again"):
        make_lanes().restore([{"lanes": 8, "row": 3}])
    with pytest.raises(UserError, match='expected that of 4 lanes, got "another version\'s"'):
        make_lanes().restore([[3, 0, 0, "data.jsonl:1", 1, "corrupt image", "", False]])


def test_the_dialogues_of_a_row_alone(make_lanes, whole):
    """As after a loss spike: the row was taken, and others were taken since."""
    rows = make_lanes()
    for number in range(LANES * 4):
        rows.at(number)
    for number in range(LANES * 2, LANES * 3):
        alone = rows.dialogues(number)
        assert [ids for _, batch in alone for ids in sequences(batch)] == sequences(whole[0][number])
        assert all(source == "source 0" and "dialogues.jsonl:" in record_id for (source, record_id), _ in alone)
    assert rows.source_stats[0].parts_rejected == {}


def test_skipped_records_leave_their_rows_and_nothing_else_changes(make_lanes, whole):
    name, skipping = "dialogues.jsonl:3", make_lanes()
    skipping.skipped = frozenset({("source 0", name)})
    plain, found = make_lanes(), 0
    for number in range(ASKED):
        left = [batch for (_, record_id), batch in _alone(plain, number) if record_id != name]
        found += len(_alone(plain, number)) - len(left)
        skipped = [batch for _, batch in _alone(skipping, number)]
        assert all(equal(one, other) for one, other in zip(left, skipped, strict=True))
    assert found > 2


def _alone(rows, number):
    rows.at(number)
    return rows.dialogues(number)


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


@given(st.integers(80, 300), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_keeps_both_budgets(reading, dialogue_folder, row_tokens, row_images, lanes):
    source = make_source("messages", (dialogue_folder / "dialogues.jsonl",))
    rows = reading(source, max_length=row_tokens, row_tokens=row_tokens, row_images=row_images, lanes=lanes)
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
    st.sampled_from([1, 2, 5]),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_is_kept_and_rejected_at_any_row_and_nothing_is_read_beyond_the_limit(
    reading, folder, monkeypatch, kinds, limit, block, lanes
):
    monkeypatch.setattr(stream_sources, "TOKENISED_AT_ONCE", 2)
    kinds = ["good", *kinds]
    source = written(folder, *(KINDS[kind][0] for kind in kinds))
    limited = make_source(source.format, source.paths, stream=True, limit=limit)
    rows = reading(limited, block=block, row_images=2, lanes=lanes)
    for number in range(12 * lanes):  # enough for every record to have been in a row, and in further epochs
        rows.at(number)
        (stats,) = rows.source_stats
        assert stats.to_json()["read"] <= len(kinds)
        assert stats.kept >= 0
    reasons = [KINDS[kind][1] for kind in kinds[:limit]]
    assert min(rows.epoch(number) for number in range(11 * lanes, 12 * lanes)) > 0
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
    rows = reading(
        written(folder, messages("broken.png"), messages(answer="blue")), row_tokens=96, max_length=96, window=1
    )
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
    assert str(raised.value).splitlines()[0] == f"{bad.name}: no dialogue is left:"
    assert f"{bad.name}: 1 x not JSON (first: bad.jsonl:1: " in str(raised.value)
    assert f"{bad.name}: 2 x empty answer (first: bad.jsonl:2: turn 2)" in str(raised.value)
    with pytest.raises(UserError, match="no dialogue is left:\n  the sources are empty"):
        reading(written(folder, name="empty.jsonl")).at(0)


@pytest.mark.parametrize("lanes", [3, 8])
def test_one_usable_record_is_enough_whichever_lane_meets_it(reading, folder, lanes):
    rows = reading(written(folder, "{broken", messages(), messages("broken.png"), name="one.jsonl"), lanes=lanes)
    for number in range(4 * lanes):
        rows.at(number)
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.rejected) == (3, 1, {"not JSON": 1, "corrupt image": 1})


def test_a_source_whose_images_can_none_be_opened_is_an_error_once_that_is_known(reading, folder):
    rows = reading(written(folder, messages("broken.png"), messages("none.png")), window=1)
    with pytest.raises(UserError, match=r"source 0: 1 x corrupt image \(first: data\.jsonl:1: "):
        read_on(rows)


def test_a_source_that_has_become_empty_is_an_error(reading, folder):
    source = written(folder, messages())
    rows = reading(source)
    rows.at(0)
    written(folder)
    with pytest.raises(UserError, match=r"data\.jsonl\[train\]: no dialogue is left"):
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


def test_a_stream_is_read_no_further_than_it_must(reading, folder):
    rows = reading(written(folder, *[messages()] * 400), row_tokens=64, max_length=64, block=100, window=1)
    rows.at(0)
    (stats,) = rows.source_stats
    assert stats.read == stats.kept == stats.dialogues == stats.examples == 100


def test_prepared_and_streamed_sources_together(reading, encoder, folder, tiny_tokenizer):
    streamed = written(folder, *[messages(answer="blue")] * 3)
    other = written(folder, messages("a.png", answer="red"), messages(answer="red"), "{broken", name="other.jsonl")
    prepared, _ = prepare([other], tiny_tokenizer, max_length=64, max_images=4, seed=0, folder=folder / "prepared")

    def rows():
        return reading(streamed, prepared.sets[0], weights=[1, 3], row_tokens=128, max_length=64, lanes=2)

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
    with pytest.raises(UserError, match=r"bad\.jsonl\[train\]: 1 x not JSON"):
        reading(prepared.sets[0]).at(0)


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
    rows = reading(make_source(source.format, source.paths, stream=True, download=True), downloaders=[fetched])
    batch = rows.at(0)
    assert set(fetched.asked[0]) <= set(urls)
    for number in range(1, 8):
        batch = rows.at(number)
        assert len(batch["pixel_values"]) <= 1
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept, stats.rejected) == (2, 1, {"download failed": 1})
    assert stats.first_rejected == {"download failed": "data.jsonl:2: https://example.org/gone.png"}


def test_only_sources_that_allow_it_download(folder):
    sources = [make_source("messages"), make_source("obelics", download=True), make_source("pairs", download="http")]
    none, https, http = downloaders(folder, sources)
    assert none is None
    assert (https._http, http._http) == (False, True)


def test_a_streamed_file_that_breaks_off_ends_the_run_or_is_kept_and_reported_once(folder, reading):
    lines = [json.dumps(messages()) for _ in range(3)]
    path = folder / "broken.json"
    path.write_text(f"[{', '.join(lines)}, tru")
    with pytest.raises(UserError, match=r"broken\.json: the file breaks off: not JSON: .* 3 records were read before"):
        reading(make_source("messages", (path,), stream=True)).at(0)
    rows = reading(make_source("messages", (path,), stream=True, on_broken="keep"), block=2, lanes=2)
    for number in range(8):
        rows.at(number)
    (stats,) = rows.source_stats
    assert rows.epoch(7) > 1
    assert (stats.read, stats.kept, dict(stats.rejected)) == (3, 3, {})
    (broken,) = stats.broken
    assert broken.startswith(f"{path} breaks off: not JSON: Expecting value at byte ")
