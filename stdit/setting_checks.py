"""Settings that a dataclass has, and one-line errors about keys and values that do not fit them."""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from stdit.errors import UserError, listed
from stdit.suggestions import REPLACED, nearest_name, same_meaning, similar_name

OWN_FLAGS = ("help", "config", "print_config", "import")
"""Flags of every command that takes settings."""
IMPORTS = "imports"
"""Field of a config that records the modules of --import."""


def group_in(hint: Any) -> Any:
    """Return the dataclass of the entries of a list type; None for other types."""
    return next((t for t in typing.get_args(hint) if dataclasses.is_dataclass(t)), None)


def setting_types(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its type: groups (dataclasses) and leaves."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        yield prefix + field.name, hint
        if dataclasses.is_dataclass(hint):
            yield from setting_types(hint, f"{prefix}{field.name}.")


def check_key(
    key: str, known: dict[str, Any], dashes: str = "", where: str = "", elsewhere: Iterable[str] = ()
) -> None:
    """Raise UserError naming the nearest key unless ``key`` is a setting (or an entry of a dict setting).

    Args:
        elsewhere: settings of other groups, which may have been meant.
    """
    if key in known or (dashes and key in OWN_FLAGS):
        return
    group = key.rpartition(".")[0]
    while group:
        if typing.get_origin(known.get(group)) is dict:
            return
        group = group.rpartition(".")[0]
    flags = [flag for flag in OWN_FLAGS if dashes and difflib.get_close_matches(key, [flag], 1, 0.75)]
    own = OWN_FLAGS if dashes else ()
    nearest = same_meaning(key, [*known, *own, *elsewhere]) or similar_name(key, [*known, *flags])
    hint = f"did you mean {dashes}{nearest}?" if nearest else "see --help for all settings."
    hint = REPLACED.get(key, hint)
    raise UserError(f"{where}{dashes}{key} is not a setting: {hint}")


def check_file(path: Path, config_class: Any, imports: Sequence[str]) -> None:
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
    known = [name for name, _ in setting_types(config_class)]
    other = [str(key) for key in content if key not in known]
    strange = [key for key in other if not (same_meaning(key, known) or similar_name(key, known))]
    if strange and len(other) > len(content) / 2:  # not just typing errors
        raise UserError(
            f"--config {path}: it seems to be for another command, since this one has no setting "
            f"{listed(strange[:3], len(strange))}: give a file with settings of --help."
        )
    _check_content(content, config_class, "", f"--config {path}: ", known)


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


def _check_content(
    content: dict[Any, Any], config_class: Any, prefix: str, where: str, everything: Sequence[str]
) -> None:
    """Check the keys and nulls of a mapping against a dataclass; ``everything``: all settings there are."""
    known = dict(setting_types(config_class))
    for key, value in content.items():
        here = {prefix + name: hint for name, hint in known.items()}
        check_key(f"{prefix}{key}", here, where=where, elsewhere=everything)
        hint = known.get(str(key))
        item = group_in(hint)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}{prefix}{key} = {value}: must be a group of settings.")
            _check_content(value, hint, f"{prefix}{key}.", where, everything)
        elif value is None and hint is not None and type(None) not in typing.get_args(hint):
            raise UserError(f"{where}{prefix}{key} = null: must be {_describe(hint)}.")
        elif item is not None and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_content(entry, item, f"{prefix}{key}[{index}].", where, everything)


def explain(message: str, known: dict[str, Any]) -> str:
    """Turn a message of jsonargparse into one line."""
    if stray := re.match(r"[Uu]nrecognized arguments: (.*)", message, re.DOTALL):
        return _explain_stray(stray[1], known)
    if flag := re.search(r"argument (--[\w.]+)(?:/--[\w.]+\+)?: expected one argument", message):
        return f"{flag[1]} needs a value; one that begins with a dash is joined to it: {flag[1]}=-x"
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    hint = known.get(key[1]) if key else None
    item = group_in(hint)
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
    first = next(iter(arguments.split()), "")
    name, equals, value = first.lstrip("-+").partition("=")
    names = [*known, *OWN_FLAGS]
    nearest = same_meaning(name, names) or (similar_name(name, names) if equals else None)
    if nearest is None or not (equals or first.startswith("-")):
        return f"unrecognized arguments: {arguments.strip() or 'an empty one'}"
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
