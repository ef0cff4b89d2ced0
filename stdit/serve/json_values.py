"""Values of files that nobody has checked, as JSON that can be sent."""

import math
from collections.abc import Mapping
from typing import Any

MOST_VALUES = 20_000
"""Values in one answer; aliases of YAML can name many more than their file has."""
MOST_LEVELS = 20
_MOST_CHARACTERS = 100_000


def sendable(value: Any) -> Any:
    """Return a value as JSON has it: finite numbers, texts of whole characters, keys that are texts.

    What JSON does not have, such as infinity or a date, becomes its text.

    Raises:
        ValueError: if it is nested more than `MOST_LEVELS` deep, or holds more than `MOST_VALUES` values.
    """
    return _sendable(value, MOST_LEVELS, [MOST_VALUES])


def whole_text(text: str) -> str:
    """Return a text with a question mark for each half of a surrogate pair, which UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode("utf-8")


def finite_number(value: Any) -> float | None:
    """Return a number as a float; None for anything else, also for infinity, NaN and what a float cannot hold."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole_number(value: Any) -> int | None:
    """Return a whole number that 64 bits hold; None for anything else, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        return None
    return value


def _sendable(value: Any, levels: int, left: list[int]) -> Any:
    left[0] -= 1
    if levels < 0 or left[0] < 0:
        raise ValueError(f"it is nested more than {MOST_LEVELS} deep, or has more than {MOST_VALUES} values")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else f"{value:.17e}" if abs(value) < 10**300 else "a huge number"
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {whole_text(str(key)): _sendable(one, levels - 1, left) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(one, levels - 1, left) for one in value]
    return whole_text(str(value)[:_MOST_CHARACTERS])
