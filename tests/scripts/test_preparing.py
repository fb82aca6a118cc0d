"""The benchmark of preparing: its made-up data is read whole, its ratios compare the right lines, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from preparing import _add
from preparing_data import make_images, write_data

from finetune.data.images import encoded
from finetune.data.read_dialogues import look, read_dialogues
from finetune.data.stats import SourceStats
from finetune.recipe.schema import Source

ROOT = Path(__file__).parents[2]

FIRST = {
    "text": ("text.jsonl:1", "What about number 0?"),
    "folder": ("images.jsonl:1", "Which shade is number 0?"),
    "parquet": ("train-00000.parquet#0", "Which shade is number 0?"),
    "tars": ("00000.tar/000000000", "Shade 0 of picture 0."),
    "photographs": ("00000.tar/000000000", "Shade 0 of picture 0."),
}


@pytest.mark.parametrize("kind", FIRST)
def test_made_up_data_is_read_whole(kind, tmp_path):
    keys = write_data(kind, 3, tmp_path / kind)
    source = Source(**{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()})
    stats = SourceStats("")
    records = list(read_dialogues(source, stats, look=look))
    assert (stats.read, dict(stats.rejected), dict(stats.ignored)) == (3, {}, {})
    record_id, (first,) = records[0]
    assert (record_id, first.turns[0].text) == FIRST[kind]
    images = [image for _, dialogues in records for image in dialogues[0].images]
    assert len(images) == (0 if kind == "text" else 3)
    shape = {"size": 512, "noise": 24} if kind == "photographs" else {}
    assert [encoded(image) for image in images] == list(make_images(3, **shape))[: len(images)]


def test_images_are_distinct():
    assert len(set(make_images(200))) == 200


def result(code, workers, seconds, machines=None):
    return {
        "kind": "text",
        "dialogues": 1000,
        "code": code,
        "workers": workers,
        "machines": machines,
        "seconds": seconds,
        "peak_memory_mb": 1,
        "stored_mb": 1.0,
        "read_mb": 1.0,
    }


def test_ratios_compare_what_differs_in_one_thing():
    results = []
    for one in (
        result("v1", 1, 40.0),
        result("now", 1, 20.0),
        result("v1", 2, 25.0),
        result("now", 2, 10.0),
        result("v1", 1, 80.0, machines=1),
        result("now", 1, 30.0, machines=1),
        result("now", 1, 15.0, machines=2),
    ):
        _add(results, one, "v1")
    assert [(one["of_one"], one["of_before"]) for one in results] == [
        (None, None),
        (None, 2.0),
        (1.6, None),
        (2.0, 2.5),
        (None, None),
        (None, 2.67),
        (2.0, None),
    ]


@pytest.mark.slow
def test_all_sides_prepare_the_same_dialogues(tmp_path):
    script = [sys.executable, "scripts/benchmarks/preparing.py", "--out", tmp_path, "--before", "HEAD"]
    command = [*script, "--datasets", "--nodes", "--only", "text=50", "parquet=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "preparing.json").read_text())
    text = [one for one in results if one["kind"] == "text"]
    assert [(one["code"], one["workers"], one["machines"]) for one in text] == [
        *((code, count, None) for count in (1, 2) for code in ("HEAD", "now", "datasets, passes", "datasets, pass")),
        *((code, 1, count) for count in (1, 2) for code in ("HEAD", "now")),
    ]
    assert {one["dialogues"] for one in text} == {50}
    assert len({one["tokens"] for one in text if not one["machines"]}) == 1
    assert {one["dialogues"] for one in results if one["kind"] == "parquet"} == {3}
    assert {len(one["read_mb"]) for one in results if one["machines"] == 2} == {2}
    assert (tmp_path / "preparing.png").read_bytes().startswith(b"\x89PNG")
