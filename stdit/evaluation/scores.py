"""Scores of how well videos of the embedded data set's worlds follow their prompts.

Letters: T frames, H height, W width.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from stdit.data.shapes.checker import background_noise, check, compare, patch_borders
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.prompt_files import Expected
from stdit.data.shapes.worlds import World

KEPT_LEVELS = 8
"""Largest mean difference, of 255 levels, of conditioning frames that count as kept."""
MEASURES = {"noise": ".1f", "borders": ".2f", "positions": ".2f", "sizes": ".2f"}
"""Scores that are no shares, and how they are printed. Noise and borders are of videos with a plain background."""


def judge(
    row: Expected, source: str, frames: Array, world: World, patch: tuple[int, int] | None
) -> dict[str, Any]:
    """Return what a video should show, what it shows, and which attributes are right.

    Args:
        patch: height and width of the model's patches in pixels, if known.
    """
    verdict = check(frames, world)
    kept = {"kept": row["conditioning_error"] <= KEPT_LEVELS} if "conditioning_error" in row else {}
    return {
        **row,
        "source": source,
        "seen": asdict(verdict),
        "right": compare(verdict, row) | kept,
        "noise": background_noise(frames),
        "borders": patch_borders(frames, *patch) if patch else None,
    }


def mean_scores(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, per set, the number of videos, how often each key of `checker.compare` is right, and `MEASURES`.

    That is the share of the videos that have the key; noise and borders are means of the videos that have them.
    """
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(result["set"] for result in results):
        own = [result for result in results if result["set"] == name]
        keys = dict.fromkeys(key for result in own for key in result["right"])
        summary[name] = {"n": len(own)}
        for key in keys:
            rights = [result["right"][key] for result in own if key in result["right"]]
            summary[name][key] = sum(rights) / len(rights)
        for key in ("noise", "borders"):
            if values := [result[key] for result in own if result[key] is not None]:
                summary[name][key] = sum(values) / len(values)
        summary[name] |= spreads(own)
    return summary


def spreads(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return how much positions and sizes of single objects differ from video to video, in pixels of a frame of 32.

    That is the standard deviation among videos that should show the same motion, which decides where an object can
    be; of positions, the root of the sum of both variances. Empty if no motion has two videos.
    """
    groups: dict[str, list[Any]] = {}
    for result in results:
        if (place := result["seen"]["place"]) is not None and result.get("motion"):
            groups.setdefault(result["motion"], []).append(place)
    groups = {motion: places for motion, places in groups.items() if len(places) > 1}
    if not groups:
        return {}
    squares = sum(((np.array(places) - np.mean(places, 0)) ** 2).sum(0) for places in groups.values())
    x, y, size = squares / sum(len(places) - 1 for places in groups.values())
    return {"positions": float(np.sqrt(x + y)), "sizes": float(np.sqrt(size))}


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """Print the shares in percent and the measures, one line per set."""
    keys = list(dict.fromkeys(key for row in summary.values() for key in row if key != "n"))
    keys.sort(key=lambda key: key in MEASURES)  # to the right
    widths = {key: max(8, len(key)) for key in keys}
    print(f"{'set':<20} {'n':>4}" + "".join(f" {key:>{width}}" for key, width in widths.items()))
    for name, row in summary.items():
        cells = (f"{row[key]:{MEASURES.get(key, '.1%')}}" if key in row else "" for key in keys)
        line = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        print(f"{name:<20} {row['n']:>4}{line}".rstrip())
