"""The figures of a run -> what `finetune run` prints at its end: tables, three answers, the command to give next."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from finetune.console import display, table, visible
from finetune.data.conversation import Image
from finetune.evaluation.metrics import is_yes_no, most_common
from finetune.reporting.inspect import picture

SCORES = {
    "exact_open": "open questions, exact",
    "exact_yes_no": "yes/no questions, balanced, exact",
    "exact": "all questions, exact",
    "first_word": "all questions, first word",
    "vqa": "short answers, VQA accuracy",
    "cider": "sentences, CIDEr-D",
    "rouge_l": "sentences, ROUGE-L",
    "eos_rate": "answers that end by themselves",
    "loss": "loss per supervised token",
    "questions": "number of questions",
}


def show_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Print the figures of the run in this folder, as result.json has them."""
    if scores := result.get("evaluate"):
        models = {"base": scores["base"], "tuned": scores["tuned"], "image swap": scores["image_swap"]}
        rows = [
            (label, *((figures or {}).get(key) for figures in models.values()))
            for key, label in SCORES.items()
            if scores["tuned"].get(key) is not None
        ]
        display(table("eval questions (image swap: the tuned model sees other images)", ("score", *models), rows))
        if documents := scores["documents"]:
            before, after = documents["before"], documents["after"]
            display(f"loss on eval documents: {before:.3f} before training, {after:.3f} after")
    merged = result.get("merge")
    if merged and "answers" in merged:
        rows = [
            ("largest difference of logits to base + adapter", merged["largest_difference"]),
            ("largest difference of logits to the base", merged["largest_difference_to_base"]),
            ("answers equal to those of base + adapter", f"{merged['same_answers']} of {merged['answers']}"),
        ]
        display(table("the merged model", ("comparison", "result"), rows))
    if merged:
        display(f"the merged model: {merged['merged']}")
    if scores and (predictions := folder / "predictions.jsonl").is_file():
        _show_answers(predictions)
        display(f"all answers: {folder / 'predictions.html'}")
    display(f"the run: {folder} (loss curves: {folder / 'curves.png'})")
    if merged:
        display(f"next: finetune chat {folder / 'merged'}")


def _show_answers(predictions: Path) -> None:
    """Print three images with question, reference and answer: open questions first, each image once."""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: is_yes_no(line["references"]))
    chosen: dict[str, dict[str, Any]] = {}
    for line in lines[:: max(1, len(lines) // 50)]:
        if len(chosen) < 3 and line["images"] and line["images"][-1]:
            chosen.setdefault(line["images"][-1], line)
    shown = [
        Group(
            picture(Image(Path(path)), width=20) if Path(path).is_file() else Text(visible(path)),
            Text(visible(line["question"])),
            Text(visible(f"reference: {most_common(line['references'])}"), style="dim"),
            Text(visible(f"answer: {line['answer']}"), style="green" if line["exact"] else "red"),
        )
        for path, line in chosen.items()
    ]
    display(Columns(shown, padding=(0, 4)))
