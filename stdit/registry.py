"""Named choices of a setting, which a user's own module can extend."""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Generic, TypeVar, cast

from stdit.errors import UserError

Entry = TypeVar("Entry")

IMPORTING: ContextVar[str | None] = ContextVar("IMPORTING", default=None)
"""The module that ``--import`` is importing now."""


class Registry(Generic[Entry]):
    """Map the names that a setting accepts to objects.

    An entry that is slow to import is given as ``"module:attribute"``, and imported when :meth:`get` asks for it.

    Args:
        setting: the setting that chooses, for messages, such as ``codec.name``.
        entries: the built-in choices.
    """

    def __init__(self, setting: str, entries: Mapping[str, Entry | str]) -> None:
        self.setting = setting
        self._entries = dict(entries)
        self._modules: dict[str, str] = {}

    def register(self, name: str, entry: Entry | str) -> None:
        """Add a choice. Registering the same object again (a module that is reloaded) replaces it.

        Raises:
            UserError: if the name already stands for something else.
        """
        if name in self._entries and _origin(self._entries[name]) != _origin(entry):
            raise UserError(f"{self.setting} = {name}: this name is already registered; choose another name.")
        self._entries[name] = entry
        self._modules[name] = IMPORTING.get() or _origin(entry)[0]

    def names(self) -> list[str]:
        """Return all names: the built-in ones first, then in the order of registration."""
        return list(self._entries)

    def check(self, name: str, imports: Sequence[str] = ()) -> None:
        """Raise UserError, with the nearest name, unless ``name`` is registered.

        Args:
            imports: the modules that were imported when the run or file that has this name was written.
        """
        if name in self._entries:
            return
        message = f"{self.setting} = {name}: must be one of {', '.join(self._entries)}"
        if nearest := difflib.get_close_matches(str(name), self._entries, 1):
            message += f" (did you mean {nearest[0]}?)"
        if imports:
            flags = " ".join(f"--import {module}" for module in imports)
            raise UserError(f"{message}. It was made with {flags}: add it (in Python: import the module).")
        raise UserError(f"{message}; a module of your own that registers {name} is added by --import MODULE.")

    def module(self, name: str) -> str | None:
        """Return the module that must be imported to register ``name``; None for built-in names."""
        return self._modules.get(name)

    def get(self, name: str) -> Entry:
        """Return what a name stands for. Raises UserError as :meth:`check` does."""
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(Entry, getattr(importlib.import_module(module), attribute))
            self._entries[name] = entry
        return entry


def _origin(entry: object) -> tuple[str, str]:
    """Return the names of an object's module and of the object in it, which do not change when that is reloaded."""
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return module, attribute
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
