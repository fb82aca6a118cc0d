"""The exceptions whose message is the whole story, no traceback needed."""


class UserError(ValueError):
    """What was got, what was expected, where, and how to repair it."""


class Interrupted(Exception):  # noqa: N818
    """Training was told to stop, and has saved its state."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
