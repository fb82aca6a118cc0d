"""What went wrong in a step, which dialogues it was about, and what is done: a line of unstable.jsonl each time.

IDEFICS's authors went back eleven times by hand while they trained the 80B. A run that goes back here reads this file
when it begins again: the dialogues to do without, and the steps from which rates are lower.
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
from modeling.errors import UserError
from modeling.files import atomic_write

FILE = "unstable.jsonl"

WINDOW = 64
"""Steps before, with which a loss is compared."""
FEWEST = 16
"""Steps before which nothing is a spike."""
LEAST_RISE = 1.0
"""Nats a token: what is less above the median is no spike, however calm the steps before were."""
NORMAL = 1.4826
"""Median absolute deviations in a standard deviation of normally distributed values."""


def why_unstable(loss: float, norm: float, before: Sequence[float], *, spike: float | None) -> str | None:
    """Return why a step must not be taken, or None.

    `loss` and `norm` are the step's, `before` the losses of the steps before it, `spike` as `training.instability` has
    it.
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
    """Return the largest loss that is no spike: `spike` robust standard deviations above the median of the last ones.

    Infinite where `spike` is None, and as long as there are too few losses to compare with.
    """
    recent = before[-WINDOW:]
    if spike is None or len(recent) < FEWEST:
        return math.inf
    median = statistics.median(recent)
    deviation = NORMAL * statistics.median(abs(value - median) for value in recent)
    return median + max(spike * deviation, LEAST_RISE)


def suspects(losses: Sequence[float], before: Sequence[float], *, spike: float | None) -> list[bool]:
    """Return which dialogues of a step are to blame, by their own losses a token; all where none stands out.

    Those whose loss is not finite; else those that would be a spike by themselves.
    """
    blamed = [not math.isfinite(loss) for loss in losses]
    if not any(blamed):
        blamed = [loss > spike_limit(before, spike=spike) for loss in losses]
    return blamed if any(blamed) else [True] * len(losses)


@dataclass(frozen=True)
class Seen:
    """A dialogue of an unstable step."""

    source: str
    record_id: str
    loss: float | None
    """Nats a token, by itself; None where it is not finite."""
    blamed: bool


class UnstableError(Exception):
    """A step that was not taken. The same on every process."""

    def __init__(self, step: int, reason: str, dialogues: Sequence[Seen]):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.dialogues = step, reason, list(dialogues)


@dataclass(frozen=True)
class Event:
    """A line of the file."""

    step: int
    reason: str
    action: Action
    back_to: int
    """The step that the run went back to."""
    dialogues: tuple[Seen, ...]

    @property
    def skipped(self) -> frozenset[tuple[str, str]]:
        """(source, place) of what the run goes on without."""
        return frozenset((one.source, one.record_id) for one in self.dialogues if one.blamed and self.action == "skip")


def go_back(folder: Path, step: int, reason: str, dialogues: Sequence[Seen], settings: Instability) -> None:
    """Write down what happened in a run folder, so that the next attempt does otherwise, and tell it.

    Every process of a group calls this. Raises UserError, in all of them, where there is no next attempt.
    """
    event, events = collectives.on_main(
        "go back", lambda: _write_down(folder, step, reason, dialogues, settings.action)
    )
    blamed = [one for one in dialogues if one.blamed]
    log(f"step {step}: {reason}; to blame: {', '.join(f'{one.source} {one.record_id}' for one in blamed[:5])}")
    log(f"  {len(blamed)} of the step's {len(dialogues)} dialogues, see {folder / FILE}")
    if settings.action == "stop" or events > settings.rollbacks:
        allows = f"allows {settings.rollbacks} rollbacks, and that was one more"
        said = "says stop" if settings.action == "stop" else allows
        raise UserError(
            f"step {step}: {reason}; training.instability {said}\n"
            f"  {folder / FILE} names the dialogues; leave them out, or lower training.learning_rate"
        )
    change = "without them" if settings.action == "skip" else "with half the rates"
    log(f"  going back to step {event.back_to}, {change}")


def _write_down(folder: Path, step: int, reason: str, dialogues: Sequence[Seen], action: Action) -> tuple[Event, int]:
    """(the event, how many there are with it); a checkpoint that was gone back to in vain before is deleted."""
    events, checkpoint = read_events(folder), last_checkpoint(folder)
    if events and checkpoint and step_of(checkpoint) == events[-1].back_to:
        shutil.rmtree(checkpoint)
        checkpoint = last_checkpoint(folder)
    event = Event(step, reason, action, step_of(checkpoint) if checkpoint else 0, tuple(dialogues))
    write_events(folder, [*events, event])
    return event, len(events) + 1


def read_events(folder: Path) -> list[Event]:
    """Raises UserError: a line that this toolkit did not write."""
    path = folder / FILE
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [_event(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def write_events(folder: Path, events: Sequence[Event]) -> None:
    """Whole or not at all."""
    lines = [json.dumps(asdict(event), ensure_ascii=False) + "\n" for event in events]
    atomic_write(folder / FILE, "".join(lines))


def _event(place: str, line: bytes) -> Event:
    try:
        values = json.loads(line)
        event = Event(**{**values, "dialogues": tuple(Seen(**one) for one in values["dialogues"])})
        numbers = (event.step, event.back_to)
        if event.action not in get_args(Action) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"action {event.action!r}, steps {numbers}")
        return event
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{place}: not as this toolkit writes it ({error!r:.100})\n"
            f"  delete the line: the run then meets the dialogues that it names again"
        ) from error
