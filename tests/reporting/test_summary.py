"""What a run prints at its end: figures that apply, and no others."""

import json
import re

import PIL.Image
import pytest

from finetune import console as progress
from finetune.reporting.summary import show_result

NONE = {"exact_yes_no": None, "vqa": None, "cider": None, "rouge_l": None}
SHORT = {"exact": 0.5, "exact_open": 0.25, "first_word": 0.75, "eos_rate": 1.0, "loss": 1.25, "questions": 4000, **NONE}
CAPTIONS = {"vqa": 0.6, "cider": 1.1725, "rouge_l": 0.5}


@pytest.fixture
def shown(capsys, monkeypatch, tmp_path):
    """shown(tuned, lines) -> what a run with these figures and these predictions prints."""
    monkeypatch.setattr(progress.results, "_width", 120)

    def show(tuned, lines=()):
        (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
        models = {"base": tuned, "tuned": tuned, "image_swap": None, "documents": None}
        show_result(tmp_path, {"evaluate": models})
        return capsys.readouterr().out

    return show


def rows(printed):
    return re.findall(r"^│ (\S.*?) +│ +(\S+) │ +(\S+) │ +(\S+) │$", printed, re.MULTILINE)


def test_table_has_only_scores_that_apply(shown):
    assert rows(shown(SHORT)) == [
        ("open questions, exact", "0.25", "0.25", "n/a"),
        ("all questions, exact", "0.5", "0.5", "n/a"),
        ("all questions, first word", "0.75", "0.75", "n/a"),
        ("answers that end by themselves", "1", "1", "n/a"),
        ("loss per supervised token", "1.25", "1.25", "n/a"),
        ("number of questions", "4,000", "4,000", "n/a"),
    ]


def test_table_of_captions_and_short_answers(shown):
    assert rows(shown(SHORT | CAPTIONS))[3:6] == [
        ("short answers, VQA accuracy", "0.6", "0.6", "n/a"),
        ("sentences, CIDEr-D", "1.173", "1.173", "n/a"),
        ("sentences, ROUGE-L", "0.5", "0.5", "n/a"),
    ]


def test_three_answers_open_ones_first_each_image_once(shown, tmp_path):
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    red = str(tmp_path / "red.png")

    def line(image, question, references, answer, exact):
        return {"images": [image], "question": question, "references": references, "answer": answer, "exact": exact}

    printed = shown(
        SHORT,
        [
            line(red, "is it red?", ["yes"], "yes", True),
            line("a.zip at byte 7", "what is it?", ["cow", "dog", "dog"], "cow", True),
            line("a.zip at byte 7", "and again?", ["dog"], "dog", True),
            line(None, "in memory?", ["x"], "x", True),
            {"images": [], "question": "no image?", "references": ["x"], "answer": "x", "exact": True},
        ],
    )
    assert "▀" in printed  # red.png; the archive's member is named
    assert printed.index("a.zip at byte 7") < printed.index("is it red?")
    for text in ("what is it?", "reference: dog", "answer: cow", "reference: yes"):
        assert text in printed
    for text in ("and again?", "in memory?", "no image?"):
        assert text not in printed
