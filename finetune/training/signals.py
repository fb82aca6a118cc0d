"""SIGTERM and SIGINT stop a training at the end of its step, saved; a second signal ends it at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

ECHO = 2.0
"""Seconds in which a second signal is the first one again: a terminal signals launcher and processes, and the launcher
signals the processes."""


class StopSignal:
    """A handler that only notes the signal."""

    def __init__(self) -> None:
        self.received, self._at = 0, 0.0
        """The signal's number; 0 until there is one."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() > self._at + ECHO:
            raise KeyboardInterrupt


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Note both signals inside. Handlers belong to the main thread; in other threads nothing is noted."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAfterStep(TrainerCallback):
    """Ends the training after a step, saved, once `asked` returns True."""

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked():
            control.should_save = control.should_training_stop = True
