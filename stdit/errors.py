"""Exceptions whose messages are written for people."""


class UserError(ValueError):
    """An error in a setting or an input that a person can correct.

    The message has the value, the rule that it breaks and the way out. Entry scripts print it as ``error: <message>``
    without a traceback, and exit with its ``code``.
    """

    code = 2


class LostRankError(UserError):
    """A process of the run died or hangs. No setting is wrong, and the run can be tried again."""

    code = 1


class OtherRankError(UserError):
    """Another process failed and prints why; this one exits with the other's code and prints nothing."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
