"""Scenes of the embedded data set: what one clip shows, and where each object is in every frame.

A scene is one coloured shape that moves, or two of which one moves in relation to the other. Lengths are pixels of a
32x32 frame, whatever the size of the video: a larger video shows the same scene at a higher resolution.

Letters: T frames.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stdit.data.shapes.outlines import REACH, Array

Combo = tuple[str, ...]
"""(shape, colour, motion), or (shape, colour, relation, other shape, other colour)."""

FRAME = 32.0
"""Side of the frame in which a scene's lengths are written."""

DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
DIAGONAL = (0.8, 0.8)
"""Of the scene's travel, right and down."""
SCALES: dict[str, tuple[float, float]] = {"grow": (0.6, 1.3), "shrink": (1.3, 0.6)}
"""Radius of the first and last frame, as a multiple of the scene's radius."""
TURN = 180.0
"""Degrees that a turning object turns in a clip, clockwise."""
ROUND = 345.0
"""Degrees of a circle that is made in a clip, clockwise: the last frame comes just before the first."""
CIRCLE_RADIUS = 0.65
"""Radius of the path of an object that circles, as a multiple of the scene's travel."""
DROP = 1.25
"""Height from which an object falls, as a multiple of the scene's travel."""
REBOUND = 0.8
"""Time of a bounce, as a multiple of that of the one before; its height, the square of it."""
FALLS = 3.6
"""Length of a clip in durations of the fall: it ends after the second bounce, near the top."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows. `x`, `y` (start of the centre), `travel`, `radius`: pixels of a 32x32 frame."""

    shape: str
    colour: str
    motion: str
    """Empty if there are two objects."""
    background: str
    x: float = FRAME / 2
    y: float = FRAME / 2
    travel: float = 8.0
    radius: float = 6.0
    """Of each object."""
    angle: float = 0.0
    """Degrees clockwise from the right: of the start on a circle, or the direction in which an object with a
    relation moves."""
    relation: str = ""
    """What the object does to the other one; empty if there is one object."""
    other_shape: str = ""
    other_colour: str = ""

    @property
    def combo(self) -> Combo:
        if self.relation:
            return (self.shape, self.colour, self.relation, self.other_shape, self.other_colour)
        return (self.shape, self.colour, self.motion)

    @property
    def attributes(self) -> dict[str, str]:
        names = ("shape", "colour", "motion", "background", "relation", "other_shape", "other_colour")
        return {name: getattr(self, name) for name in names}

    @property
    def gap(self) -> float:
        """Distance of the centres of two objects that are close, but never touch."""
        return 2 * REACH * self.radius + 0.4


@dataclass(frozen=True)
class Body:
    """One object in every frame: centre and radius in pixels of a 32x32 frame, angle in degrees, each [T]."""

    shape: str
    colour: str
    x: Array
    y: Array
    radius: Array
    angle: Array | None = None
    """Degrees clockwise; None: upright."""


Path = tuple[Array, Array]
"""Offset of a centre from the scene's (x, y): right and down, each [T]."""


def _still(scene: Scene, progress: Array) -> Path:
    return 0.0 * progress, 0.0 * progress


def _straight(dx: float, dy: float) -> Callable[[Scene, Array], Path]:
    return lambda scene, progress: (dx * scene.travel * progress, dy * scene.travel * progress)


def _bounce(scene: Scene, progress: Array) -> Path:
    """Fall by the height h, and bounce: parabolas between contacts with the floor."""
    time = FALLS * progress
    height, contact, half = 1 - time**2, 1.0, REBOUND
    while contact < FALLS:
        arc = half**2 - (time - contact - half) ** 2
        height = np.where(time >= contact, arc, height)
        contact, half = contact + 2 * half, half * REBOUND
    return 0.0 * progress, DROP * scene.travel * (1 - height)


def _round(radius: float, scene: Scene, progress: Array) -> Path:
    """Move on a circle that begins at the scene's angle."""
    start = np.radians(scene.angle)
    angle = start + np.radians(ROUND) * progress
    return radius * (np.cos(angle) - np.cos(start)), radius * (np.sin(angle) - np.sin(start))


PATHS: dict[str, Callable[[Scene, Array], Path]] = {
    **{name: _straight(*way) for name, way in DIRECTIONS.items()},
    "diagonal": _straight(*DIAGONAL),
    "bounce": _bounce,
    "circling": lambda scene, progress: _round(CIRCLE_RADIUS * scene.travel, scene, progress),
}
"""Paths of the motions that leave the place."""
MOTIONS = (*DIRECTIONS, *SCALES, "turn", "bounce", "circling")


def _orbits(scene: Scene, progress: Array, ahead: Callable[[float], Path]) -> tuple[Path, Path]:
    return _round(scene.gap, scene, progress), ahead(-scene.gap)


def _approaches(scene: Scene, progress: Array, ahead: Callable[[float], Path]) -> tuple[Path, Path]:
    return _advance(scene, progress), ahead(scene.travel + scene.gap)


def _leaves(scene: Scene, progress: Array, ahead: Callable[[float], Path]) -> tuple[Path, Path]:
    return _advance(scene, progress), ahead(-scene.gap)


def _follows(scene: Scene, progress: Array, ahead: Callable[[float], Path]) -> tuple[Path, Path]:
    (x, y), (gap_x, gap_y) = _advance(scene, progress), ahead(scene.gap)
    return (x, y), (x + gap_x, y + gap_y)


def _advance(scene: Scene, progress: Array) -> Path:
    """Move by the scene's travel in the direction of its angle."""
    angle = np.radians(scene.angle)
    return _straight(np.cos(angle), np.sin(angle))(scene, progress)


RELATIONS = {"orbits": _orbits, "approaches": _approaches, "leaves": _leaves, "follows": _follows}
"""Paths of the object and of the other one. `ahead(d)`: the place d pixels ahead of the start."""


def bodies(scene: Scene, num_frames: int) -> list[Body]:
    """Return the objects of a scene in every frame, the moving one first."""
    progress = np.linspace(0.0, 1.0, num_frames)
    if scene.relation:
        angle = np.radians(scene.angle)

        def ahead(d: float) -> Path:
            return d * np.cos(angle) + 0.0 * progress, d * np.sin(angle) + 0.0 * progress

        names = ((scene.shape, scene.colour), (scene.other_shape, scene.other_colour))
        paths = RELATIONS[scene.relation](scene, progress, ahead)
        return [
            Body(*name, scene.x + dx, scene.y + dy, scene.radius + 0.0 * progress)
            for name, (dx, dy) in zip(names, paths, strict=True)
        ]
    dx, dy = PATHS.get(scene.motion, _still)(scene, progress)
    first, last = SCALES.get(scene.motion, (1.0, 1.0))
    radius = scene.radius * (first + (last - first) * progress)
    turned = TURN * progress if scene.motion == "turn" else None
    return [Body(scene.shape, scene.colour, scene.x + dx, scene.y + dy, radius, turned)]
