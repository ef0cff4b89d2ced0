"""The one exception that is written for people."""


class UserError(ValueError):
    """A setting or an input that a person can put right.

    The message names the value, the rule that it breaks and the way out. Entry scripts print it as
    ``error: <message>`` without a traceback and exit with code 2.
    """


class OtherRankError(UserError):
    """Another process failed, and says why; this one ends quietly."""
