"""Read settings from YAML files and dotted flags into a checked dataclass, with one-line errors."""

import dataclasses
import math
import sys
import typing
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import yaml

from stdit.cli import help_texts, import_modules
from stdit.errors import UserError
from stdit.named_configs import find_config
from stdit.registry import Registry
from stdit.setting_checks import IMPORTS, check_file, check_key, explain, group_in, setting_types

Config = TypeVar("Config")


def parse(config_class: type[Config], argv: Sequence[str] | None = None, doc: str | None = None) -> Config:
    """Read a config dataclass from the command line.

    ``--config FILE``, or the name of a config that comes with stdit (`find_config`), may be repeated: later files win
    over earlier ones, flags (``--group.key value``) over files. A later list replaces an earlier one; a list of texts
    can also be given as one flag per entry, which is the only way if its field has ``metadata={"verbatim": True}``:
    its texts may look like lists. ``--help`` shows the docstring below each field; ``--print_config`` prints the
    result as YAML.

    If the dataclass has a field ``imports``, ``--import MODULE`` (repeatable) imports modules before any setting is
    checked, so that what they register can be named; see `import_modules`. A file's own ``imports`` are never
    imported: they must be given on the command line, too.

    Args:
        config_class: a dataclass whose fields may be dataclasses in turn.
        argv: arguments without the program's name; None: those of the process.
        doc: docstring of the command: its first paragraph begins ``--help``, the others end it.

    Raises:
        UserError: for an unknown key (naming the nearest one), a wrong type, or a file that cannot be read.
        SystemExit: with code 0 after ``--help`` and ``--print_config``.
    """
    import jsonargparse

    class Formatter(RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        pass

    known = dict(setting_types(config_class))
    arguments = list(sys.argv[1:] if argv is None else argv)
    imports: list[str] = []
    if IMPORTS in known:
        arguments, imports = _take_imports(arguments)
        import_modules(imports)
        known.pop(IMPORTS)
    arguments = list(_switches_on(_files_first(arguments), known))
    for argument in arguments:
        if argument.startswith("--"):
            check_key(argument[2:].partition("=")[0].removesuffix("+"), known, "--")
    fields = dataclasses.fields(config_class)  # type: ignore[arg-type]
    arguments = _verbatim(arguments, [field.name for field in fields if "verbatim" in field.metadata])
    arguments = _one_by_one(arguments, {name for name, hint in known.items() if hint == list[str]})
    for flag, value in pairwise(arguments):
        if flag == "--config":
            check_file(Path(value), config_class, imports)
    arguments = list(_emptied_first(arguments, {name for name, hint in known.items() if group_in(hint)}))

    description, examples = help_texts(doc)
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
        help="YAML file of settings, or the name of one of stdit's own, such as train/quickstart; later ones win, "
        "flags win.",
    )
    parser.add_class_arguments(config_class)
    _complete_help(parser, config_class)
    if imports:  # those of the files are among them
        arguments.append(f"--{IMPORTS}={imports}")
    try:
        settings = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(explain(str(error), known)) from None
    return config_class(**{field.name: settings[field.name] for field in fields})


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
    """Move ``--config FILE`` to the front, so that flags win wherever they stand; find the file of a name."""
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
            raise UserError("--config needs a file or a name: --config train/quickstart")
        files += ["--config", str(find_config(path))]
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


def _switches_on(arguments: list[str], known: dict[str, Any]) -> Iterator[str]:
    """Add ``true`` after a true-or-false setting that has no value."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        yield argument
        if argument[:2] == "--" == following[:2] and _is_switch(known.get(argument[2:])):
            yield "true"


def _is_switch(hint: Any) -> bool:
    """Return whether a setting may be true or false."""
    return hint is bool or bool in typing.get_args(hint)
