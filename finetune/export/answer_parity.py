"""base + adapter against the merged model, asked as a user would: logits of real dialogues, and answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finetune.data.collate import Batch
from finetune.data.conversation import Dialogue
from finetune.evaluation.generate import Assistant, generate
from modeling.device import copy_batch
from modeling.forward import forward_arguments


@dataclass(frozen=True)
class Proof:
    """What was found; differences of logits are absolute."""

    tokens: int
    """Tokens compared."""
    largest_difference: float
    """Between base + adapter and merged; rounding alone in fp32."""
    largest_difference_to_base: float
    """Between base and merged: what the training did."""
    answers: int
    same_answers: int
    """Of `answers` greedy answers, how many are equal."""


def compare_answers(
    *,
    base: Callable[[], Assistant],
    tuned: Callable[[], Assistant],
    merged: Callable[[], Assistant],
    batches: Sequence[Batch],
    prompts: Sequence[Dialogue],
    max_new_tokens: int = 32,
) -> Proof:
    """Compare logits on `batches` and greedy answers to `prompts`; one model at a time is in memory."""

    def observe(make: Callable[[], Assistant]) -> tuple[list[torch.Tensor], list[str]]:
        assistant = make()
        answers = generate(assistant, prompts, max_new_tokens=max_new_tokens)
        return _logits(assistant, batches), [answer.text for answer in answers]

    before, _ = observe(base)
    expected, asked = observe(tuned)
    got, answered = observe(merged)
    return Proof(
        tokens=sum(len(logits) for logits in got),
        largest_difference=_largest_difference(got, expected),
        largest_difference_to_base=_largest_difference(got, before),
        answers=len(answered),
        same_answers=sum(one == other for one, other in zip(asked, answered, strict=True)),
    )


@torch.no_grad()
def _logits(assistant: Assistant, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """fp32 [T, V + added] of every batch, on the CPU."""
    device, config = assistant.idefics.device, assistant.idefics.config
    logits = []
    for batch in batches:
        arguments = forward_arguments(copy_batch(batch, device), config)
        logits.append(assistant.model.eval()(**arguments).logits[0].float().cpu())
    return logits


def _largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
