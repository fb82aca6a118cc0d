"""Loss spikes: which steps are unstable, which dialogues are to blame, and how a run goes back.

IDEFICS's authors went back eleven times by hand while they trained the 80B. Here each unstable step is a line of the
run folder's unstable.jsonl; the next attempt reads there which dialogues to leave out, and from which steps on learning
rates are lower.
"""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from finetune.console import log
from finetune.distributed import collectives
from finetune.recipe.schema import Action, Instability
from finetune.training.checkpoints import last_checkpoint, step_of
from modeling.atomic_files import atomic_write
from modeling.errors import UserError

FILE = "unstable.jsonl"

WINDOW = 64
"""Number of steps before, with whose losses a loss is compared."""
FEWEST = 16
"""Nothing is a spike before there are so many losses to compare with."""
LEAST_RISE = 1.0
"""Nats per token: a loss that is less above the median is no spike, however calm the steps before were."""
NORMAL = 1.4826
"""Median absolute deviations in a standard deviation of normally distributed values."""


def why_unstable(loss: float, norm: float, before: Sequence[float], *, spike: float | None) -> str | None:
    """Return why a step with this loss and gradient norm must not be taken, or None.

    before: losses of the steps before it. spike: see `training.instability`.
    """
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(norm):
        return f"gradient norm {norm}"
    if loss > spike_limit(before, spike=spike):
        recent = before[-WINDOW:]
        return f"loss {loss:.4g}, after {len(recent)} steps with a median of {statistics.median(recent):.4g}"
    return None


def spike_limit(before: Sequence[float], *, spike: float | None) -> float:
    """Return the largest loss that is no spike: `spike` robust standard deviations above the median of the last losses.

    Infinite where `spike` is None, and as long as there are too few losses to compare with.
    """
    recent = before[-WINDOW:]
    if spike is None or len(recent) < FEWEST:
        return math.inf
    median = statistics.median(recent)
    deviation = NORMAL * statistics.median(abs(value - median) for value in recent)
    return median + max(spike * deviation, LEAST_RISE)


def suspects(losses: Sequence[float], before: Sequence[float], *, spike: float | None) -> list[bool]:
    """Return which dialogues of a step are to blame, by their own losses per token.

    Those whose loss is not finite; else those that would be a spike by themselves; else all.
    """
    blamed = [not math.isfinite(loss) for loss in losses]
    if not any(blamed):
        blamed = [loss > spike_limit(before, spike=spike) for loss in losses]
    return blamed if any(blamed) else [True] * len(losses)


@dataclass(frozen=True)
class StepDialogue:
    """A dialogue of an unstable step."""

    source: str
    record_id: str
    loss: float | None
    """Nats per supervised token of this dialogue alone; None where it is not finite."""
    blamed: bool


class UnstableError(Exception):
    """A step that was not taken; raised on every process alike."""

    def __init__(self, step: int, reason: str, dialogues: Sequence[StepDialogue]):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.dialogues = step, reason, list(dialogues)


@dataclass(frozen=True)
class Event:
    """A line of unstable.jsonl."""

    step: int
    reason: str
    action: Action
    back_to: int
    """The step that the run went back to."""
    dialogues: tuple[StepDialogue, ...]

    @property
    def skipped(self) -> frozenset[tuple[str, str]]:
        """(source, record_id) of the dialogues that the run goes on without."""
        return frozenset((one.source, one.record_id) for one in self.dialogues if one.blamed and self.action == "skip")


def go_back(folder: Path, error: UnstableError, settings: Instability) -> None:
    """Add an unstable step to the run folder's unstable.jsonl, which the next attempt reads, and log it.

    Every process calls this. Raises UserError, on all of them, where there is no next attempt.
    """

    def add_event() -> tuple[int, int]:
        events, checkpoint = read_events(folder), last_checkpoint(folder)
        if events and checkpoint and step_of(checkpoint) == events[-1].back_to:
            shutil.rmtree(checkpoint)  # going back to it did not help
            checkpoint = last_checkpoint(folder)
        back_to = step_of(checkpoint) if checkpoint else 0
        event = Event(error.step, error.reason, settings.action, back_to, tuple(error.dialogues))
        write_events(folder, [*events, event])
        return back_to, len(events) + 1

    back_to, rollbacks = collectives.on_main("go back", add_event)
    blamed = [one for one in error.dialogues if one.blamed]
    log(f"{error}; to blame: {', '.join(f'{one.source} {one.record_id}' for one in blamed[:5])}")
    log(f"  {len(blamed)} of the step's {len(error.dialogues)} dialogues, see {folder / FILE}")
    if settings.action == "stop" or rollbacks > settings.rollbacks:
        allows = f"allows {settings.rollbacks} rollbacks, and that was one more"
        raise UserError(
            f"{error}; training.instability {'says stop' if settings.action == 'stop' else allows}\n"
            f"  {folder / FILE} names the dialogues; leave them out, or lower training.learning_rate"
        )
    log(f"  going back to step {back_to}, {'without them' if settings.action == 'skip' else 'with half the rates'}")


def read_events(folder: Path) -> list[Event]:
    """Return the lines of a run folder's unstable.jsonl. Raises UserError: a line that this toolkit did not write."""
    path = folder / FILE
    events = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        try:
            values = json.loads(line)
            event = Event(**{**values, "dialogues": tuple(StepDialogue(**one) for one in values["dialogues"])})
            if event.action not in get_args(Action) or not isinstance(event.step, int):
                raise ValueError(f"action {event.action!r}, step {event.step!r}")
            if not isinstance(event.back_to, int):
                raise ValueError(f"back_to {event.back_to!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: not as this toolkit writes it ({error!r:.100})\n"
                f"  delete the line: the run then meets the dialogues that it names again"
            ) from error
        events.append(event)
    return events


def write_events(folder: Path, events: Sequence[Event]) -> None:
    lines = [json.dumps(asdict(event), ensure_ascii=False) + "\n" for event in events]
    atomic_write(folder / FILE, "".join(lines))
