"""Answers are marked against all their references, and what is written down says where each came from."""

import json
from pathlib import Path

import PIL.Image
import pytest
from sources import make_source

from finetune.data.conversation import Dialogue, Image, Slice, assistant, user
from finetune.data.formats import easy_vqa
from finetune.evaluation import evaluate as module
from finetune.evaluation.evaluate import balanced_yes_no, evaluate
from finetune.evaluation.generate import Answer


@pytest.fixture
def scores_of(monkeypatch):
    """scores_of([(question, references, answer, stopped)], predictions) -> Scores of a model that answers so."""

    def scores(table, predictions=None):
        questions = [(Dialogue((user(question),)), references) for question, references, _, _ in table]
        answers = [Answer(text, stopped) for *_, text, stopped in table]
        monkeypatch.setattr(module, "generate", lambda *_, **options: answers)
        monkeypatch.setattr(module, "eval_loss", lambda *_, **options: (1.5, 7))
        return evaluate(None, None, questions, max_new_tokens=4, batch_size=2, predictions=predictions)

    return scores


def test_scores(scores_of):
    """Scores count exact open balanced first word and eos rate."""
    table = [
        ("is it red?", ("yes",), "yes", True),
        ("is it red?", ("no",), "yes", True),
        ("is it red?", ("no",), "no", True),  # one no too many: left out of the balanced ones
        ("is it blue?", ("no",), "no", True),  # never yes: its words give it away
        ("what?", ("dog",), "dog", False),
        ("what?", ("dog",), "Dog, I think", True),
    ]
    scores = scores_of(table)
    assert balanced_yes_no([(Dialogue((user(question),)), references) for question, references, *_ in table]) == [0, 1]
    assert (scores.loss, scores.supervised_tokens, scores.questions) == (1.5, 7, 6)
    assert (scores.exact, scores.exact_yes_no, scores.exact_open) == (4 / 6, 0.5, 0.5)
    assert (scores.first_word, scores.eos_rate) == (5 / 6, 5 / 6)
    assert (scores.vqa, scores.cider, scores.rouge_l) == (None, None, None)  # one short reference each


def test_scores_of_several_references(scores_of):
    """Of several references any counts and the most common says whether it is yes or no."""
    table = [
        ("is it red?", ("maybe", "yes", "yes"), "maybe", True),
        ("is it red?", ("yes", "No", "No"), "no idea", True),
        ("what?", ("no", "a cat", "a cat"), "cat", True),
    ]
    scores = scores_of(table)
    assert (scores.exact, scores.exact_yes_no, scores.exact_open) == (1 / 3, 0.5, 0)
    assert scores.first_word == 2 / 3
    # leaving one of three out: "maybe" is left with 0, 1, 1 matches; "no idea" with none; "cat" = "a cat": 1, 1, 2
    assert scores.vqa == pytest.approx((2 / 9 + 0 + 4 / 9) / 3)
    assert (scores.cider, scores.rouge_l) == (None, None)


def test_scores_of_sentences(scores_of):
    """Sentences get their own figures and leave those of short answers alone."""
    scores = scores_of(
        [
            ("describe it", ("one two three four five",), "one two three four five", True),
            ("describe it", ("six seven eight nine zero",), "one", True),
            ("what?", ("dog",) * 3 + ("cat",) * 7, "dog", True),
        ]
    )
    assert scores.cider == pytest.approx(5)
    assert scores.rouge_l == pytest.approx(0.5)
    assert scores.vqa == pytest.approx(0.9)
    assert scores.exact == 2 / 3


def test_scores_without_questions(scores_of):
    """Without questions there is the loss alone."""
    assert scores_of([]).to_json() == {
        "loss": 1.5,
        "supervised_tokens": 7,
        "questions": 0,
        "exact": None,
        "exact_open": None,
        "exact_yes_no": None,
        "first_word": None,
        "eos_rate": None,
        "vqa": None,
        "cider": None,
        "rouge_l": None,
    }


def test_predictions(scores_of, tmp_path):
    """Predictions hold each question with its references answer and figures."""
    file = tmp_path / "predictions.jsonl"
    table = [
        ("what?", ("dög",), "dög", False),
        ("what?", ("cat",) * 4 + ("cow",), "cat", True),
        ("describe it", ("one two three four",), "one two three four", True),
        ("describe it", ("five six seven eight",), "nine", True),
    ]
    scores_of(table, file)
    first, second, third, fourth = file.read_text(encoding="utf-8").splitlines()
    assert first == (
        '{"images": [], "question": "what?", "references": ["dög"], "answer": "dög", "stopped": false, "exact": true}'
    )
    assert json.loads(second)["references"] == ["cat", "cat", "cat", "cat", "cow"]
    assert json.loads(second)["vqa"] == pytest.approx(1)
    assert {name: json.loads(third)[name] for name in ("exact", "rouge_l", "cider")} == {
        "exact": True,
        "rouge_l": pytest.approx(1),
        "cider": pytest.approx(10),
    }
    assert {name: json.loads(fourth)[name] for name in ("exact", "rouge_l", "cider")} == {
        "exact": False,
        "rouge_l": 0,
        "cider": 0,
    }


def test_predictions_images(monkeypatch, tmp_path):
    """Predictions say where images are."""
    images = (
        Image(Path("photos/dog.jpg")),
        Image(Path("photos/d\udcf6g.jpg")),  # a name that is not UTF-8
        Image(Slice(Path("photos.zip"), offset=40, length=9, coding="deflate")),
        Image(b"\x89PNG"),
        Image(PIL.Image.new("RGB", (2, 2))),
    )
    monkeypatch.setattr(module, "generate", lambda *_, **options: [Answer("A", True)])
    monkeypatch.setattr(module, "eval_loss", lambda *_, **options: (1.0, 1))
    file = tmp_path / "predictions.jsonl"
    questions = [(Dialogue((user(*images, "which?"),)), ("A",))]
    evaluate(None, None, questions, max_new_tokens=4, batch_size=2, predictions=file)
    assert json.loads(file.read_text())["images"] == [
        "photos/dog.jpg",
        "photos/d\udcf6g.jpg",
        "photos.zip at byte 40",
        None,
        None,
    ]


def test_balanced_yes_no_of_easy_vqa():
    """The balanced subset of easy VQA is the published one."""
    records = [record for _, record in easy_vqa.read(make_source("easy_vqa", split="test"))]
    questions = [question for record in records for question in easy_vqa.convert(record, root=None).prompts()]
    assert sum(references in (("yes",), ("no",)) for _, references in questions) == 7_136
    chosen = [questions[index][1] for index in balanced_yes_no(questions)]
    assert (chosen.count(("yes",)), chosen.count(("no",))) == (1_246, 1_246)


def test_balanced_yes_no_by_wording():
    """The balanced subset keeps a wording with all its references apart."""
    asked = [
        (Dialogue((user("red?"), assistant("a"), user("sure?"))), ("yes", "no", "yes")),
        (Dialogue((user("sure?"),)), ("no", "no", "yes")),
        (Dialogue((user("blue?"),)), ("no",)),
        (Dialogue((user("sure?"),)), ("red",)),
    ]
    assert balanced_yes_no(asked) == [0, 1]  # by the words of the last turn
