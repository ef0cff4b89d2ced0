"""Recognise the shape of an object, and whether it turns, by comparing its mask with rendered shapes.

Letters: T frames, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from stdit.data.shapes.checker.background import border
from stdit.data.shapes.checker.motion import steady_sweep
from stdit.data.shapes.checker.objects import MIN_AGREEMENT, MIN_AREA, Track, blur, sharpen
from stdit.data.shapes.outlines import FORMS, REACH, SYMMETRY, Array, coverage
from stdit.data.shapes.worlds import World

MIN_FIT = 0.9
"""Minimum intersection over union with the rendered shape, by the strict rule."""
MIN_MARGIN = 0.03
"""Minimum lead of the best shape over the second best, in intersection over union."""
BLURS = 3
"""Rendered shapes are blurred one to this many times; the video is blurred once here, and by 4:2:0 colours."""
MIN_WHOLE_FRAMES = 3
"""Frames, with the object clear of the border, that are needed to recognise its shape."""
MIN_TURN = 60.0
"""Degrees."""
MIN_ASYMMETRY = 0.4
"""Minimum size of the moment by which an object's angle is measured, as a fraction of the rendered shape's."""


@dataclass(frozen=True)
class Outline:
    """The shape of an object by the strict and by the lenient rule, and why there is no strict one."""

    strict: str | None = None
    lenient: str | None = None
    turns: bool = False
    reason: str = ""


def find_outline(track: Track, world: World, may_turn: bool = False) -> Outline:
    """Recognise a shape. Only frames in which it is clear of the border count, weighted by its area.

    Args:
        may_turn: look for turned shapes.
    """
    whole = (border(track.alpha).max(1) < 0.5) & (track.area > MIN_AREA)
    if whole.sum() < min(MIN_WHOLE_FRAMES, len(whole)):
        return Outline(reason="the object is cut by the border")
    seen = track.at(whole)
    window = _Window.around(seen)
    angles = {name: _angles(window, name) if may_turn else None for name in world.shapes}
    fits = np.stack(
        [_best(window, FORMS.get(name, (name,)), angles[name]) for name in world.shapes]
    )  # [shapes T]
    weight = seen.area / seen.area.sum()
    mean = fits @ weight
    second, best = np.argsort(mean)[-2:]
    name = world.shapes[best]
    angle = angles[name]
    turns = angle is not None and steady_sweep(angle, 360 / SYMMETRY[name]) >= MIN_TURN
    agreement = weight[fits.argmax(0) == best].sum()
    if mean[best] < MIN_FIT or mean[best] - mean[second] < MIN_MARGIN or agreement < MIN_AGREEMENT:
        details = f"{name} {mean[best]:.2f}, {world.shapes[second]} {mean[second]:.2f}"
        return Outline(None, name, turns, f"no clear shape ({details})")
    return Outline(name, name, turns)


@dataclass(frozen=True)
class _Window:
    """The part of every frame around the object, in which shapes are rendered. Lengths are pixels of the mask."""

    alpha: Array
    """[T n n]; zero outside the frame."""
    inside: Array
    """Whether a pixel lies in the frame [T n n]."""
    beyond: Array
    """Area of the mask outside the window [T], where no rendered shape reaches."""
    x: Array
    y: Array
    area: Array

    @classmethod
    def around(cls, track: Track) -> "_Window":
        h, w = track.alpha.shape[1:]
        area = track.area * track.scale**2
        radius = np.sqrt(area.max() / 2.1)  # no shape of radius 1 has a smaller area
        half = int(np.ceil(1.05 * REACH * radius)) + BLURS + 1
        x, y = track.x * track.scale, track.y * track.scale
        left, top = (np.floor(a).astype(int) - half for a in (x, y))
        columns, rows = (a[:, None] + np.arange(2 * half + 1) for a in (left, top))  # [T n]
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None]
        frame = np.arange(len(area))[:, None, None]
        part = track.alpha[frame, rows.clip(0, h - 1)[:, :, None], columns.clip(0, w - 1)[:, None]] * inside
        beyond = np.maximum(area - part.sum((1, 2)), 0.0)
        return cls(part.astype(np.float32), inside, beyond, x - left, y - top, area)


def _best(window: _Window, forms: Sequence[str], angle: Array | None) -> Array:
    """Return the intersection over union [T] with the form of a shape that fits best on average."""
    return max((_fits(window, form, angle) for form in forms), key=lambda fit: fit.mean())


def _fits(window: _Window, shape: str, angle: Array | None) -> Array:
    """Return the intersection over union [T] of the object with a rendered shape of its size and place.

    The rendered shape may be slightly larger, smaller or blurred: the variant with the best mean is taken.
    """
    n = window.alpha.shape[-1]
    candidates = []
    for scale in (0.95, 1.0, 1.05):
        radius = np.sqrt(window.area / _unit(shape)[0]) * scale
        drawn = coverage(shape, window.x, window.y, radius, n, n, angle)
        for _ in range(BLURS):
            drawn = blur(drawn)
            template = sharpen(drawn) * window.inside
            overlap = np.minimum(template, window.alpha).sum((1, 2))
            union = np.maximum(template, window.alpha).sum((1, 2)) + window.beyond
            candidates.append(overlap / np.maximum(union, 1e-6))
    return max(candidates, key=lambda fit: fit.mean())


def _angles(window: _Window, shape: str) -> Array | None:
    """Return the angle [T] in degrees by which a shape is turned clockwise; None if it does not show.

    It is the argument of a moment that turns as often as the shape looks the same: z^m with m-fold symmetry, where z
    is the place from the centre.
    """
    if shape not in SYMMETRY:
        return None
    moment = _moment(window.alpha, window.x, window.y, SYMMETRY[shape])
    _, upright = _unit(shape)
    asymmetry = np.abs(moment).mean() / abs(upright)
    if asymmetry < MIN_ASYMMETRY:
        return None
    return np.degrees(np.angle(moment / upright)) / SYMMETRY[shape]


def _moment(alpha: Array, x: Array, y: Array, m: int) -> Array:
    """Return the sum over the mask of r^max(m, 3) e^(i m phi), relative to the area: [T], without unit."""
    place = np.arange(alpha.shape[-1]) + 0.5
    z = (place - x[:, None])[:, None] + 1j * (place - y[:, None])[:, :, None]
    r = np.abs(z)
    power = max(m, 3)
    area = alpha.sum((1, 2))
    turned = (z / np.maximum(r, 1e-6)) ** m * r**power
    return (alpha * turned).sum((1, 2)) / area ** (1 + power / 2)


@cache
def _unit(shape: str) -> tuple[float, complex]:
    """Return the area of a shape of radius 1, and its moment when it is upright."""
    centre, radius = np.full(1, 64.0), np.full(1, 40.0)
    drawn = coverage(shape, centre, centre, radius, 128, 128)
    moment = _moment(drawn, centre, centre, SYMMETRY[shape])[0] if shape in SYMMETRY else 0
    return float(drawn.sum() / radius[0] ** 2), complex(moment)
