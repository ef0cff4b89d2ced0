"""Warnings about requests that are unlike what a model was trained on. Imports no torch."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from stdit.data.manifest.triggers import has_trigger
from stdit.errors import listed
from stdit.pipelines.requests import Request

logger = logging.getLogger(__name__)

MAX_WORDS = 8
"""Words that are named for each prompt."""
_SIZE = ("num_frames", "height", "width", "fps")


def words_of(text: str) -> list[str]:
    """Return the distinct words of a text, in lower case and in their order."""
    return list(dict.fromkeys(re.findall(r"\w+", text.lower())))


def warn_of_untrained(
    requests: Sequence[Request], recorded: Mapping[str, Any], conditioning: Mapping[str, float]
) -> None:
    """Log a warning for all that requests have and training did not: words, sizes, conditioning frames.

    Args:
        recorded: settings of the pipeline; words and sizes are compared if it records those of its training.
        conditioning: the mask strategies of its training, ``flow.conditioning``.
    """
    if recorded.get("vocabulary"):
        _warn_of_words(requests, frozenset(recorded["vocabulary"].split()))
    warn_of_sizes(requests, recorded)
    conditioned = any(
        r.image is not None or r.conditions or r.mask_entries or r.segments.count > 1 for r in requests
    )
    warn_of_conditioning(conditioned, conditioning)


def warn_of_conditioning(conditioned: bool, conditioning: Mapping[str, float]) -> None:
    """Log a warning if videos have conditioning frames, but the training, ``flow.conditioning``, had none."""
    if conditioned and not conditioning:
        logger.warning(
            "the model was trained without conditioning frames (flow.conditioning): it may ignore them"
        )


def warn_of_missing_trigger(prompts: Iterable[str], trigger: str | None, whose: str) -> None:
    """Log a hint for each prompt without the trigger word of a training.

    Args:
        whose: what has the word, such as the file of an adapter.
    """
    for prompt in dict.fromkeys(prompts):
        if trigger is not None and not has_trigger(prompt, trigger):
            logger.warning(
                'prompt "%.80s": it lacks "%s", the trigger word of %s: add it for what that was trained on',
                *(prompt, trigger, whose),
            )


def _warn_of_words(requests: Iterable[Request], vocabulary: Collection[str]) -> None:
    texts = [text for r in requests for text in (r.prompt, *r.segment_prompts, r.negative_prompt or "")]
    for text in dict.fromkeys(texts):
        if text and not words_of(text):
            logger.warning('prompt "%.80s": it has no word that the model could follow', text)
        if unknown := [f'"{word}"' for word in words_of(text) if word not in vocabulary]:
            logger.warning(
                'prompt "%.80s": the model was trained on no caption with the word%s %s: it may ignore or mistake %s',
                *(text, "s" * (len(unknown) > 1), listed(unknown[:MAX_WORDS], len(unknown))),
                "them" if len(unknown) > 1 else "it",
            )


def warn_of_sizes(requests: Iterable[Request], recorded: Mapping[str, Any]) -> None:
    """Log a warning for all sizes that a pipeline with these settings was not trained on, if it records those."""
    trained = [tuple(one[name] for name in _SIZE) for one in recorded.get("trained_sizes") or ()]
    if not trained:
        return
    asked = [tuple(request.settings.resolved(recorded)[name] for name in _SIZE) for request in requests]
    if other := [_described(size) for size in dict.fromkeys(asked) if size not in trained]:
        known = [_described(size) for size in trained]
        logger.warning(
            "%s: the model was not trained on that, but on %s: the videos may be worse",
            *(listed(other[:2], len(other)), listed(known[:3], len(known))),
        )


def warn_of_steps(settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Log a warning for other steps than those in which a few-step student learned to make a video.

    Args:
        settings: all settings of a call.
        recorded: settings of the pipeline.
    """
    trained: list[int] = recorded.get("trained_steps") or []
    if trained and settings["num_inference_steps"] not in trained:
        logger.warning(
            "num_inference_steps = %d: the model learned to make a video in %s steps: each step aims at a whole "
            "video instead of following a path, so others make it worse, also more of them",
            *(settings["num_inference_steps"], ", ".join(map(str, trained))),
        )
    if trained and settings["solver"] not in (None, "euler"):
        logger.warning(
            "solver = %s: the model learned to sample with euler: it has no path that another could follow better, "
            "so the videos may be worse",
            settings["solver"],
        )


def _described(size: tuple[Any, ...]) -> str:
    num_frames, height, width, fps = size
    return f"{num_frames} frame{'' if num_frames == 1 else 's'} of {width}x{height} at {float(fps):g} fps"
