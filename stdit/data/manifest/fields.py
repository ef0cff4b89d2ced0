"""The numbers in the rows of a manifest, for one row or for many at once; nan stands for one that is not given."""

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
"""Least and greatest value of the numbers of a row, and whether they are whole."""

FRAME_SLACK = 1e-3
"""Of a frame: a part that ends this much too early for its last frame still has it."""


def read_numbers(column: list[str] | None, count: int) -> np.ndarray:
    """The numbers of a column, float64 [count]; -inf for what is none."""
    if column is None:
        return np.full(count, math.nan)
    try:
        numbers = np.fromiter(map(float, column), np.float64, count)
    except ValueError:
        return np.array([read_number(text) for text in column])
    return np.array([read_number(text) for text in column]) if np.isnan(numbers).any() else numbers


def read_number(text: str) -> float:
    """As `read_numbers`, of one field."""
    try:
        number = float(text) if text else math.nan
    except ValueError:
        return -math.inf
    return -math.inf if text and math.isnan(number) else number


def is_allowed(name: str, number: Any) -> Any:
    """Whether LIMITS let a column have a number."""
    least, greatest, whole = LIMITS[name]
    return (number >= least) & (number <= greatest) & ((np.floor(number) == number) | (not whole))


def clip_span(num_frames: Any, fps: Any, start: Any, end: Any) -> tuple[Any, Any, Any]:
    """Where the part of a file between `start` and `end` begins and ends, in seconds, and its number of frames.

    An `end` after that of the file is that of the file. No frames: the part is empty.
    """
    seconds = num_frames / fps
    begin, finish = np.where(np.isnan(start), 0.0, start), np.fmin(end, seconds)
    inside = np.where(begin < finish, np.maximum(1, np.floor((finish - begin) * fps + FRAME_SLACK)), 0)
    frames = np.where(np.isnan(start) & np.isnan(end), num_frames, inside)
    return begin, np.where(np.isnan(end), math.nan, finish), frames
