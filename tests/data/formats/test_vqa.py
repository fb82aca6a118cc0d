"""VQAv2's official files joined, and files that hold both."""

import gzip
import json

import pytest
from data_files import PNG, read_format, write_files
from sources import make_source

from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.formats import FORMATS
from finetune.data.io.image_roots import ImageRoot
from modeling.errors import UserError

QUESTIONS = {
    "info": {"year": 2014},
    "questions": [
        {"image_id": 9, "question": "What?", "question_id": 9000},
        {"image_id": 9, "question": "Where?", "question_id": 9001},
        {"image_id": 9, "question": "What again?", "question_id": 9000},
        {"image_id": 9, "question": "Why?"},
        "Who?",
        {"image_id": 8, "question": "How many?", "question_id": 8000},
    ],
    "data_subtype": "val2014",
}


ANNOTATIONS = {
    "annotations": [
        {"question_id": 8000, "image_id": 8, "multiple_choice_answer": "2", "answers": [{"answer": "2"}]},
        {"question_id": 7000, "image_id": 7, "multiple_choice_answer": "no", "answers": [{"answer": "no"}]},
        {"question_id": 9000, "image_id": 9, "multiple_choice_answer": "a net", "answers": [{"answer": "net"}]},
    ],
    "data_subtype": "val2014",
}


JOINED = [
    ("question_id repeated", "9000"),
    ("missing field", "expected \"question_id\", got {'image_id': 9, 'question': 'Why?'}"),
    {**QUESTIONS["questions"][5], **ANNOTATIONS["annotations"][0], "data_subtype": "val2014"},
    ("annotation without question", "question_id 7000"),
    {**QUESTIONS["questions"][0], **ANNOTATIONS["annotations"][2], "data_subtype": "val2014"},
    ("question without annotation", "question_id 9001"),
]


def test_vqa_joined(tmp_path):
    questions, annotations = write_files(tmp_path, q__json=QUESTIONS, a__json=ANNOTATIONS)
    joined = read_format("vqa", questions, annotations)
    (no_object,) = [error for error in joined if error not in JOINED]
    assert "'Who?'" in no_object[1]
    assert [record for record in joined if record != no_object] == JOINED
    assert read_format("vqa", annotations, questions) == joined
    assert read_format("vqa", tmp_path) == joined


def test_vqa_coco_file_names(tmp_path):
    (tmp_path / "COCO_val2014_000000000008.jpg").write_bytes(PNG)
    paths = write_files(tmp_path, q__json=QUESTIONS, a__json=ANNOTATIONS)
    source = make_source("vqa", paths=paths, image_root=(tmp_path,))
    (record,) = [
        found for _, found in FORMATS["vqa"].read(source) if isinstance(found, dict) and found["question_id"] == 8000
    ]
    image = Image((tmp_path / "COCO_val2014_000000000008.jpg").resolve())
    expected = Dialogue((user(image, "How many?"), assistant("2", references=("2",))))
    assert FORMATS["vqa"].convert(record, ImageRoot(source)) == expected


def test_vqa_single_file(tmp_path):
    record = {"question": "What?", "image_id": "0a", "answers": ["nous", "nous", "le"], "question_id": 1}
    paths = write_files(
        tmp_path, textvqa__json={"dataset_type": "val", "data": [record]}, copy__json=[record], copy__jsonl=record
    )
    assert read_format("vqa", *paths) == [record] * 3


def test_vqa_compressed(tmp_path):
    for name, content in (("q", QUESTIONS), ("a", ANNOTATIONS)):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(content).encode()))
    paths = (tmp_path / "q.json.gz", tmp_path / "a.json.gz")
    assert [record for record in read_format("vqa", *paths) if isinstance(record, dict)] == [JOINED[2], JOINED[4]]


def test_vqa_broken_file(tmp_path):
    questions, annotations = write_files(tmp_path, q__json=QUESTIONS, a__json=json.dumps(ANNOTATIONS)[:-40])
    kept = {"on_broken": "keep"}
    reasons = [record[0] for record in read_format("vqa", questions, annotations, **kept) if isinstance(record, tuple)]
    assert reasons.count("not JSON") == 1
    assert read_format("mimic_it", annotations, **kept)[-1][0] == "not JSON"
    for paths in ((questions, annotations), (annotations, questions)):
        with pytest.raises(UserError, match=r"a\.json: the file breaks off: not JSON: "):
            read_format("vqa", *paths)
    with pytest.raises(UserError, match=r"a\.json: the file breaks off: "):
        read_format("mimic_it", annotations)
