"""The figures of a run -> what a person sees at its end: tables, three answers, the line to type next."""

import json
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from finetune.console import display, table, visible
from finetune.data.conversation import Image
from finetune.evaluation.metrics import is_yes_no, most_common
from finetune.recipe.schema import Recipe
from finetune.reporting.inspect import picture


def show(recipe: Recipe, result: dict[str, Any]) -> None:
    """The figures of a run as tables, three answers, and the line to type next."""
    folder = Path(recipe.output)
    if scores := result.get("evaluate"):
        models = {name: scores[name] or {} for name in ("base", "tuned", "image_swap")}
        shown = {key: label for key, label in _SCORES.items() if models["tuned"].get(key) is not None}
        rows = [(label, *(model.get(key) for model in models.values())) for key, label in shown.items()]
        display(table("held out (image swap: with the images exchanged)", ("", "base", "tuned", "image swap"), rows))
        if forgetting := scores["documents"]:
            display(f"loss on held-out documents: {forgetting['before']:.3f} before, {forgetting['after']:.3f} after")
    if (proof := result.get("merge")) and "answers" in proof:
        display(
            table(
                "merged against base + adapter",
                ("", ""),
                [
                    ("largest difference of logits", proof["largest_difference"]),
                    ("the same, to the base", proof["largest_difference_to_base"]),
                    ("equal answers", f"{proof['same_answers']} of {proof['answers']}"),
                ],
            )
        )
    if proof:
        display(f"the model: {proof['merged']}")
    if recipe.evaluation and (predictions := folder / "predictions.jsonl").is_file():
        _show_answers(predictions)
        display(f"every answer: {folder / 'predictions.html'}")
    display(f"the run: {folder} (its course: {folder / 'curves.png'})")
    if "merge" in result:
        display(f"next: finetune chat {folder / 'merged'}")


def _show_answers(predictions: Path) -> None:
    """Three images with question, reference and answer: an open question first, no image twice."""
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: is_yes_no(line["references"]))
    chosen: dict[str, dict[str, Any]] = {}
    for line in lines[:: max(1, len(lines) // 50)]:
        if len(chosen) < 3 and line["images"] and line["images"][-1]:
            chosen.setdefault(line["images"][-1], line)
    shown = [
        Group(
            picture(Image(Path(place)), width=20) if Path(place).is_file() else Text(visible(place)),
            Text(visible(line["question"])),
            Text(visible(f"reference: {most_common(line['references'])}"), style="dim"),
            Text(visible(f"answer: {line['answer']}"), style="green" if line["exact"] else "red"),
        )
        for place, line in chosen.items()
    ]
    display(Columns(shown, padding=(0, 4)))


_SCORES = {
    "exact_open": "open questions, exact",
    "exact_yes_no": "yes/no questions, balanced, exact",
    "exact": "all questions, exact",
    "first_word": "all questions, first word",
    "vqa": "short answers, VQA accuracy",
    "cider": "sentences, CIDEr-D",
    "rouge_l": "sentences, ROUGE-L",
    "eos_rate": "stopped by itself",
    "loss": "loss per supervised token",
    "questions": "questions",
}
