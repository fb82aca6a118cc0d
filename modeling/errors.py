"""Exceptions whose message is enough for the user: a command prints it without a traceback."""


class UserError(ValueError):
    """The user's mistake: what was got, what was expected, where, and how to repair it."""


class Interrupted(Exception):  # noqa: N818
    """Training received a signal to stop, and has saved its state."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
