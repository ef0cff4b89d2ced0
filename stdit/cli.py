"""Read settings from YAML files and dotted flags into a checked dataclass, with one-line errors."""

import dataclasses
import difflib
import importlib
import math
import os
import re
import signal
import sys
import time
import types
import typing
from argparse import ArgumentError, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from stdit.errors import OtherRankError, UserError, interrupt_behind
from stdit.registry import IMPORTING, Registry
from stdit.suggestions import nearest_name, same_meaning, similar_name

Config = TypeVar("Config")
OWN_FLAGS = ("help", "config", "print_config", "import")
IMPORTS = "imports"
"""Field of a config that records the modules of --import."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""
_LAUNCHER_TIMEOUT = 10.0
"""Seconds that a launcher has to end the other processes after one has failed."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and exit with its code, that of a `UserError` (2), or 130 after Ctrl-C.

    If several processes fail with the same error, only the first on each machine prints it. The others wait for their
    launcher to end them; one that is not ended has failed alone, and prints its error, too.
    """
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
    summary, _, details = (doc or "").partition("\n\n")
    return ScriptParser(
        description=summary,
        epilog=details,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(
    config_class: type[Config], argv: Sequence[str] | None = None, description: str = "", examples: str = ""
) -> Config:
    """Read a config dataclass from the command line.

    ``--config FILE`` may be repeated: later files win over earlier ones, flags (``--group.key value``) over
    files. A later list replaces an earlier one; a list of texts can also be given as one flag per entry, which is the
    only way if its field has ``metadata={"verbatim": True}``: its texts may look like lists. ``--help`` shows the
    docstring below each field; ``--print_config`` prints the result as YAML.

    If the dataclass has a field ``imports``, ``--import MODULE`` (repeatable) imports modules before any setting is
    checked, so that what they register can be named; see `import_modules`. A file's own ``imports`` are never
    imported: they must be given on the command line, too.

    Args:
        config_class: a dataclass whose fields may be dataclasses in turn.
        argv: arguments without the program's name; None: those of the process.
        description: first lines of ``--help``.
        examples: last lines of ``--help``.

    Raises:
        UserError: for an unknown key (naming the nearest one), a wrong type, or a file that cannot be read.
        SystemExit: with code 0 after ``--help`` and ``--print_config``.
    """
    import jsonargparse

    class Formatter(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        pass

    known = dict(_settings(config_class))
    arguments = list(sys.argv[1:] if argv is None else argv)
    imports: list[str] = []
    if IMPORTS in known:
        arguments, imports = _take_imports(arguments)
        import_modules(imports)
        known.pop(IMPORTS)
    arguments = list(_switches_on(_files_first(arguments), known))
    for argument in arguments:
        if argument.startswith("--"):
            _check_key(argument[2:].partition("=")[0].removesuffix("+"), known, "--")
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    arguments = _verbatim(arguments, [field.name for field in fields if "verbatim" in field.metadata])
    arguments = _one_by_one(arguments, {name for name, hint in known.items() if hint == list[str]})
    for flag, value in pairwise(arguments):
        if flag == "--config":
            _check_file(Path(value), config_class, imports)
    arguments = list(_emptied_first(arguments, {name for name, hint in known.items() if _group_in(hint)}))

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        usage="%(prog)s [--config FILE ...] [--key value ...]",
        description=description,
        epilog=examples,
        formatter_class=Formatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of settings; later ones win, flags win.",
    )
    parser.add_class_arguments(config_class)
    _complete_help(parser, config_class)
    if imports:  # those of the files are among them
        arguments.append(f"--{IMPORTS}={imports}")
    try:
        settings = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(_explain(str(error), known)) from None
    return config_class(**{field.name: settings[field.name] for field in fields})


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


def _take_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split ``--import MODULE`` off the arguments: returns the other arguments, and the modules."""
    rest: list[str] = []
    modules: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name == f"--{IMPORTS}":
            raise UserError(f"--{IMPORTS} is not a setting: did you mean --import MODULE?")
        if name != "--import":
            rest.append(argument)
            continue
        module = value if equals else next(iterator, "")
        if not all(part.isidentifier() for part in module.split(".")) or module.endswith(".py"):
            raise UserError(
                f"--import {module}: must be the name of a module, such as --import my_module for my_module.py"
            )
        modules.append(module)
    return rest, list(dict.fromkeys(modules))


def _complete_help(parser: Any, config_class: Any) -> None:
    """Add the names of registries to ``--help``, and show ``imports`` as the flag that sets it."""
    choices = dict(_choices(config_class))
    for action in parser._actions:
        if action.dest in choices:
            action.help = f"{action.help} One of: {', '.join(choices[action.dest].names())}."
        if action.dest == IMPORTS:
            action.option_strings, action.metavar = ["--import"], "MODULE"


def _choices(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Registry[Any]]]:
    """Yield every dotted key that a registry lists the values of."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "choices" in field.metadata:
            yield prefix + field.name, field.metadata["choices"]
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _choices(hints[field.name], f"{prefix}{field.name}.")


def plain(value: Any) -> Any:
    """Convert dataclasses to dicts, tuples to lists, and paths to text, as YAML and JSON need."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any) -> str:
    """Return the complete config as YAML, which `parse` reads with ``--config``."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=110)


def _files_first(arguments: list[str]) -> list[str]:
    """Move ``--config FILE`` to the front, so that flags win wherever they stand."""
    files: list[str] = []
    rest: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        path = value if equals else next(iterator, None)
        if not path or path.startswith("--"):
            raise UserError("--config needs a file: --config configs/train/quickstart.yaml")
        files += ["--config", path]
    return files + rest


def _verbatim(arguments: list[str], names: Sequence[str]) -> list[str]:
    """Join the values of ``--name a --name b`` to one flag, quoted, so that nothing in them has a meaning."""
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    open_name = None
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if open_name and (not argument.startswith("-") or " " in argument):  # as argparse decides
            values.setdefault(open_name, []).append(argument)
            rest.pop()
            open_name = None
        elif argument.startswith("--") and name in names and equals:
            values.setdefault(name, []).append(value)
        else:
            rest.append(argument)
            open_name = name if argument.startswith("--") and name in names else None
    quoted = {
        name: yaml.safe_dump(texts, default_flow_style=True, width=math.inf) for name, texts in values.items()
    }
    return [*rest, *(f"--{name}={text.strip()}" for name, text in quoted.items())]


def _one_by_one(arguments: list[str], lists: set[str]) -> list[str]:
    """Make ``--name a --name b`` append to a list of texts; ``--name '[a, b]'`` sets it."""
    result = list(arguments)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        first = value if equals else next(iter(arguments[place + 1 :]), "")
        if argument.startswith("--") and name in lists and not (first[:1] == "[" and first[-1:] == "]"):
            result[place] = f"--{name}+{equals}{value}"
    return result


def _emptied_first(arguments: list[str], lists: set[str]) -> Iterator[str]:
    """Empty a list of groups before a file or a flag sets it.

    Otherwise jsonargparse takes missing settings of an entry from the earlier entry at its index, if both lists have
    the same length.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument == "--config":
            content = yaml.safe_load(Path(following).read_text(encoding="utf-8"))
            named = {name for name in lists if _holds(content, name)}
        else:
            named = lists & {argument.removeprefix("--").partition("=")[0]} if argument[:2] == "--" else set()
        yield from (f"--{name}=[]" for name in sorted(named))
        yield argument


def _holds(content: Any, name: str) -> bool:
    """Return whether nested mappings have a dotted key."""
    group, _, rest = name.partition(".")
    return isinstance(content, dict) and (
        name in content or (group in content and bool(rest) and _holds(content[group], rest))
    )


def _group_in(hint: Any) -> Any:
    """Return the dataclass of the entries of a list type; None for other types."""
    return next((t for t in typing.get_args(hint) if dataclasses.is_dataclass(t)), None)


def _switches_on(arguments: list[str], known: dict[str, Any]) -> Iterator[str]:
    """Add ``true`` after a true-or-false setting that has no value."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        yield argument
        if argument[:2] == "--" == following[:2] and _is_switch(known.get(argument[2:])):
            yield "true"


def _is_switch(hint: Any) -> bool:
    """Return whether a setting may be true or false."""
    return hint is bool or bool in typing.get_args(hint)


def _settings(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its type: groups (dataclasses) and leaves."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        yield prefix + field.name, hint
        if dataclasses.is_dataclass(hint):
            yield from _settings(hint, f"{prefix}{field.name}.")


def _check_key(key: str, known: dict[str, Any], dashes: str = "", where: str = "") -> None:
    """Raise UserError naming the nearest key unless ``key`` is a setting (or an entry of a dict setting)."""
    if key in known or (dashes and key in OWN_FLAGS):
        return
    group = key.rpartition(".")[0]
    while group:
        if typing.get_origin(known.get(group)) is dict:
            return
        group = group.rpartition(".")[0]
    flags = [flag for flag in OWN_FLAGS if dashes and difflib.get_close_matches(key, [flag], 1, 0.75)]
    own = OWN_FLAGS if dashes else ()
    nearest = same_meaning(key, [*known, *own]) or similar_name(key, [*known, *flags])
    hint = f"did you mean {dashes}{nearest}?" if nearest else "see --help for all settings."
    raise UserError(f"{where}{dashes}{key} is not a setting: {hint}")


def _check_file(path: Path, config_class: Any, imports: Sequence[str]) -> None:
    """Raise UserError if a YAML file cannot be read, or has an unknown key, an invalid null, or other imports."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be empty when it is read again
        raise UserError(f"--config {path}: is a folder, pipe or device: name a file.")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--config {path}: cannot be read ({reason}).") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as of an impossible date
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold settings, such as 'name: first'.")
    if repeated:
        raise UserError(f"--config {path}: {repeated}: only the last one would count, so remove one of them.")
    recorded = content.get(IMPORTS) or []
    missing = [name for name in recorded if name not in imports] if isinstance(recorded, list) else [recorded]
    if missing and any(field.name == IMPORTS for field in dataclasses.fields(config_class)):
        flags = " ".join(f"--import {name}" for name in missing)
        raise UserError(
            f"--config {path} was made with {flags}, and what a file names is not imported by itself: add {flags} to "
            "the command if you trust it."
        )
    _check_content(content, config_class, "", f"--config {path}: ")


def _repeated_key(root: yaml.Node | None) -> str | None:
    """Name a key that a mapping of a YAML document has twice, with its line; None if there is none."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    return f"line {key.start_mark.line + 1} sets {key.value} again"
                keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                nodes.append(value)
    return None


def _check_content(content: dict[Any, Any], config_class: Any, prefix: str, where: str) -> None:
    """Check the keys and nulls of a mapping against a dataclass."""
    known = dict(_settings(config_class))
    for key, value in content.items():
        _check_key(f"{prefix}{key}", {prefix + name: hint for name, hint in known.items()}, where=where)
        hint = known.get(str(key))
        item = _group_in(hint)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}{prefix}{key} = {value}: must be a group of settings.")
            _check_content(value, hint, f"{prefix}{key}.", where)
        elif value is None and hint is not None and type(None) not in typing.get_args(hint):
            raise UserError(f"{where}{prefix}{key} = null: must be {_describe(hint)}.")
        elif item is not None and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_content(entry, item, f"{prefix}{key}[{index}].", where)


def _explain(message: str, known: dict[str, Any]) -> str:
    """Turn a message of jsonargparse into one line."""
    if stray := re.match(r"[Uu]nrecognized arguments: (.*)", message, re.DOTALL):
        return _explain_stray(stray[1], known)
    if flag := re.search(r"argument (--[\w.]+)(?:/--[\w.]+\+)?: expected one argument", message):
        return f"{flag[1]} needs a value; one that begins with a dash is joined to it: {flag[1]}=-x"
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    hint = known.get(key[1]) if key else None
    item = _group_in(hint)
    option = re.search(r"Option '(\w+)' is not accepted", message)
    if key and item is not None and option:
        nearest = nearest_name(option[1], [field.name for field in dataclasses.fields(item)])
        hint_text = f"did you mean {nearest}?" if nearest else "see --help for all settings."
        return f"{key[1]} has {option[1]!r}, which is not a setting: {hint_text}"
    if key and value and hint is not None and not dataclasses.is_dataclass(hint):
        return f"{key[1]} = {value[1].strip()}: must be {_describe(hint)}."
    return " ".join(message.split())


def _explain_stray(arguments: str, known: Iterable[str]) -> str:
    """Say which flag was probably meant by ``-c`` or ``name=value``, which are none."""
    first = arguments.split()[0]
    name, equals, value = first.lstrip("-+").partition("=")
    names = [*known, *OWN_FLAGS]
    nearest = same_meaning(name, names) or (similar_name(name, names) if equals else None)
    if nearest is None or not (equals or first.startswith("-")):
        return f"unrecognized arguments: {arguments}"
    return f"{first} is not a flag: did you mean --{nearest}{' ' * bool(equals)}{value}?"


def _describe(hint: Any) -> str:
    """Describe a type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in names:
        return names[hint]
    if origin is typing.Literal and len(inner) == 1:
        return str(inner[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in inner)
    if origin is tuple and Ellipsis not in inner:
        return f"a list of {len(inner)}: [{', '.join(_describe(part) for part in inner)}]"
    if origin in (list, tuple):
        return f"a list, each entry {_describe(inner[0])}"
    if origin is dict:
        return f"a mapping of names, each to {_describe(inner[1])}"
    if dataclasses.is_dataclass(hint):
        return "a group of settings: {" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return getattr(hint, "__name__", str(hint))
