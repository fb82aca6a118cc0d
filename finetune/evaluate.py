"""Held-out dialogues -> figures: loss per supervised token, exact answers, stop rate."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.collate import RowCollator
from finetune.data.dialogue import Dialogue
from finetune.data.tracking import Track, silently
from finetune.generate import Answer, Assistant, generate
from modeling.forward import packed_loss

Question = tuple[Dialogue, str]
"""A prompt and its reference answer."""


@dataclass(frozen=True)
class Scores:
    """Figures of one model on held-out data. Shares are of `questions`; None where there are none."""

    loss: float
    """Nats per supervised token."""
    supervised_tokens: int
    questions: int
    exact: float | None
    """Share of answers equal to the reference."""
    exact_yes_no: float | None
    """Of the questions whose reference is yes or no."""
    exact_open: float | None
    """Of the others."""
    stopped: float | None
    """Share of answers that ended by themselves within the limit."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    assistant: Assistant,
    rows: RowCollator,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    predictions: Path | None = None,
    track: Track = silently,
) -> Scores:
    """Score one model. `predictions` gets a JSON line per question."""
    loss, supervised = held_out_loss(assistant, rows, track=track)
    prompts = [prompt for prompt, _ in questions]
    answers = generate(assistant, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, track=track)
    references = [reference for _, reference in questions]
    if predictions:
        _write_predictions(predictions, questions, answers)
    exact = [answer.text == reference for answer, reference in zip(answers, references, strict=True)]
    closed = [reference.lower() in ("yes", "no") for reference in references]
    return Scores(
        loss=loss,
        supervised_tokens=supervised,
        questions=len(questions),
        exact=_share(exact),
        exact_yes_no=_share([right for right, yes_no in zip(exact, closed, strict=True) if yes_no]),
        exact_open=_share([right for right, yes_no in zip(exact, closed, strict=True) if not yes_no]),
        stopped=_share([answer.stopped for answer in answers]),
    )


@torch.no_grad()
def held_out_loss(assistant: Assistant, rows: RowCollator, *, track: Track = silently) -> tuple[float, int]:
    """(mean loss in nats, supervised tokens): every token weighs the same, whatever row it is in."""
    model = assistant.model.eval()
    device = assistant.idefics.device
    total, supervised = 0.0, 0
    for row in track(rows.rows, "held-out loss"):
        batch = {name: tensor.to(device) for name, tensor in rows.batch(row).items()}  # type: ignore[attr-defined]
        total += float(packed_loss(model, batch, config=assistant.idefics.config))
        supervised += int((batch["labels"] >= 0).sum())
    return total / max(supervised, 1), supervised


def draw_questions(dialogues: Sequence[Dialogue], *, limit: int | None, seed: int) -> list[Question]:
    """Every assistant turn as a question in its context; with a `limit`, so many drawn by `seed`, in their order."""
    questions = [question for dialogue in dialogues for question in dialogue.prompts()]
    if limit is None or limit >= len(questions):
        return questions
    chosen = np.random.default_rng([seed, 4]).choice(len(questions), size=limit, replace=False)
    return [questions[index] for index in sorted(chosen)]


def _write_predictions(path: Path, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for (prompt, reference), answer in zip(questions, answers, strict=True):
            images = [str(image.source) if isinstance(image.source, Path) else None for image in prompt.images]
            line = {"images": images, "question": prompt.turns[-1].text, "reference": reference, **asdict(answer)}
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
