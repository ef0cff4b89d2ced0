"""Change a setting away from its default, and compare what comes out. See the tests beside this file.

A `Change` is what a user would write to change one setting. For most settings it is made from the type; tables beside
the tests have the others, with the settings that must stand beside them to have an effect.
"""

import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest

from stdit.errors import UserError

Outcome = dict[str, str | list[float]]
"""What can be observed, by name: files, messages and calls as text, and numbers, which may differ by rounding."""


@dataclass(frozen=True)
class Change:
    """The flags that change a setting, and those that both runs have."""

    flags: Sequence[str]
    beside: Sequence[str] = ()
    lifts: str = ""
    """Words of the error that a run without the change ends with."""


def leaves(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted name, type and default of each setting of nested dataclasses."""
    hints, default = typing.get_type_hints(config_class), config_class()
    for field in fields(config_class):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], getattr(default, field.name)


def changed_value(hint: Any, default: Any) -> str:
    """Return another value of a type, as a flag has it."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        return "false" if default else "true"
    if kind is int:
        return str((default or 0) + 1)
    if kind is float:
        return str(1.5 * default if default else 0.5)
    if typing.get_origin(kind) is typing.Literal:
        return str(next(value for value in typing.get_args(kind) if value != default))
    raise AssertionError(f"add a change for a setting of type {hint} to the table beside this test")


def change_of(key: str, hint: Any, default: Any, table: Mapping[str, Change]) -> Change:
    """Return the change of a setting: from a table, or made from its type."""
    return table[key] if key in table else Change([f"--{key}", changed_value(hint, default)])


def check_observed(key: str, change: Change, outcome_of: Callable[[Sequence[str]], Outcome]) -> None:
    """Fail unless the change of a setting changes the outcome."""
    before, after = outcome_of(tuple(change.beside)), outcome_of((*change.beside, *change.flags))
    assert differences(before, after), f"{key} is ignored: {' '.join(change.flags)} changes nothing"


def differences(one: Outcome, other: Outcome) -> list[str]:
    """Return the names of what differs between two outcomes, by more than the rounding of numbers."""

    def equal(a: str | list[float], b: str | list[float]) -> bool:
        numbers = isinstance(a, list) and isinstance(b, list)
        return a == (pytest.approx(b, rel=1e-4, abs=1e-7, nan_ok=True) if numbers else b)

    return [
        key
        for key in {**one, **other}
        if key not in one or key not in other or not equal(one[key], other[key])
    ]


def outcome_of_call(call: Callable[[], Outcome]) -> Outcome:
    """Return the outcome of a call; that of an error for users, or of --help, is its message."""
    try:
        return call()
    except UserError as error:
        assert str(error).strip()
        return {"error": str(error)}
    except SystemExit as end:
        assert end.code in (0, None), end
        return {"exit": "0"}


@contextmanager
def recorded(calls: Mapping[str, Callable[..., Any] | None], seen: list[str]) -> Iterator[None]:
    """Record plain arguments of functions, named "module.function".

    Args:
        calls: what replaces a function; None: it is called itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        for target, instead in calls.items():
            patch.setattr(target, _recording(target, _resolve(target) if instead is None else instead, seen))
        yield


def _recording(name: str, function: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        given = [*args, *options.values()]
        seen.append(f"{name}: {[value for value in given if isinstance(value, bool | int | float | str)]}")
        return function(*args, **options)

    return call


def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(pytest.importorskip(module) if module.islower() else _resolve(module), name)
