"""Videos that do not show their scene: ways of spoiling a clip of world 64."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stdit.data.shapes.checker.objects import blur
from stdit.data.shapes.outlines import REACH
from stdit.data.shapes.render import draw, render
from stdit.data.shapes.scenes import Body, Scene, bodies
from tests.data.shapes.clips import LARGE

FRAMES, SIZE = LARGE.num_frames, LARGE.size
Spoil = Callable[[Scene, np.random.Generator], np.ndarray]


def _video(scene: Scene) -> np.ndarray:
    return render(scene, FRAMES, SIZE)


def still(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return _video(scene)[[int(rng.integers(FRAMES))] * FRAMES]


def shaken(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    frames = []
    for _ in range(FRAMES):
        dx, dy = rng.uniform(-2, 2, 2)
        moved = [replace(body, x=body.x[:1] + dx, y=body.y[:1] + dy) for body in _cut(scene, 1)]
        frames.append(draw(moved, scene.background, SIZE)[0])
    return np.stack(frames)


def jump(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Stay at the start, then at a place of the middle, then at the end."""
    return _video(scene)[np.repeat([0, FRAMES // 3, FRAMES - 1], FRAMES // 3)]


def shuffled(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return _video(scene)[rng.permutation(FRAMES)]


def gone(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One of the objects vanishes for a third of the frames."""
    left = draw(bodies(scene, FRAMES)[1:], scene.background, SIZE)
    video = _video(scene)
    start = int(rng.integers(FRAMES * 2 // 3))
    vanished = slice(start, start + FRAMES // 3)
    video[vanished] = np.broadcast_to(left, video.shape)[vanished]
    return video


def noise(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return (_video(scene) + rng.normal(0, 90, (FRAMES, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)


def blurred(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    video = _video(scene).astype(np.float32)
    for _ in range(24):  # a standard deviation of 3.5 pixels
        video = blur(video)
    return video.astype(np.uint8)


def deformed(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Displace rows and columns along waves of two pixels."""
    video = _video(scene)
    place = np.arange(SIZE)
    for axis in (1, 2):
        shift = np.round(2.5 * np.sin(place * 2 * np.pi / 9 + rng.uniform(0, 6))).astype(int)
        moved = [np.roll(np.take(video, i, axis), s, 1) for i, s in enumerate(shift)]
        video = np.stack(moved, axis)
    return video


def another_object(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One more object, of another colour."""
    colour = str(rng.choice([c for c in LARGE.colours if c not in (scene.colour, scene.other_colour)]))
    return draw([*bodies(scene, FRAMES), _stranger(scene, colour)], scene.background, SIZE)


def twin(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One more object, of the same colour."""
    return draw([*bodies(scene, FRAMES), _stranger(scene, scene.colour)], scene.background, SIZE)


def missing(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    objects = bodies(scene, FRAMES)
    return draw([objects[int(rng.integers(2))]], scene.background, SIZE)


def swapped(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return _video(
        replace(
            scene,
            shape=scene.other_shape,
            colour=scene.other_colour,
            other_shape=scene.shape,
            other_colour=scene.colour,
        )
    )


def apart(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Each object does something, but without any relation to the other: one stays, the other shakes."""
    one, other = bodies(replace(scene, relation="approaches"), FRAMES)
    shaken = replace(one, x=one.x[0] + rng.uniform(-1, 1, FRAMES), y=one.y[0] + rng.uniform(-1, 1, FRAMES))
    return draw([shaken, other], scene.background, SIZE)


EITHER: dict[str, Spoil] = {
    f.__name__: f
    for f in (still, shaken, jump, shuffled, gone, noise, blurred, deformed, another_object, twin)
}
PAIRS: dict[str, Spoil] = {f.__name__: f for f in (missing, swapped, apart)}


def _cut(scene: Scene, frames: int) -> list[Body]:
    return [
        replace(
            body,
            x=body.x[:frames],
            y=body.y[:frames],
            radius=body.radius[:frames],
            angle=None if body.angle is None else body.angle[:frames],
        )
        for body in bodies(scene, FRAMES)
    ]


def _stranger(scene: Scene, colour: str) -> Body:
    """Return a circle in the place that is farthest from all objects."""
    grid = np.stack(np.meshgrid(np.linspace(3, 29, 27), np.linspace(3, 29, 27)), -1).reshape(-1, 1, 2)
    room = np.min(
        [
            (np.hypot(grid[..., 0] - body.x, grid[..., 1] - body.y) - REACH * body.radius).min(1)
            for body in bodies(scene, FRAMES)
        ],
        axis=0,
    )
    x, y = grid[room.argmax(), 0]
    radius = min(3.2, room.max() - 0.5)
    assert radius > 2.2, scene
    same = np.ones(FRAMES)
    return Body("circle", colour, x * same, y * same, radius * same)
