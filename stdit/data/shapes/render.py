"""Scenes of the embedded data set: sampling, rendering, and the split into training and held-out combinations.

A scene is one coloured shape on a plain background that moves straight, grows or shrinks. Lengths are pixels of a
32x32 frame, whatever the size of the video: a larger video shows the same scene at a higher resolution.

Letters: T frames, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Combo = tuple[str, str, str]
"""(shape, colour, motion)."""

FRAME = 32.0
"""Side of the frame in which a scene's lengths are written."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 20),
    "green": (10, 145, 40),
    "blue": (30, 70, 235),
    "purple": (150, 40, 195),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
SCALES: dict[str, tuple[float, float]] = {"grow": (0.6, 1.3), "shrink": (1.3, 0.6)}
"""Radius of the first and last frame, as a multiple of the scene's radius."""

MOTIONS: tuple[str, ...] = (*DIRECTIONS, *SCALES)

START_RANGE = 5.0
"""The start lies within this many pixels of the centre, on either axis."""
TRAVEL = 8.0
RADIUS = 6.0
SPREAD = 0.13
"""Travel and radius vary by this fraction around their mean."""


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


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
"""Signed distance to the outline of a shape of radius 1, negative inside. The shapes have similar areas."""


@dataclass(frozen=True)
class Scene:
    """What one clip shows. `x`, `y` (start of the centre), `travel`, `radius`: pixels of a 32x32 frame."""

    shape: str
    colour: str
    motion: str
    background: str
    x: float = FRAME / 2
    y: float = FRAME / 2
    travel: float = TRAVEL
    radius: float = RADIUS

    @property
    def combo(self) -> Combo:
        return (self.shape, self.colour, self.motion)

    @property
    def attributes(self) -> dict[str, str]:
        return {
            "shape": self.shape,
            "colour": self.colour,
            "motion": self.motion,
            "background": self.background,
        }


def coverage(shape: str, x: Array, y: Array, radius: Array, height: int, width: int) -> Array:
    """Return the share of every pixel that a shape covers, anti-aliased over one pixel: float32 [T H W] in [0, 1].

    `x`, `y` (centre) and `radius`: [T], in pixels of the frame that is drawn.
    """
    x, y, radius = (np.asarray(a, np.float32)[:, None, None] for a in (x, y, radius))
    rows = np.arange(height, dtype=np.float32)[None, :, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None, None, :] + 0.5
    distance = SHAPES[shape]((columns - x) / radius, (rows - y) / radius) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def trajectory(scene: Scene, num_frames: int) -> tuple[Array, Array, Array]:
    """Return centre x, centre y and radius of every frame: three arrays [T], in pixels of a 32x32 frame."""
    progress = np.linspace(0.0, 1.0, num_frames)
    dx, dy = DIRECTIONS.get(scene.motion, (0.0, 0.0))
    first, last = SCALES.get(scene.motion, (1.0, 1.0))
    return (
        scene.x + dx * scene.travel * progress,
        scene.y + dy * scene.travel * progress,
        scene.radius * (first + (last - first) * progress),
    )


def render(scene: Scene, num_frames: int = 16, size: int = 32) -> Array:
    """Render a scene: uint8 [T H W 3] with H = W = `size` pixels."""
    x, y, radius = (a * (size / FRAME) for a in trajectory(scene, num_frames))
    alpha = coverage(scene.shape, x, y, radius, size, size)[..., None]
    colour = np.array(COLOURS[scene.colour], np.float32)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    return (background + alpha * (colour - background) + 0.5).astype(np.uint8)


def sample_scene(rng: np.random.Generator, combos: Sequence[Combo]) -> Scene:
    """Sample a scene: one of `combos`, any background, and place, travel and radius in their full ranges."""
    shape, colour, motion = combos[int(rng.integers(len(combos)))]
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    x, y = FRAME / 2 + START_RANGE * rng.uniform(-1, 1, 2)
    travel, radius = np.array([TRAVEL, RADIUS]) * (1 + SPREAD * rng.uniform(-1, 1, 2))
    return Scene(shape, colour, motion, background, float(x), float(y), float(travel), float(radius))


def split_combinations(seed: int = 0) -> tuple[list[Combo], list[Combo]]:
    """Split all shape x colour x motion combinations into (training, held out), by seed.

    A Latin design: of every pair of colour and motion exactly one of the four shapes is held out, which is a quarter
    of all, and every pair of values of two attributes still occurs in training.
    """
    rng = np.random.default_rng([seed, 1])
    shapes, colours, motions = (list(rng.permutation(list(names))) for names in (SHAPES, COLOURS, MOTIONS))
    held = {
        (str(shapes[(i + j) % len(shapes)]), str(colour), str(motion))
        for i, colour in enumerate(colours)
        for j, motion in enumerate(motions)
    }
    combos = [(shape, colour, motion) for shape in SHAPES for colour in COLOURS for motion in MOTIONS]
    return [c for c in combos if c not in held], [c for c in combos if c in held]
