"""What every command does: exit codes, one line for an error, plain flags, and the modules of ``--import``."""

import importlib
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stdit.errors import OtherRankError, UserError, interrupt_behind, raise_between_imports
from stdit.registry import IMPORTING
from stdit.suggestions import nearest_name

_INSTALLED = {"train": "stdit-train", "sample": "stdit-sample", "prepare_data": "stdit-prepare"}
"""Script of the repository to the command that a wheel installs; both do the same."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""
_LAUNCHER_TIMEOUT = 10.0
"""Seconds that a launcher has to end the other processes after one has failed."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit with its code, that of a `UserError` (2), or 130 after Ctrl-C.

    If several processes fail with the same error, only the first on each machine prints it. The others wait for their
    launcher to end them; one that is not ended has failed alone, and prints its error, too.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda _, frame: raise_between_imports(KeyboardInterrupt(), frame))
    try:
        code = main() or 0
        _end_process_group()
    except OtherRankError as error:
        code = error.code
    except UserError as error:
        whose = ""
        if not _prints_errors():
            time.sleep(_LAUNCHER_TIMEOUT)
            whose = f"rank {os.environ.get('RANK', os.environ['LOCAL_RANK'])}: "
        print(f"error: {whose}{error}", file=sys.stderr)
        code = error.code
    except (Exception, KeyboardInterrupt) as error:
        interrupt = interrupt_behind(error)
        if interrupt is None:
            raise
        print("interrupted", file=sys.stderr)
        code = getattr(interrupt, "code", INTERRUPTED)
    if code == INTERRUPTED:  # launchers forward the signal: a second one ends the process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _end_process_group() -> None:
    """End the process group, whose threads can abort a process that is exiting."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _prints_errors() -> bool:
    """Return whether this process prints errors; once the ranks exchange errors, each of them does."""
    distributed = sys.modules.get("torch.distributed")
    connected = distributed is not None and distributed.is_initialized()
    return connected or os.environ.get("LOCAL_RANK", "0") == "0"


class ScriptParser(ArgumentParser):
    """A parser of plain flags whose error for an unknown flag names the nearest one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(found, unknown)
        return found

    def refuse(self, found: Namespace, unknown: Sequence[str]) -> NoReturn:
        """Exit with code 2 and an error about the arguments that the chosen step does not have."""
        step: ArgumentParser = self
        while chosen := [a for a in step._actions if isinstance(a.choices, dict) and hasattr(found, a.dest)]:
            steps: Any = chosen[0].choices
            step = steps[getattr(found, chosen[0].dest)]
        flags = [flag[2:] for flag in step._option_string_actions if flag.startswith("--")]
        name = unknown[0].lstrip("-").partition("=")[0]
        nearest = nearest_name(name, flags) if unknown[0].startswith("-") else None
        if nearest is None:
            step.error(f"unrecognized arguments: {' '.join(unknown)}")
        step.error(f"unrecognized argument {unknown[0]}: did you mean --{nearest}?")


def script_parser(doc: str | None) -> ScriptParser:
    """Return a parser of plain flags for a script, with its docstring ``doc`` as help."""
    summary, details = help_texts(doc)
    return ScriptParser(
        description=summary,
        epilog=details,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_import(parser: ArgumentParser, text: str) -> None:
    """Add the flag --import, whose values `import_modules` takes."""
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=text)


def help_texts(doc: str | None) -> tuple[str, str]:
    """Return the first and the last lines of ``--help`` from a command's docstring."""
    summary, _, details = as_started(doc or "").partition("\n\n")
    return summary, details


def as_started(text: str) -> str:
    """Return a text of stdit's own with the commands named as this process was started.

    ``python train.py`` is ``stdit-train``, and so on, if an installed command was started.
    """
    if Path(sys.argv[0]).name not in _INSTALLED.values():
        return text
    pattern = rf"(?:python )?(?:scripts/)?\b({'|'.join(_INSTALLED)})\.py\b"
    return re.sub(pattern, lambda match: _INSTALLED[match[1]], text)


def import_modules(modules: Sequence[str]) -> None:
    """Import modules of the user's, whose ``register_...`` calls add codecs, optimizers and so on.

    They are found on Python's path or in the current folder, which is added to the path.

    Raises:
        UserError: if a module does not exist, or raises.
    """
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for module in modules:
        token = IMPORTING.set(module)
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"--import {module}: there is no such module on Python's path or in {os.getcwd()}: check "
                    "its name, or run the command in the folder of the module."
                ) from None
            raise UserError(
                f"--import {module}: importing it raises {type(error).__name__}: {error}. Fix the module."
            ) from error
        finally:
            IMPORTING.reset(token)
