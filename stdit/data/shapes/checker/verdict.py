"""The verdict on a video, and its comparison with what a prompt expects.

The shape is scored in two ways, and a whole video likewise (`compare`):

    strict    the object matches the expected shape well: its outline fits (intersection over union >= MIN_FIT) and
              clearly better than any other shape's
    lenient   the object is closer to the expected shape than to any other, however soft or lopsided its outline

Letters: T frames, H height, W width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from stdit.data.shapes.checker.background import MAX_BACKGROUND_DISTANCE, find_background
from stdit.data.shapes.checker.motion import find_motion, find_relation, stays
from stdit.data.shapes.checker.objects import (
    MIN_AREA,
    Track,
    colour,
    frame_scale,
    length,
    object_masks,
    track,
)
from stdit.data.shapes.checker.outline import find_outline
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.worlds import WORLDS, World

ATTRIBUTES = ("shape", "colour", "motion", "background", "relation", "other_shape", "other_colour")
MIN_PRESENT = 0.9
"""Fraction of the frames in which an object must be visible."""


@dataclass(frozen=True)
class Verdict:
    """What a video shows; an attribute that is not recognised is None, and `reason` says why.

    With two objects, the relation says which is the first; the motion is None.
    """

    shape: str | None = None
    """The shape by the strict rule."""
    shape_lenient: str | None = None
    """The shape by the lenient rule."""
    colour: str | None = None
    motion: str | None = None
    background: str | None = None
    objects: int = 0
    relation: str | None = None
    other_shape: str | None = None
    other_shape_lenient: str | None = None
    other_colour: str | None = None
    reason: str = ""
    place: tuple[float, float, float] | None = field(default=None, compare=False)
    """Of one object, the mean centre (x, y) and side (square root of the area), in pixels of a frame of 32."""

    @property
    def swapped(self) -> "Verdict":
        """The same with the objects in the other order."""
        return replace(
            self,
            shape=self.other_shape,
            shape_lenient=self.other_shape_lenient,
            colour=self.other_colour,
            other_shape=self.shape,
            other_shape_lenient=self.shape_lenient,
            other_colour=self.colour,
        )


def check(frames: Array, world: World = WORLDS["32"]) -> Verdict:
    """Recognise the attributes of a video.

    Args:
        frames: uint8 [T H W 3], RGB, of any size from 32x32 pixels.
        world: what may be seen.

    Raises:
        ValueError: for another type or number of axes.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, but must be uint8 [T H W 3]")
    video = frames.astype(np.float32)
    background = find_background(video, world)
    if background is None:
        return Verdict(reason="no background of the same colour along the border")
    name = background.name
    distance = length(video - background.image)  # [T H W]
    if (distance > MAX_BACKGROUND_DISTANCE).sum((1, 2)).max() < MIN_AREA * frame_scale(video) ** 2:
        return Verdict(background=name, reason="nothing stands out from the background")
    masks = object_masks(video, background, world)
    if not masks:
        return Verdict(background=name, reason="only specks stand out from the background")
    if len(masks) > 2:
        return Verdict(background=name, objects=len(masks), reason=f"{len(masks)} objects")
    colours = [colour(video[mask > 0.9], world) for mask in masks]
    tracks = [track(mask) for mask in masks]
    unknown = (
        "" if name else f"background {background.image.mean((0, 1)).round()} is not one of the known ones"
    )
    seen = Verdict(background=name, objects=len(masks), colour=colours[0][0])
    if len(masks) == 2:
        seen = replace(seen, other_colour=colours[1][0])
    for found in tracks:
        if found.present.mean() < MIN_PRESENT:
            where = f"in only {found.present.sum()} of {len(found.present)} frames"
            return replace(seen, reason=f"an object is visible {where}")
        if found.scattered:
            return replace(seen, reason="several objects of one colour")
    verdict, reasons = _one(seen, tracks[0], world) if len(tracks) == 1 else _two(seen, tracks, world)
    reasons = [unknown, *(reason for _, reason in colours), *reasons]
    return replace(verdict, reason="; ".join(filter(None, reasons)))


def _one(seen: Verdict, found: Track, world: World) -> tuple[Verdict, list[str]]:
    """Add shape and motion of one object; returns the reasons for what is not recognised, too."""
    motion, reason = find_motion(found.at(found.present), world)
    outline = find_outline(found, world, may_turn=motion is None and "turn" in world.motions and stays(found))
    if outline.turns:
        motion, reason = "turn", ""
    there = found.at(found.present)
    place = (float(there.x.mean()), float(there.y.mean()), float(there.size.mean()))
    verdict = replace(seen, shape=outline.strict, shape_lenient=outline.lenient, motion=motion, place=place)
    return verdict, [outline.reason, reason]


def _two(seen: Verdict, tracks: list[Track], world: World) -> tuple[Verdict, list[str]]:
    """Add the shapes of two objects, and their relation, which decides their order; returns reasons like `_one`."""
    both = tracks[0].present & tracks[1].present
    relation, swapped, reason = find_relation(tracks[0].at(both), tracks[1].at(both))
    one, other = (find_outline(found, world) for found in tracks)
    verdict = replace(
        seen,
        relation=relation,
        shape=one.strict,
        shape_lenient=one.lenient,
        other_shape=other.strict,
        other_shape_lenient=other.lenient,
    )
    return verdict.swapped if swapped else verdict, [one.reason, other.reason, reason]


def score(frames: Array, expected: Mapping[str, str], world: World = WORLDS["32"]) -> dict[str, bool]:
    """Compare a video (uint8 [T H W 3]) with expected attributes; see `compare`."""
    return compare(check(frames, world), expected)


def compare(verdict: Verdict, expected: Mapping[str, str]) -> dict[str, bool]:
    """Compare the verdict on a video with expected attributes.

    Two objects without a clear relation are taken in the order that fits better.

    Args:
        expected: values by attribute; those that are absent or empty are not compared.

    Returns:
        One boolean per expected attribute (shapes by the strict rule), "shape_lenient", "other_shape_lenient" if
        another object is expected, and "strict" and "lenient": whether all attributes are right, the shapes by the
        strict or by the lenient rule, and there are as many objects as expected.
    """
    orders = [_compare(verdict, expected)]
    if verdict.objects == 2 and verdict.relation is None:
        orders.append(_compare(verdict.swapped, expected))
    return max(orders, key=lambda right: sum(right.values()))


def _compare(verdict: Verdict, expected: Mapping[str, str]) -> dict[str, bool]:
    right = {name: getattr(verdict, name) == expected[name] for name in ATTRIBUTES if expected.get(name)}
    shapes = [name for name in right if name.endswith("shape")]
    lenient = {f"{name}_lenient": getattr(verdict, f"{name}_lenient") == expected[name] for name in shapes}
    others = all(right[name] for name in right if name not in shapes)
    others &= verdict.objects == (2 if expected.get("relation") else 1)
    return {
        **right,
        **lenient,
        "strict": others and all(right[name] for name in shapes),
        "lenient": others and all(lenient.values()),
    }
