"""The exceptions that are written for people."""


class UserError(ValueError):
    """A setting or an input that a person can put right.

    The message names the value, the rule that it breaks and the way out. Entry scripts print it as
    ``error: <message>`` without a traceback and exit with its code.
    """

    code = 2


class LostRankError(UserError):
    """A process of the run died or hangs: no setting is to blame, and the run may be tried again."""

    code = 1


class OtherRankError(UserError):
    """Another process failed, and says why; this one ends quietly, with the other's code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code
