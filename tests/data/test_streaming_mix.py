"""Examples of sources, pass after pass: mixed in the shares of their weights, shuffled, and those of their records."""

from itertools import count, islice

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source
from test_streaming import drawn, messages, written

from finetune.data import streaming as stream
from finetune.data.chunking import Limits, splitter
from finetune.data.prepare import prepare
from finetune.data.stats import SourceStats
from finetune.data.streaming import mix, shuffle, streamed_epochs
from finetune.data.tokenize import Encoder

SOURCES = st.lists(
    st.tuples(st.floats(0.01, 50), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=9
)


def endless(source, lengths):
    return (drawn(turn, lengths[turn % len(lengths)], source=source) for turn in count())


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@given(SOURCES)
@settings(max_examples=100, deadline=None)
def test_however_many_are_taken_each_source_has_its_share_to_one_example(unit, sources):
    weights = [weight for weight, _ in sources]
    streams = [endless(number, lengths) for number, (_, lengths) in enumerate(sources)]
    longest = max(max(lengths) for _, lengths in sources) if unit == "tokens" else 1
    given_ = [0] * len(sources)
    for one in islice(mix(streams, weights, unit=unit), 200):
        given_[one.source] += len(one.example) if unit == "tokens" else 1
        for got, weight in zip(given_, weights, strict=True):
            assert abs(got - weight / sum(weights) * sum(given_)) < longest * (1 + 1e-9)


@pytest.mark.parametrize(
    ("weights", "unit", "sources"),
    [
        ([1, 1], "examples", "01010101"),
        ([3, 1], "examples", "00010001"),
        ([1, 3], "examples", "11011101"),
        ([3, 1], "tokens", "00010000"),  # the second one's examples have two tokens each
    ],
)
def test_a_mix_by_hand(weights, unit, sources):
    mixed = list(islice(mix([endless(0, [1]), endless(1, [2])], weights, unit=unit), 8))
    assert "".join(str(one.source) for one in mixed) == sources
    for source in (0, 1):
        mine = [one.example.input_ids[0] for one in mixed if one.source == source]
        assert mine == list(range(len(mine)))


def test_a_source_that_ends_begins_again_in_another_order():
    orders = [
        [one.example.input_ids[0] for one in shuffle(map(drawn, range(20)), np.random.default_rng(seed), buffer=20)]
        for seed in range(2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != orders[1]


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_example_comes_earlier_than_the_buffer_allows(size, buffer, seed):
    rng = np.random.default_rng(seed)
    order = [int(one.example.input_ids[0]) for one in shuffle(map(drawn, range(size)), rng, buffer=buffer)]
    assert sorted(order) == list(range(size))
    assert all(place >= number - buffer for place, number in enumerate(order))


def test_records_become_the_examples_they_become_when_prepared(tmp_path, tiny_tokenizer):
    """Whichever records stand together when they are tokenised."""
    PIL.Image.new("RGB", (6, 5), "red").save(tmp_path / "a.png")
    records = [messages("a.png", answer="red " * number) for number in range(1, 70)]
    source = written(tmp_path, *records)
    prepared, (stats,) = prepare(
        [source], tiny_tokenizer, max_length=100, max_images=4, seed=0, folder=tmp_path / "prepared"
    )
    streamed = SourceStats(source.name)
    one_pass = streamed_epochs(source, splitter(source, Encoder(tiny_tokenizer), Limits(100, 4), seed=0), 0)
    texts = [one.example.input_ids.tolist() for one in one_pass(0, streamed)]
    assert texts == [example.input_ids.tolist() for example in prepared.examples]
    assert len(texts) < len(records)
    assert streamed.to_json() == {**stats.to_json(), "images": 0}  # which are counted when they are prepared


def test_how_many_records_are_tokenised_at_once_changes_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    turns = [turn for answer in "abcdef" for turn in messages(answer=answer)["messages"]]
    made = written(tmp_path, *[{"messages": turns}] * 9)
    source = make_source(made.format, made.paths, turns=3, ordered=False)
    one_pass = streamed_epochs(source, splitter(source, Encoder(tiny_tokenizer), Limits(256, 4), seed=0), 0)

    def examples(at_once):
        monkeypatch.setattr(stream, "TOKENISED_AT_ONCE", at_once)
        stats = SourceStats(source.name)
        return [one.example.input_ids.tolist() for one in one_pass(0, stats)], stats.to_json()

    assert examples(2) == examples(9) == examples(64)
    assert len(examples(9)[0]) == 18
