"""Trigger words: a word in the captions of the clips of a subject or style, by which prompts then ask for it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from stdit.data.manifest.clips import Clips, Strings
from stdit.errors import UserError

PLACE = "{trigger}"
"""Where a caption has the trigger word; in others it comes first."""


def has_trigger(text: str, trigger: str) -> bool:
    """Return whether a text has the trigger word, as a word of its own and in the same case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text) is not None


def with_trigger(texts: Iterable[str], trigger: str | None) -> Iterator[str]:
    """Yield captions with the trigger word, which those that have it already keep as it is.

    Raises:
        UserError: for a caption with a place for the word, if there is none.
    """
    for text in texts:
        if trigger is None and PLACE in text:
            raise UserError(
                f"the caption {text!r} has a place for a trigger word, and there is none: set data.trigger, such as "
                "sks. Captions of data.regularisation have no such places."
            )
        if trigger is None or (PLACE not in text and has_trigger(text, trigger)):
            yield text
        else:
            yield (text if PLACE in text else f"{PLACE} {text}").replace(PLACE, trigger)


def clips_with_trigger(clips: Clips, trigger: str | None) -> Clips:
    """Return clips whose captions have the trigger word. Raises as `with_trigger` does."""
    if trigger is None and PLACE.encode() not in clips.texts.utf8:
        return clips
    return replace(clips, texts=Strings(with_trigger(clips.texts, trigger)))
