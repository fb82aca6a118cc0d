"""SIGTERM and SIGINT while training: heard, and acted on at the end of a step. Told again, it ends at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 2.0
"""Seconds in which a second signal is the first one over again: a terminal tells launcher and processes, and the
launcher tells the processes."""


class Heard:
    """The signal that asked to stop, 0 as long as none did."""

    def __init__(self) -> None:
        self.signal, self._at = 0, 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._at = number, time.monotonic()
        elif time.monotonic() > self._at + ECHO:
            raise KeyboardInterrupt


@contextmanager
def listening() -> Iterator[Heard]:
    """Inside, both signals are only noted. Handlers belong to the main thread; in others nothing is heard."""
    heard = Heard()
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
