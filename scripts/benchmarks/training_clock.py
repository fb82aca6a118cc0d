"""Where the time of training goes, by the same hooks on both sides of scripts/benchmarks/training.py."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback

from finetune.training.prefetch import PrefetchedRows

PARTS = ("data", "images", "forward", "backward", "optimiser")


class Clock(TrainerCallback):
    """Seconds by part.

    data: waiting for it: the collator, or what our thread has not done in time. images: vision tower and resampler.
    forward: the rest of the model's forward; on our side, the loss and the head's backward are part of it. backward:
    from there to the optimiser, so the loss, the backward and the clipping. optimiser: the step.
    """

    def __init__(self, model: nn.Module, now: Callable[[], float]):
        self.now = now
        self.spent: Counter[str] = Counter()
        self.history: list[tuple[float, dict[str, float]]] = []
        self.tokens = 0
        inner = model.get_base_model().model
        model.register_forward_pre_hook(lambda *_: self._start("forward"))
        model.register_forward_hook(self._forward_done)
        for part in (inner.vision_model, inner.perceiver_resampler):
            part.register_forward_pre_hook(lambda *_: self._start("images"))
            part.register_forward_hook(lambda *_: self._images_done())
        self.started: dict[str, float] = {}

    def reading(self, collator: Any) -> Any:
        return _Timed(collator, self)

    def _start(self, part: str) -> None:
        self.started[part] = self.now()

    def stop(self, part: str) -> float:
        seconds = self.now() - self.started.pop(part)
        self.spent[part] += seconds
        return seconds

    def _images_done(self) -> None:
        self.spent["forward"] -= self.stop("images")

    def _forward_done(self, *_: Any) -> None:
        self.stop("forward")
        self._start("backward")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history.append((self.now(), {}))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop("backward")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop("backward")
        self._start("optimiser")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop("optimiser")
        collator = kwargs["train_dataloader"].collate_fn
        if isinstance(collator, PrefetchedRows):
            self.spent["data"] = collator.waited
        self.history.append((self.now(), dict(self.spent)))

    def epochs(self, ends: Sequence[int]) -> list[dict[str, float]]:
        """Seconds of each epoch, and of its parts; ends: optimiser steps at the end of each."""
        made = []
        for before, after in zip([0, *ends], ends, strict=False):
            (start, spent), (stop, more) = self.history[before], self.history[after]
            parts = {part: more.get(part, 0.0) - spent.get(part, 0.0) for part in PARTS}
            made.append({"seconds": stop - start, **parts})
        return made


@dataclass(frozen=True)
class _Timed:
    """The stock side's collator, with its clock."""

    collator: Any
    clock: Clock

    def __call__(self, features: Sequence[dict[str, int]]) -> Any:
        started = self.clock.now()
        batch = self.collator(features)
        self.clock.spent["data"] += self.clock.now() - started
        self.clock.tokens += batch["input_ids"].numel()
        return batch
