"""Append scores to captions as Open-Sora does; training and sampling use the same words."""

import math
from collections.abc import Mapping

CAPTION_SCORES = {"aesthetic": "aesthetic score", "motion": "motion score", "camera": "camera motion"}
"""Columns of a manifest, in the order in which they follow the caption, and their names in the caption."""


def score_suffix(values: Mapping[str, float | str | None]) -> str:
    """Return ' aesthetic score: 6.5. motion score: 5. camera motion: pan left.', for scores that have a value.

    Numbers, also given as text, are rounded to one decimal (Open-Sora v1.2, opensora/utils/inference_utils.py,
    append_score_to_prompts).
    """
    texts = {name: _written(values.get(name)) for name in CAPTION_SCORES}
    return "".join(f" {CAPTION_SCORES[name]}: {text}." for name, text in texts.items() if text)


def _written(value: float | str | None) -> str:
    if value is None:
        return ""
    try:
        number = float(value)
    except ValueError:
        return str(value).strip()
    return f"{round(number, 1):g}" if math.isfinite(number) else ""
