"""The end of a run on the screen and as a picture: figures that apply, and no others."""

import json
import re
from types import SimpleNamespace

import PIL.Image
import pytest

from finetune import console as progress
from finetune.reporting import summary as report
from finetune.reporting.plots import draw

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
        report.show(SimpleNamespace(output=tmp_path, evaluation=True), {"evaluate": models})
        return capsys.readouterr().out

    return show


def rows(printed):
    return re.findall(r"^│ (\S.*?) +│ +(\S+) │ +(\S+) │ +(\S+) │$", printed, re.MULTILINE)


def test_only_figures_that_apply_are_in_the_table(shown):
    assert rows(shown(SHORT)) == [
        ("open questions, exact", "0.25", "0.25", "n/a"),
        ("all questions, exact", "0.5", "0.5", "n/a"),
        ("all questions, first word", "0.75", "0.75", "n/a"),
        ("stopped by itself", "1", "1", "n/a"),
        ("loss per supervised token", "1.25", "1.25", "n/a"),
        ("questions", "4,000", "4,000", "n/a"),
    ]


def test_a_run_over_captions_and_short_answers_shows_theirs(shown):
    assert rows(shown(SHORT | CAPTIONS))[3:6] == [
        ("short answers, VQA accuracy", "0.6", "0.6", "n/a"),
        ("sentences, CIDEr-D", "1.173", "1.173", "n/a"),
        ("sentences, ROUGE-L", "0.5", "0.5", "n/a"),
    ]


def test_three_answers_are_shown_open_ones_first_and_no_image_twice(shown, tmp_path):
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


@pytest.mark.parametrize(
    ("scores", "bars"),
    [
        (SHORT, ["open questions", "stopped by itself"]),
        (SHORT | CAPTIONS, ["open questions", "VQA accuracy", "ROUGE-L", "stopped by itself"]),
    ],
)
def test_the_picture_has_a_group_of_bars_for_each_share_that_applies(tmp_path, monkeypatch, scores, bars):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    draw(tmp_path / "metrics.jsonl", {"base": scores, "tuned": scores, "image_swap": None}, tmp_path / "curves.png")
    shares = plt.gcf().axes[1]
    monkeypatch.undo()
    plt.close("all")
    assert [label.get_text() for label in shares.get_xticklabels()] == bars
    assert len(shares.patches) == 2 * len(bars)
    with PIL.Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG"
