"""The examples of a lane: mixed in the shares of their weights, shuffled in blocks, and read again from any place."""

import json
from collections import Counter
from itertools import islice

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source
from streamed import Counting, messages, reader_of, written

from finetune.data import shards, stream_sources
from finetune.data.chunking import Limits, splitter
from finetune.data.prepare import prepare
from finetune.data.shards import read_shard, shards_of
from finetune.data.stream_sources import Place, PreparedReader
from finetune.data.streaming import Mixture
from finetune.data.tokenize import Encoder

SOURCES = st.lists(
    st.tuples(st.floats(0.01, 50), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=9
)


def mixture(weights, lengths, unit, state=None):
    readers = [Counting(len(own), source=source, length=own.__getitem__) for source, own in enumerate(lengths)]
    return Mixture(readers, 0, weights, unit, state)


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@given(SOURCES)
@settings(max_examples=100, deadline=None)
def test_however_many_are_taken_each_source_has_its_share_to_one_example(unit, sources):
    weights, lengths = zip(*sources, strict=True)
    mixed = mixture(weights, lengths, unit)
    longest = max(max(own) for own in lengths) if unit == "tokens" else 1
    given_ = [0] * len(sources)
    for one in (mixed.draw() for _ in range(200)):
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
    mixed = mixture(weights, [[1] * 9, [2] * 9], unit)
    drawn = [mixed.draw() for _ in range(8)]
    assert "".join(str(one.source) for one in drawn) == sources
    for source in (0, 1):
        mine = [one.example.input_ids[0] for one in drawn if one.source == source]
        assert mine == list(range(len(mine)))


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_mix_goes_on_from_its_place(taken):
    whole, begun = (mixture([1, 2.5], [[1, 3], [2, 4, 1]], "tokens") for _ in range(2))
    order = [whole.draw().example.input_ids.tolist() for _ in range(60)]
    for _ in range(taken):
        begun.draw()
    resumed = mixture([1, 2.5], [[1, 3], [2, 4, 1]], "tokens", json.loads(json.dumps(begun.place())))
    assert [resumed.draw().example.input_ids.tolist() for _ in range(60 - taken)] == order[taken:]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """120 records whose answers are their numbers."""
    return written(tmp_path_factory.mktemp("numbered"), *[messages(answer=str(number)) for number in range(120)])


@pytest.fixture
def reader(numbered, tiny_tokenizer):
    how = splitter(numbered, Encoder(tiny_tokenizer), Limits(64, 4), seed=0)
    return lambda **changes: reader_of(numbered, how, **{"block": 8, **changes})


def records(reader, lane, wanted, start=None):
    """Line, epoch and place of the next examples of a lane."""
    return [
        (int(one.drawn.record_id.partition(":")[2]), one.drawn.epoch, one.place)
        for one in islice(reader.read(lane, start or Place()), wanted)
    ]


def test_lanes_share_an_epoch_out_and_take_every_share_in_turn(reader):
    lanes = [records(reader(lanes=3), lane, 120) for lane in range(3)]
    for epoch in range(3):
        found = Counter(line for lane in lanes for line, at, _ in lane if at == epoch)
        assert found == Counter(range(1, 121))
    for lane in lanes:
        assert sorted(line for line, _, _ in lane) == list(range(1, 121))
        assert {epoch for _, epoch, _ in lane} == {0, 1, 2}


def test_a_lane_reads_its_own_shards_alone(numbered, reader, monkeypatch):
    """A file of several ranges: a lane opens those of its share, and none twice."""
    monkeypatch.setattr(shards, "LEAST_BYTES", 512)
    monkeypatch.setattr(shards, "STREAM_BYTES", 1024)
    made = reader(lanes=3)
    ranges = shards_of(numbered, multiple_of=3)
    assert len(ranges) == len(made.shards) > 9
    opened = []

    def counted(source, shard):
        opened.append(shard)
        return read_shard(source, shard)

    monkeypatch.setattr(stream_sources, "read_shard", counted)
    for lane in range(3):
        list(islice((one for one in made.read(lane, Place()) if one.drawn.epoch), 1))
    # one more of each lane: the first of its next epoch
    assert {*opened} == {*ranges}
    assert Counter(opened).most_common()[0][1] <= 2
    assert len(opened) == len(ranges) + 3


def test_epochs_and_seeds_have_their_own_orders(reader):
    orders = [[line for line, at, _ in records(reader(), 0, 240) if at == epoch] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, 121))
    assert orders[0] != orders[1]
    assert [line for line, _, _ in records(reader(), 0, 120)] == orders[0]
    assert [line for line, _, _ in records(reader(seed=1), 0, 120)] != orders[0]


def test_records_are_shuffled_in_their_block(reader):
    lines = [line for line, _, _ in records(reader(block=8), 0, 120)]
    blocks = [lines[start : start + 8] for start in range(0, 120, 8)]
    assert [sorted(block) for block in blocks] == [list(range(start, start + 8)) for start in range(1, 121, 8)]
    assert sum(block == sorted(block) for block in blocks) == 0
    assert len({tuple(line - block[0] for line in block) for block in blocks}) > 9


@pytest.mark.parametrize("block", [8, 50])
@pytest.mark.parametrize("taken", [0, 1, 7, 8, 39, 40, 41, 100])
def test_a_reader_goes_on_from_a_place(reader, block, taken):
    made = reader(lanes=3, block=block)
    whole = records(made, 1, 130)
    place = Place(**json.loads(json.dumps(whole[taken][2].__dict__)))
    assert records(reader(lanes=3, block=block), 1, 130 - taken, place) == whole[taken:]


def test_a_prepared_source_is_shared_out_too(numbered, tiny_tokenizer, tmp_path):
    prepared, _ = prepare([numbered], tiny_tokenizer, max_length=64, max_images=4, seed=0, folder=tmp_path)
    reader = PreparedReader(prepared.sets[0], 0, 0, 7)
    lanes = [records(reader, lane, 40) for lane in range(7)]
    assert Counter(line for lane in lanes for line, epoch, _ in lane if epoch == 0) == Counter(range(1, 121))
    first, second = ([line for line, at, _ in lanes[0] if at == epoch] for epoch in range(2))
    assert first != second
    assert records(reader, 3, 30, lanes[3][10][2]) == lanes[3][10:]
    counted = [next(reader.read(lane, Place())).stats.kept for lane in range(7)]
    assert counted == [120, 0, 0, 0, 0, 0, 0]


def test_records_become_the_examples_they_become_when_prepared(tmp_path, tiny_tokenizer):
    """Whichever records stand together when they are tokenised."""
    PIL.Image.new("RGB", (6, 5), "red").save(tmp_path / "a.png")
    source = written(tmp_path, *[messages("a.png", answer="red " * number) for number in range(1, 70)])
    prepared, (stats,) = prepare(
        [source], tiny_tokenizer, max_length=100, max_images=4, seed=0, folder=tmp_path / "prepared"
    )
    reader = reader_of(source, splitter(source, Encoder(tiny_tokenizer), Limits(100, 4), seed=0), block=16)
    streamed = list(islice(reader.read(0, Place()), len(prepared.examples) + 1))
    assert [one.drawn.epoch for one in streamed] == [0] * len(prepared.examples) + [1]
    texts = {one.drawn.record_id: one.drawn.example.input_ids.tolist() for one in streamed[:-1]}
    made = zip(prepared.origins, prepared.examples, strict=True)
    assert texts == {record_id: example.input_ids.tolist() for (_, record_id), example in made}
    assert len(texts) < 69
    assert streamed[-1].stats.to_json() == {**stats.to_json(), "images": 0}  # which are counted when they are prepared


def test_how_many_records_are_tokenised_at_once_changes_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    turns = [turn for answer in "abcdef" for turn in messages(answer=answer)["messages"]]
    made = written(tmp_path, *[{"messages": turns}] * 9)
    source = make_source(made.format, made.paths, turns=3, ordered=False)
    reader = reader_of(source, splitter(source, Encoder(tiny_tokenizer), Limits(256, 4), seed=0), block=9)

    def examples(at_once):
        monkeypatch.setattr(stream_sources, "TOKENISED_AT_ONCE", at_once)
        found = list(islice(reader.read(0, Place()), 18))
        return [one.drawn.example.input_ids.tolist() for one in found], found[-1].stats.to_json()

    assert examples(3) == examples(9) == examples(64)
    assert examples(9)[1]["examples"] == 18
