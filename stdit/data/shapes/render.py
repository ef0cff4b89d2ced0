"""Render scenes of the embedded data set to pixels.

Letters: T frames, H height, W width.
"""

from collections.abc import Sequence

import numpy as np

from stdit.data.shapes.outlines import Array, coverage
from stdit.data.shapes.scenes import FRAME, Body, Scene, bodies

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 20, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 20),
    "green": (10, 145, 40),
    "blue": (30, 70, 235),
    "purple": (150, 40, 195),
    "cyan": (0, 205, 215),
    "pink": (255, 75, 185),
}
PLAIN: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}
GRADIENTS: dict[str, tuple[int, int]] = {"dark to light": (40, 215), "light to dark": (215, 40)}
"""Grey levels of the top and the bottom."""
STRIPES: dict[str, int] = {"vertical stripes": 1, "horizontal stripes": 0}
"""The axis of [H W] along which the stripes alternate."""
STRIPE_LEVELS = (125, 185)
STRIPE_WIDTH = 4.0
"""Pixels of a 32x32 frame."""
BACKGROUNDS = (*PLAIN, *GRADIENTS, *STRIPES)
"""All are neutral, so that objects are known by their colour."""


def background_image(name: str, size: int) -> Array:
    """Return a background: float32 [H W 3] with H = W = `size`, or [1 1 3], [H 1 3], [1 W 3] where it is uniform."""
    if name in PLAIN:
        return np.array(PLAIN[name], np.float32)[None, None]
    if name in GRADIENTS:
        top, bottom = GRADIENTS[name]
        levels = np.linspace(top, bottom, size)
    else:
        fine = 8  # parts of a pixel, to draw the borders of stripes at any size
        place = (np.arange(size * fine) + 0.5) * FRAME / (size * fine)
        odd = (place // STRIPE_WIDTH % 2).reshape(size, fine).mean(1)
        levels = STRIPE_LEVELS[0] + (STRIPE_LEVELS[1] - STRIPE_LEVELS[0]) * odd
    grey = levels.astype(np.float32)[:, None].repeat(3, 1)
    return grey[None] if STRIPES.get(name) == 1 else grey[:, None]


def render(scene: Scene, num_frames: int = 16, size: int = 32) -> Array:
    """Render a scene: uint8 [T H W 3] with H = W = `size` pixels."""
    return draw(bodies(scene, num_frames), scene.background, size)


def draw(objects: Sequence[Body], background: str, size: int) -> Array:
    """Render objects that do not overlap: uint8 [T H W 3] with H = W = `size` pixels."""
    scale = size / FRAME
    image = background_image(background, size)
    for body in objects:
        x, y, radius = (a * scale for a in (body.x, body.y, body.radius))
        alpha = coverage(body.shape, x, y, radius, size, size, body.angle)[..., None]
        image = image + alpha * (np.array(COLOURS[body.colour], np.float32) - image)
    return (image + 0.5).astype(np.uint8)
