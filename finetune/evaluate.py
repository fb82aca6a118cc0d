"""Held-out dialogues -> figures: loss per supervised token, exact answers, stop rate; and the test for blindness."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.data.collate import RowCollator
from finetune.data.dialogue import Dialogue, Image, Turn
from finetune.data.tracking import Track, silently
from finetune.generate import Answer, Assistant, generate
from modeling.forward import packed_loss

Question = tuple[Dialogue, str]
"""A prompt and its reference answer."""


@dataclass(frozen=True)
class Scores:
    """Figures of one model on held-out data. Shares are of questions; None where there are none."""

    loss: float
    """Nats per supervised token."""
    supervised_tokens: int
    questions: int
    exact: float | None
    """Share of answers equal to the reference."""
    exact_open: float | None
    """Of the questions whose reference is not yes or no."""
    exact_yes_no: float | None
    """Of a subset of the others: for each question as many yes as no, so that its words give nothing away."""
    first_word: float | None
    """Share of answers whose first word is the reference's: fair to a model that does not know when to stop."""
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
    if predictions:
        _write_predictions(predictions, questions, answers)
    references = [reference for _, reference in questions]
    exact = [answer.text == reference for answer, reference in zip(answers, references, strict=True)]
    closed = [_is_closed(reference) for reference in references]
    return Scores(
        loss=loss,
        supervised_tokens=supervised,
        questions=len(questions),
        exact=_share(exact),
        exact_open=_share([right for right, yes_no in zip(exact, closed, strict=True) if not yes_no]),
        exact_yes_no=_share([exact[index] for index in balanced_yes_no(questions)]),
        first_word=_share(
            [
                _first_word(answer.text) == _first_word(reference)
                for answer, reference in zip(answers, references, strict=True)
            ]
        ),
        stopped=_share([answer.stopped for answer in answers]),
    )


def balanced_yes_no(questions: Sequence[Question]) -> list[int]:
    """Indices of a subset of the yes/no questions that holds, for each wording, as many yes as no: the first ones.

    A wording alone then tells nothing: the best guess is right half of the time.
    """
    by_wording: dict[str, dict[str, list[int]]] = defaultdict(lambda: {"yes": [], "no": []})
    for index, (prompt, reference) in enumerate(questions):
        if _is_closed(reference):
            by_wording[prompt.turns[-1].text][reference.lower()].append(index)
    chosen: list[int] = []
    for answers in by_wording.values():
        fewer = min(map(len, answers.values()))
        chosen += [index for indices in answers.values() for index in indices[:fewer]]
    return sorted(chosen)


def exchange_images(
    rows: RowCollator, dialogues: Sequence[Dialogue], questions: Sequence[Question], *, seed: int
) -> tuple[RowCollator, list[Question]]:
    """The blindness test's data: every image replaced by another of the held-out ones, everywhere the same way.

    What a model loses on it, it owes to seeing. Needs two distinct images at least.
    """
    used = sorted({image for images in rows.image_ids for image in images})
    order = np.random.default_rng([seed, 5]).permutation(used)
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    images = list(rows.images)
    for image, substitute in other.items():
        images[image] = rows.images[substitute]
    swapped = {
        image: images[number]
        for dialogue, ids in zip(dialogues, rows.image_ids, strict=True)
        for image, number in zip(dialogue.images, ids, strict=True)
    }

    def blind(dialogue: Dialogue) -> Dialogue:
        turns = [
            Turn(turn.role, tuple(swapped[part] if isinstance(part, Image) else part for part in turn.parts))
            for turn in dialogue.turns
        ]
        return Dialogue(tuple(turns))

    return replace(rows, images=images), [(blind(prompt), reference) for prompt, reference in questions]


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


def _is_closed(reference: str) -> bool:
    return reference.lower() in ("yes", "no")


def _first_word(text: str) -> str:
    words = re.findall(r"\w+", text.lower())
    return words[0] if words else ""


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
