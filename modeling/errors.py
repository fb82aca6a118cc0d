"""The one exception that stands for the user's mistakes: its message is the whole story, no traceback needed."""


class UserError(ValueError):
    """What was got, what was expected, where, and how to repair it."""
