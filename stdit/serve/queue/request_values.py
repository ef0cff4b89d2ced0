"""Checks of the values of a request that hold for any model."""

from collections.abc import Mapping
from typing import Any

from stdit.serve.errors import RequestError
from stdit.serve.json_values import finite_number

MAX_PROMPT = 4000
"""Characters of a prompt."""
MAX_SEGMENTS = 64
MOST_NUMBER = 3e38
"""About the largest number of float32, in which videos are made."""


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise RequestError for a number that no float32 holds, such as NaN or 1 followed by 400 zeros."""
    pending = [(name, name, value) for name, value in values.items()]
    while pending:
        param, place, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(param, f"{place}.{name:.40}", one) for name, one in value.items()]
        elif isinstance(value, list):
            in_list = [(f"{place}[{index}]", one) for index, one in enumerate(value)]
            pending += [
                (name if place in ("conditions", "loras") else param, name, one) for name, one in in_list
            ]
        elif isinstance(value, int | float):
            number = finite_number(value)
            if number is None or abs(number) > MOST_NUMBER:
                raise RequestError(
                    f"{place}: must be a finite number, at most {MOST_NUMBER:g}: use a smaller one.",
                    param=param,
                )


def check_texts(values: Mapping[str, Any]) -> None:
    """Raise RequestError for prompts or the name of a model that are no texts, too long, or empty."""
    if not isinstance(model := values.get("model", ""), str):
        raise RequestError(f"model = {model!r:.80}: must be a text.", param="model")
    for name in ("prompt", "negative_prompt"):
        text = values.get(name, "" if name == "negative_prompt" else None)
        if not isinstance(text, str) or (name == "prompt" and not text.strip()):
            rule = "must be a text, and not empty: write what the video shows"
            raise RequestError(f"{name}: {rule if name == 'prompt' else 'must be a text'}.", param=name)
        if len(text) > MAX_PROMPT:
            raise RequestError(
                f"{name}: has {len(text):,} characters: at most {MAX_PROMPT:,} are read: shorten it.",
                param=name,
            )
        if not _is_whole_text(text):
            raise RequestError(f"{name}: has characters that are no text: remove them.", param=name)
    texts = values.get("segment_prompts", [])
    if not isinstance(texts, list):
        raise RequestError(
            f"segment_prompts = {texts!r:.80}: must be a list of texts, one for each further segment.",
            param="segment_prompts",
        )
    if len(texts) >= MAX_SEGMENTS:
        raise RequestError(
            f"segment_prompts: has {len(texts)} texts: must be at most {MAX_SEGMENTS - 1}, beside the prompt: "
            "use fewer.",
            param="segment_prompts",
        )
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_PROMPT or not _is_whole_text(text):
            raise RequestError(
                f"segment_prompts: each must be a text of at most {MAX_PROMPT:,} characters, all of them valid.",
                param="segment_prompts",
            )


def _is_whole_text(text: str) -> bool:
    """Return whether a text has neither NUL nor halves of surrogate pairs, which are no characters."""
    return "\0" not in text and not any(0xD800 <= ord(letter) < 0xE000 for letter in text)
