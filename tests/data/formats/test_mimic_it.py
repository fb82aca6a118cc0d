"""MIMIC-IT's instructions with those they are related to."""

import json

from data_files import PNG, read_format, write_files
from sources import make_source

from finetune.data.conversation import Image
from finetune.data.formats import FORMATS
from finetune.data.io.image_roots import ImageRoot


def test_mimic_it_related(tmp_path):
    first = {"instruction": "Who?", "answer": "Me.", "image_ids": ["cat.jpg"], "rel_ins_ids": []}
    second = {**first, "instruction": "Why?", "answer": "So.", "rel_ins_ids": ["I1"]}
    third = {**first, "instruction": "And?", "image_ids": ["dog.jpg", "cat.jpg"], "rel_ins_ids": ["I2", "I1"]}
    lost, twice = {**first, "rel_ins_ids": ["I1", "I9"]}, {**first, "rel_ins_ids": ["I1", "I6"]}
    data = {"I3": third, "I1": first, "I2": second, "I4": lost, "I5": 7, "I6": twice}
    (path,) = write_files(tmp_path, d__json={"meta": {"version": "1"}, "data": data})
    assert read_format("mimic_it", path) == [
        {**third, "related": [second, first]},
        {**first, "related": []},
        {**second, "related": [first]},
        ("related instruction missing", "I4 is related to I9, which is not there"),
        ("unknown content", '"I5": expected an object, got 7'),
        ("related instruction repeated", "I6 is related to I1, I6"),
    ]


def test_mimic_it_images_again(tmp_path):
    """Images are shown again only where others were shown in between."""
    for name in ("cat.jpg", "dog.jpg"):
        (tmp_path / name).write_bytes(PNG)
    root = ImageRoot(make_source("mimic_it", image_root=(tmp_path,)))
    cat, dog = (Image((tmp_path / name).resolve()) for name in ("cat.jpg", "dog.jpg"))
    who = {"instruction": "Who?", "answer": "Me."}
    related = [{**who, "image_ids": ids} for ids in (["cat.jpg"], ["cat.jpg"], [], ["cat.jpg"], ["dog.jpg"])]
    turns = FORMATS["mimic_it"].convert({**who, "image_ids": ["cat.jpg"], "related": related}, root).turns
    assert [turn.images for turn in turns[::2]] == [(cat,), (), (), (), (dog,), (cat,)]
    assert {turn.text for turn in turns[::2]} == {"Who?"}


def test_mimic_it_copies(tmp_path):
    record = {"instruction": "Who?", "answer": "Me.", "images": ["cat.jpg"]}
    assert read_format("mimic_it", *write_files(tmp_path, c__jsonl=record)) == [record]
    paths = write_files(
        tmp_path, list__json=[record, record], lines__json=f"{json.dumps(record)}\n{json.dumps(record)}"
    )
    assert [read_format("mimic_it", path) for path in paths] == [[record, record]] * 2
