"""What kinds of videos clips come from (HDR, interlaced, damaged), in lines for people."""

from collections import Counter
from collections.abc import Mapping, Sequence

from stdit.data.decoding.colors import SDR
from stdit.data.decoding.interlacing import PROGRESSIVE
from stdit.data.manifest.fields import FIELD_ORDER_WORDS
from stdit.data.manifest.rows import COLOR, FIELD_ORDER


def media_lines(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a line for HDR, interlaced and damaged clips each, if there are any.

    Args:
        columns: those of MEDIA_COLUMNS that the manifest has, a text per clip; "" counts as the usual.
    """
    colors = _unusual(columns.get(COLOR, ()), SDR)
    orders = _unusual(
        [FIELD_ORDER_WORDS.get(order, order) for order in columns.get(FIELD_ORDER, ())], PROGRESSIVE
    )
    damaged = _unusual(columns.get("damage", ()), "")
    lines = []
    if colors:
        lines.append(f"{colors.total()} clips are tone-mapped to SDR of BT.709: {_counts(colors)}")
    if orders:
        lines.append(f"{orders.total()} clips are interlaced, and deinterlaced by bwdif: {_counts(orders)}")
    if damaged:
        lines.append(f"{damaged.total()} clips are damaged: what comes before the damage is used")
    return lines


def _unusual(values: Sequence[str], usual: str) -> Counter[str]:
    counts = Counter(values)
    for value in ("", usual):
        counts.pop(value, None)
    return counts


def _counts(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {value}" for value, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))
    )
