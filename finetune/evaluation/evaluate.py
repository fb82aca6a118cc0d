"""Eval dialogues -> figures: loss per supervised token, scores of answers, eos rate; and the image-swap ablation.

All processes of a run call `evaluate` or `eval_loss` together: each does its share, and all get the same figures, equal
to those of a single process.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from finetune.console import Track, silently
from finetune.data.collate import RowCollator
from finetune.data.conversation import Dialogue, Image
from finetune.data.images import describe
from finetune.data.sampling import Row
from finetune.distributed import collectives
from finetune.evaluation.generate import Answer, Assistant, generate
from finetune.evaluation.metrics import is_yes_no, most_common, score
from modeling.device import copy_batch
from modeling.packed_forward import packed_loss

Question = tuple[Dialogue, tuple[str, ...]]
"""A prompt, and its reference answers: one, or those of all annotators."""


@dataclass(frozen=True)
class Scores:
    """Figures of one model on eval data. Shares are of questions; None where there are none."""

    loss: float
    """Nats per supervised token."""
    supervised_tokens: int
    questions: int
    exact: float | None
    """Share of answers equal to a reference."""
    exact_open: float | None
    """`exact` of questions whose most common reference is not yes or no."""
    exact_yes_no: float | None
    """`exact` of yes/no questions, as many yes as no for each wording: guessing from the wording scores one half."""
    first_word: float | None
    """Share of answers whose first word is a reference's first word: fair to a model that does not stop by itself."""
    eos_rate: float | None
    """Share of answers that ended with an end token within the limit."""
    vqa: float | None
    """Mean VQA accuracy, of the questions that several people answered in a few words."""
    cider: float | None
    """Mean CIDEr-D, of the questions whose references are sentences (four words or more). Papers print it times 100."""
    rouge_l: float | None
    """Mean ROUGE-L of the same questions as `cider`."""

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
    """Score one model on the rows (loss) and the questions (answers); `predictions` gets a JSON line per question."""
    loss, supervised = eval_loss(assistant, rows, track=track)
    prompts, references = [prompt for prompt, _ in questions], [given for _, given in questions]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "track": track}
    answers = generate(assistant, prompts, together=True, **options)
    scores = score([answer.text for answer in answers], references)
    open_ended = [one for one, given in zip(scores, references, strict=True) if not is_yes_no(given)]
    if predictions:
        collectives.on_main("write predictions", lambda: _write_predictions(predictions, questions, answers, scores))
    return Scores(
        loss=loss,
        supervised_tokens=supervised,
        questions=len(questions),
        exact=_mean_score(scores, "exact"),
        exact_open=_mean_score(open_ended, "exact"),
        exact_yes_no=_mean_score([scores[index] for index in balanced_yes_no(questions)], "exact"),
        first_word=_mean(
            [
                _first_word(answer.text) in map(_first_word, given)
                for answer, given in zip(answers, references, strict=True)
            ]
        ),
        eos_rate=_mean([answer.stopped for answer in answers]),
        vqa=_mean_score(scores, "vqa"),
        cider=_mean_score(scores, "cider"),
        rouge_l=_mean_score(scores, "rouge_l"),
    )


def balanced_yes_no(questions: Sequence[Question]) -> list[int]:
    """Return indices of yes/no questions, with as many yes as no for each wording: the first ones of each.

    A guess from the wording alone is right half of the time.
    """
    by_wording: dict[str, dict[str, list[int]]] = defaultdict(lambda: {"yes": [], "no": []})
    for index, (prompt, references) in enumerate(questions):
        if is_yes_no(references):
            by_wording[prompt.turns[-1].text][most_common(references).lower()].append(index)
    chosen: list[int] = []
    for answers in by_wording.values():
        fewer = min(map(len, answers.values()))
        chosen += [index for indices in answers.values() for index in indices[:fewer]]
    return sorted(chosen)


def swap_images(
    rows: RowCollator, dialogues: Sequence[Dialogue], questions: Sequence[Question], *, seed: int
) -> tuple[RowCollator, list[Question]]:
    """Return the data of the image-swap ablation: each image is replaced by another eval image, the same everywhere.

    The drop in score shows how much the model uses the images. The data must have at least two distinct images.
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

    def swap(dialogue: Dialogue) -> Dialogue:
        turns = [
            replace(turn, parts=tuple(swapped[part] if isinstance(part, Image) else part for part in turn.parts))
            for turn in dialogue.turns
        ]
        return replace(dialogue, turns=tuple(turns))

    features = rows.features and rows.features.exchanged(other)
    return replace(rows, images=images, features=features), [
        (swap(prompt), references) for prompt, references in questions
    ]


@torch.no_grad()
def eval_loss(assistant: Assistant, rows: RowCollator, *, track: Track = silently) -> tuple[float, int]:
    """Return (mean loss in nats, number of supervised tokens); every supervised token has the same weight."""
    model = assistant.model.eval()
    device = assistant.idefics.device

    def measure(row: Row) -> tuple[float, int]:
        batch = copy_batch(rows.batch(row), device)
        return float(packed_loss(model, batch, config=assistant.idefics.config)), len(batch["targets"])

    measured = collectives.share_out("eval loss", rows.rows, measure, track=track)
    supervised = sum(tokens for _, tokens in measured)
    return sum(loss for loss, _ in measured) / max(supervised, 1), supervised


def draw_questions(dialogues: Sequence[Dialogue], *, limit: int | None, seed: int) -> list[Question]:
    """Return every assistant turn as a question in its context; `limit` draws that many of them, with `seed`."""
    questions = [question for dialogue in dialogues for question in dialogue.prompts()]
    if limit is None or limit >= len(questions):
        return questions
    chosen = np.random.default_rng([seed, 4]).choice(len(questions), size=limit, replace=False)
    return [questions[index] for index in sorted(chosen)]


def _write_predictions(
    path: Path, questions: Sequence[Question], answers: Sequence[Answer], scores: Sequence[dict[str, float]]
) -> None:
    # backslashreplace writes lone surrogates as JSON escapes
    with path.open("w", encoding="utf-8", errors="backslashreplace") as lines:
        for (prompt, references), answer, own in zip(questions, answers, scores, strict=True):
            line = {
                "images": [_describe(image) for image in prompt.images],
                "question": prompt.turns[-1].text,
                "references": references,
                "answer": answer.text,
                "stopped": answer.stopped,
                **own,
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _describe(image: Image) -> str | None:
    """Return where an image was read from, or None if it is only in memory."""
    return None if isinstance(image.source, bytes | PIL.Image.Image) else describe(image)


def _first_word(text: str) -> str:
    """Return the first word in lower case, or "" if there is none."""
    words = re.findall(r"\w+", text.lower())
    return words[0] if words else ""


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values."""
    return sum(values) / len(values) if values else None


def _mean_score(scores: Sequence[dict[str, float]], name: str) -> float | None:
    """Return the mean of a score over the answers that have it, or None."""
    return _mean([one[name] for one in scores if name in one])
