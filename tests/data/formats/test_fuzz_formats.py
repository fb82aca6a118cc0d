"""Readers of data on files changed at random: the only outcomes are records, counted rejections and one-line errors.

`FUZZ=20000 pytest tests/test_fuzz.py` tries that many inputs of each kind, drawn anew each time.
"""

import base64
import gzip
import json
import subprocess
import sys

import fuzz_files
import pytest
import zstandard
from fuzz_files import check_images, check_reading
from fuzzing import EXAMPLES, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.formats import FORMATS

TEXTS = fuzz_files.texts()
DONOR = fuzz_files.PNG + b'{"a": [NaN, "\xff\\ud800", 1e999]},\r\0'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("suffix", TEXTS)
@fuzz(40)
@given(data=st.data())
def test_fuzz_files(suffix, folder, data):
    path = folder / f"f{suffix}"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(TEXTS[suffix])), donor=DONOR)))
    check_reading(path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.zst", ".csv.gz", ".tgz", ".tar.zst"])
@fuzz(20)
@given(data=st.data())
def test_fuzz_inside_of_compressed_files(suffix, folder, data):
    pack, unpack = (
        (gzip.compress, gzip.decompress) if suffix[-2:] == "gz" else (zstandard.compress, zstandard.decompress)
    )
    path = folder / f"f{suffix}"
    path.write_bytes(pack(data.draw(damaged(unpack(TEXTS[suffix][0]), donor=DONOR))))
    check_reading(path)


NAMES = [name for name in FORMATS if not name.startswith("easy_vqa")]
WORDS = ("messages", "role", "content", "images", "image", "type", "text", "conversations", "from", "value", "answers")
VALUES = st.recursive(
    st.sampled_from(
        [None, True, 0, -1, 2**70, 1.5, "", "user", "assistant", "human", "gpt", "<image>", "\ud800", "a.png"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORDS, "\udcff"]), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", NAMES)
@fuzz(25)
@given(
    record=st.sampled_from(fuzz_files.LINES),
    changes=st.dictionaries(st.text(max_size=2) | st.sampled_from(WORDS), VALUES),
)
def test_fuzz_records(folder, name, record, changes):
    """Whatever stands in a record's fields, every format makes a dialogue of it or rejects it."""
    known = dict(zip(record, changes.values(), strict=False))
    path = folder / "records.jsonl"
    path.write_text("\n".join(json.dumps({**record, **new}) for new in (changes, known)))
    check_reading(path, formats=[name])


STORES = {
    ".zip": fuzz_files.zipped(),
    ".tar": fuzz_files.archive(),
    ".json": json.dumps(
        {"a.png": base64.b64encode(fuzz_files.PNG).decode(), "b/a.png": "data:image/png;base64,AA=="}
    ).encode(),
}


@pytest.mark.parametrize("suffix", STORES)
@fuzz(40)
@given(data=st.data(), name=st.text(max_size=6))
def test_fuzz_image_stores(suffix, folder, data, name):
    path = folder / f"store{suffix}"
    path.write_bytes(data.draw(damaged(STORES[suffix], donor=fuzz_files.PNG)))
    check_images(path, "a.png", "b/a.png", name)


def test_fuzz_tables(folder):
    """In a process of its own, whose end says more than that of the whole suite."""
    command = [sys.executable, fuzz_files.__file__, EXAMPLES or "400", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended with {done.returncode}; {folder}/last.* is the file\n{done.stderr[-4000:]}"
