"""Outlines of the shapes of the embedded data set, and how they are drawn.

Letters: T frames, H height, W width. `u`, `v`: places right of and below the centre, in radii.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray

REACH = 1.35
"""No shape reaches farther than this many radii from its centre."""


def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 1.0


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.9


def _triangle(u: Array, v: Array) -> Array:
    """Equilateral, point up, its centroid at the origin."""
    inradius = 0.65
    slanted = np.abs(u) * (np.sqrt(3) / 2) - v * 0.5
    return np.maximum(slanted, v) - inradius


def _cross(u: Array, v: Array) -> Array:
    """A plus sign whose arms are a third of its width."""
    reach, half_arm = 1.1, 0.37
    u, v = np.abs(u), np.abs(v)
    across = np.maximum(u - reach, v - half_arm)
    upright = np.maximum(u - half_arm, v - reach)
    return np.minimum(across, upright)


def _star(u: Array, v: Array) -> Array:
    """Five points, one of them up: each tenth is folded onto the one with the edge from (outer, 0) to the notch."""
    outer, inner, tenth = REACH, 0.64, np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
    r = np.hypot(u, v)
    along, beside = r * np.cos(angle), r * np.sin(angle)
    edge_along, edge_beside = inner * np.cos(tenth) - outer, inner * np.sin(tenth)
    return ((along - outer) * edge_beside - beside * edge_along) / np.hypot(edge_along, edge_beside)


def _heart(u: Array, v: Array) -> Array:
    """A square on its corner, with a half disc on each of its upper sides; its centroid at the origin."""
    scale, centroid = 1.75, 0.656
    x, y = np.abs(u) / scale, centroid - v / scale  # the tip at (0, 0), y upwards
    disc = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    m = 0.5 * np.maximum(x + y, 0.0)
    square = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, disc, square) * scale


def _ring(hole: float) -> Callable[[Array, Array], Array]:
    """Return the outline of a circle with a hole of a radius."""

    def distance(u: Array, v: Array) -> Array:
        r = np.hypot(u, v)
        return np.maximum(r - 1.05, hole - r)

    return distance


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "ring": _ring(0.55),
}
"""Signed distance to the outline of a shape of radius 1, negative inside. The shapes have similar areas."""

FORMS = {"ring": ("ring", "thick ring", "thin ring")}
"""Names of the outlines by which a shape is known, if it has several; those of clips are in `SHAPES`."""
_FORMS = {"thick ring": _ring(0.3), "thin ring": _ring(0.65)}

SYMMETRY: dict[str, int] = {"square": 4, "triangle": 3, "cross": 4, "star": 5, "heart": 1}
"""How many times a shape looks the same in a whole turn; a circle or a ring does not visibly turn."""


def coverage(
    shape: str, x: Array, y: Array, radius: Array, height: int, width: int, angle: Array | None = None
) -> Array:
    """Return the share of every pixel that a shape covers, anti-aliased over one pixel: float32 [T H W] in [0, 1].

    Args:
        shape: a name of `SHAPES`, or of one of the `FORMS`.
        x, y, radius: centre and radius [T], in pixels of the frame that is drawn.
        angle: degrees [T] by which it is turned clockwise; None: upright.
    """
    x, y, radius = (np.asarray(a, np.float32)[:, None, None] for a in (x, y, radius))
    rows = np.arange(height, dtype=np.float32)[None, :, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None, None, :] + 0.5
    u, v = (columns - x) / radius, (rows - y) / radius
    if angle is not None:
        turned = np.radians(np.asarray(angle, np.float32))[:, None, None]
        u, v = u * np.cos(turned) + v * np.sin(turned), v * np.cos(turned) - u * np.sin(turned)
    distance = (_FORMS.get(shape) or SHAPES[shape])(u, v) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)
