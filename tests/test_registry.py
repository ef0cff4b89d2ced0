"""Registries: names to objects, built in or registered by a user's module."""

import sys

import pytest

from stdit.errors import UserError
from stdit.registry import IMPORTING, Registry


def shout(text: str) -> str:
    return text.upper()


def test_entries_are_found_and_listed_in_order() -> None:
    registry = Registry("speech.name", {"shout": shout})
    registry.register("join", "posixpath:join")
    assert registry.names() == ["shout", "join"]
    assert registry.get("shout") is shout
    assert registry.get("join")("a", "b") == "a/b"  # type: ignore[arg-type, call-arg]


def test_a_heavy_entry_is_imported_when_it_is_asked_for() -> None:
    sys.modules.pop("this_is_not_yet_there", None)
    registry: Registry[object] = Registry("codec.name", {"heavy": "this_is_not_yet_there:Thing"})
    registry.check("heavy")
    assert registry.names() == ["heavy"]
    with pytest.raises(ModuleNotFoundError):
        registry.get("heavy")


def test_an_unknown_name_gives_the_nearest_one_and_the_way_out() -> None:
    registry = Registry("speech.name", {"shout": shout})
    with pytest.raises(
        UserError, match=r"speech.name = shuot: .*one of shout .*mean shout\?.*--import MODULE"
    ):
        registry.get("shuot")
    with pytest.raises(UserError, match=r"speech.name = sing.*made with --import my_songs: add it"):
        registry.check("sing", imports=["my_songs"])


def test_the_module_that_registered_a_name_is_recorded() -> None:
    registry = Registry("speech.name", {"shout": shout})
    registry.register("again", shout)
    IMPORTING.set("my_speech")
    registry.register("join", "posixpath:join")
    IMPORTING.set(None)
    assert [registry.module(name) for name in ("shout", "again", "join")] == [None, __name__, "my_speech"]


def test_a_name_has_one_meaning() -> None:
    registry = Registry("speech.name", {"shout": shout})
    registry.register("shout", shout)
    with pytest.raises(UserError, match="already registered"):
        registry.register("shout", len)
