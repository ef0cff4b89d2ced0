"""Parse and check numbers in rows of a manifest, for one row or many; nan means missing."""

import math
from typing import Any

import numpy as np

LARGEST_NUMBER = 2**31 - 1
LIMITS = {
    "num_frames": (1, LARGEST_NUMBER, True),
    "fps": (1e-3, LARGEST_NUMBER, False),
    "height": (1, LARGEST_NUMBER, True),
    "width": (1, LARGEST_NUMBER, True),
    "start": (0, LARGEST_NUMBER, False),
    "end": (0, LARGEST_NUMBER, False),
    "offset": (0, 2**53, True),
    "size": (1, 2**53, True),
}
"""Columns of numbers: (least value, greatest value, whether it must be an integer)."""

FIELD_ORDER_WORDS = {
    **{"": "", "unknown": "", "progressive": "progressive", "tff": "tff", "bff": "bff"},
    **{"tt": "tff", "bt": "tff", "bb": "bff", "tb": "bff"},
}
"""What the column `field_order` may say, ffprobe's words among them; empty: it is found when frames are decoded."""

FRAME_SLACK = 1e-3
"""Fraction of a frame: a part that ends earlier by at most this still includes its last frame."""


def read_numbers(column: list[str] | None, count: int) -> np.ndarray:
    """Parse a column of numbers, float64 [count]; nan if empty, -inf if not a number."""
    if column is None:
        return np.full(count, math.nan)
    try:
        numbers = np.fromiter(map(float, column), np.float64, count)
    except ValueError:
        return np.array([read_number(text) for text in column])
    return np.array([read_number(text) for text in column]) if np.isnan(numbers).any() else numbers


def read_number(text: str) -> float:
    """Parse one field: nan if empty, -inf if not a number."""
    try:
        number = float(text) if text else math.nan
    except ValueError:
        return -math.inf
    return -math.inf if text and math.isnan(number) else number


def is_allowed(name: str, number: Any) -> Any:
    """Whether a number (or each of an array) is within the LIMITS of its column."""
    least, greatest, whole = LIMITS[name]
    return (number >= least) & (number <= greatest) & ((np.floor(number) == number) | (not whole))


def clip_span(num_frames: Any, fps: Any, start: Any, end: Any) -> tuple[Any, Any, Any]:
    """Return (start, end, number of frames) of the part of a file between `start` and `end`, in seconds.

    `end` is clipped to the end of the file; 0 frames if the part is empty. Takes numbers or arrays.
    """
    seconds = num_frames / fps
    begin, finish = np.where(np.isnan(start), 0.0, start), np.fmin(end, seconds)
    inside = np.where(begin < finish, np.maximum(1, np.floor((finish - begin) * fps + FRAME_SLACK)), 0)
    frames = np.where(np.isnan(start) & np.isnan(end), num_frames, inside)
    return begin, np.where(np.isnan(end), math.nan, finish), frames
