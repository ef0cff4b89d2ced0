"""Trigger words in captions."""

import pytest

from stdit.data.config import DataConfig
from stdit.data.manifest.clips import Clips, Strings
from stdit.data.manifest.triggers import clips_with_trigger, has_trigger, with_trigger
from stdit.errors import UserError


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks a dog"),
        ("a {trigger} dog, {trigger}", "a sks dog, sks"),
        ("a sks dog", "a sks dog"),
        ("asks a dog", "sks asks a dog"),
        ("a sks {trigger}", "a sks sks"),
        ("sks", "sks"),
    ],
)
def test_captions_get_the_word_once(caption: str, expected: str) -> None:
    assert list(with_trigger([caption], "sks")) == [expected]
    clips = Clips(Strings(["a.mp4"]), Strings([caption]), *([1] * 4))  # type: ignore[list-item]
    assert clips_with_trigger(clips, "sks").texts[0] == expected
    assert has_trigger(expected, "sks")


def test_phrases_and_signs_are_words_too() -> None:
    assert list(with_trigger(["a dog"], "[V] (new)")) == ["[V] (new) a dog"]
    assert has_trigger("the [V] (new) dog", "[V] (new)") and not has_trigger("a V new dog", "[V] (new)")


def test_a_place_without_a_word_is_an_error() -> None:
    clips = Clips(Strings(["a.mp4"]), Strings(["a {trigger} dog"]), *([1] * 4))  # type: ignore[list-item]
    with pytest.raises(
        UserError, match="'a {trigger} dog' has a place for a trigger word.*: set data.trigger"
    ):
        clips_with_trigger(clips, None)
    clips = Clips(Strings(["a.mp4"]), Strings(["a dog"]), *([1] * 4))  # type: ignore[list-item]
    assert clips_with_trigger(clips, None) is clips


@pytest.mark.parametrize("trigger", ["", " ", "sks "])
def test_impossible_words(trigger: str) -> None:
    with pytest.raises(UserError, match="data.trigger = .*must be a word or phrase"):
        DataConfig(manifest="a", trigger=trigger).validate()
