"""The picture of a run."""

import PIL.Image
import pytest

from finetune.reporting.plots import draw

NONE = {"exact_yes_no": None, "vqa": None, "cider": None, "rouge_l": None}
SHORT = {"exact": 0.5, "exact_open": 0.25, "first_word": 0.75, "eos_rate": 1.0, "loss": 1.25, "questions": 4000, **NONE}
CAPTIONS = {"vqa": 0.6, "cider": 1.1725, "rouge_l": 0.5}


@pytest.mark.parametrize(
    ("scores", "bars"),
    [
        (SHORT, ["open questions", "answers that\nend by themselves"]),
        (SHORT | CAPTIONS, ["open questions", "VQA accuracy", "ROUGE-L", "answers that\nend by themselves"]),
    ],
)
def test_picture_has_bars_for_each_score_that_applies(tmp_path, monkeypatch, scores, bars):
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
