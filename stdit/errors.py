"""Exceptions whose messages are written for people, and what messages have in common."""

import importlib.metadata
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


class UserError(ValueError):
    """An error in a setting or an input that a person can correct.

    The message has the value, the rule that it breaks and the way out. Entry scripts print it as ``error: <message>``
    without a traceback, and exit with its ``code``.
    """

    code = 2


class LostRankError(UserError):
    """A process of the run died or hangs. No setting is wrong, and the run can be tried again."""

    code = 1


def interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interrupt that an error is, or was raised because of; None if there is none.

    A signal raises wherever Python is: libraries turn that into errors of their own, and cleaning up may fail,
    because the other ranks end, too.
    """
    errors, seen = [error], set()
    while errors:
        one = errors.pop()
        if isinstance(one, KeyboardInterrupt):
            return one
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            errors += [one.__cause__, one.__context__]
    return None


def raise_between_imports(interrupt: KeyboardInterrupt, frame: FrameType | None) -> None:
    """Raise an interrupt in a signal handler; if a module is being imported, as soon as that is complete.

    An import that is cut off leaves libraries half loaded: they swallow the interrupt, abort the process, or fail
    with errors of their own.

    Args:
        frame: in which the signal came.
    """
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    if importer is None:
        raise interrupt

    def trace(at: FrameType, event: str, argument: Any) -> NoReturn:
        raise interrupt

    importer.f_trace, importer.f_trace_opcodes = trace, True  # called before its next operation
    sys.settrace(lambda *_: None)


class OtherRankError(UserError):
    """Another process failed and prints why; this one exits with the other's code and prints nothing."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def listed(names: Sequence[str], count: int) -> str:
    """Return the first names of ``count``, and how many more there are: "a, b and 3 more"."""
    more = count - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra of pyproject.toml, from any folder."""
    clone = Path(__file__).parents[1]
    if (clone / "pyproject.toml").is_file():
        place = "." if clone == Path.cwd() else str(clone)
        return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"
    # Not in a clone, and stdit is on no index: name the packages.
    wanted = re.compile(rf"(.*?)\s*;.*extra\s*==\s*[\"']{extra}[\"']")
    found = [wanted.match(line) for line in importlib.metadata.requires("stdit") or []]
    return shlex.join(["pip", "install", *(match[1] for match in found if match)])
