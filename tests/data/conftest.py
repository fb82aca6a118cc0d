"""Fixtures of remote files, for all tests of data, and of streams."""

import json
import shutil
from itertools import pairwise

import pytest
from remote_files import cache, storage
from sources import make_source
from streamed import ASKED, LANES, equal, messages, reader_of, rows_of

from finetune.data.chunking import Limits, splitter
from finetune.data.stream_sources import PreparedReader
from finetune.data.tokenize import Encoder
from finetune.recipe.schema import Augment, Source

__all__ = ("cache", "storage")


@pytest.fixture(scope="module")
def encoder(tiny_tokenizer):
    return Encoder(tiny_tokenizer)


@pytest.fixture
def reading(encoder):
    """reading(source, ...) -> rows read from these sources, in small windows."""

    def make(*sources, max_length=256, block=5, **changes):
        settings = {"row_tokens": 256, "row_images": 4, "lanes": 1, "encoder": encoder, "window": 2} | changes
        limits, lanes = Limits(max_length, settings["row_images"]), settings["lanes"]
        readers = [
            reader_of(source, splitter(source, encoder, limits, seed=0), number, lanes=lanes, block=block)
            if isinstance(source, Source)
            else PreparedReader(source, number, 0, lanes)
            for number, source in enumerate(sources)
        ]
        return rows_of(*readers, limits=[getattr(source, "limit", None) for source in sources], **settings)

    return make


@pytest.fixture(scope="module")
def talk(dialogue_folder, tmp_path_factory):
    """The twelve dialogues, a line that is none, and one whose image is broken."""
    folder = tmp_path_factory.mktemp("talk")
    shutil.copytree(dialogue_folder, folder, dirs_exist_ok=True)
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    with (folder / "dialogues.jsonl").open("a") as file:
        file.write("\n{broken\n" + json.dumps(messages("broken.png")))
    return make_source("messages", (folder / "dialogues.jsonl",), stream=True, turns=1)


@pytest.fixture
def make_lanes(reading, talk):
    return lambda: reading(talk, lanes=LANES, augment=Augment(flip=True, shift=1), blank_image=True)


@pytest.fixture
def whole(make_lanes):
    """(rows, statistics) of one process that makes all rows in order."""
    rows = make_lanes()
    made = [rows.at(number) for number in range(ASKED)]
    assert not any(equal(one, other) for one, other in pairwise(made))
    assert rows.epoch(ASKED - 1) > 1
    (stats,) = rows.source_stats
    assert (stats.read, stats.kept) == (14, 12)
    assert stats.rejected == {"not JSON": 1, "corrupt image": 1}
    return made, stats
