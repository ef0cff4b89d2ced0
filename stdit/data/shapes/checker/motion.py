"""Recognise how an object moves, and what one of two objects does to the other, from where they are in every frame.

Lengths are pixels of a frame whose shorter side is 32. Letters: T frames.
"""

import numpy as np

from stdit.data.shapes.checker.objects import Track
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.scenes import DIAGONAL
from stdit.data.shapes.worlds import World

MIN_FRAMES = 3
MIN_TRAVEL = 3.5
MAX_DRIFT = 0.4
"""Maximum sideways part of a movement, as a fraction of it."""
MIN_DIAGONAL = 0.45
"""Minimum ratio of the two parts of a diagonal movement; from 0.41 on it is nearer to the diagonal than to a side."""
MIN_SCALING = 1.4
"""Minimum ratio of the radii at the ends of a clip that grows or shrinks."""
MIN_STEADINESS = 0.9
"""Minimum correlation of the position (or radius, or angle) with time."""
MAX_STEP = 0.5
"""Maximum change between neighbouring frames, as a fraction of the whole change."""
MIN_STEPS = 6
"""Frames from which on that is asked for."""
MIN_ONWARD = 0.8
"""Minimum share of the steps of an angle that go the same way."""
MIN_CIRCLE = 240.0
"""Degrees of a circle that must be made by an object that circles or orbits."""
MIN_CIRCLE_RADIUS = 2.5
MAX_UNROUND = 0.2
"""Maximum standard deviation of the distance from the middle of a circle, as a fraction of its mean."""
MIN_REBOUND = 0.25
"""Minimum height of the bounces, as a fraction of that of the fall."""
MAX_FLOOR = 0.4
"""Maximum difference in height between contacts with the floor, as a fraction of the fall: frames may miss them."""
MAX_STILL = 1.5
"""Maximum distance of an object that stays from its mean place."""
MIN_ALIGNED = 0.8
"""Minimum cosine of the angle between two directions that count as the same."""
MAX_GAP_CHANGE = 0.4
"""Maximum change of the distance of two objects of which one follows the other, as a fraction of their travel."""


def find_motion(track: Track, world: World) -> tuple[str | None, str]:
    """Return the motion of an object that does not turn, or None and the reason."""
    frames = len(track.x)
    if frames < MIN_FRAMES:
        return None, f"no motion in {frames} frames"
    ends = max(1, frames // 8)
    dx, dy = displacement(track)
    ratio = float(track.size[-ends:].mean() / track.size[:ends].mean())
    travel, drift = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    details = f"moved by ({dx:.1f}, {dy:.1f}) pixels, grew by {ratio:.2f}"
    scaling = max(ratio, 1 / ratio)
    if "circling" in world.motions and scaling < MIN_SCALING and _circles(track):
        return "circling", ""
    if "bounce" in world.motions and scaling < MIN_SCALING and _bounces(track):
        return "bounce", ""
    if "diagonal" in world.motions and scaling < MIN_SCALING and _goes_down_right(track, dx, dy):
        return "diagonal", ""
    if travel >= MIN_TRAVEL:
        along = track.x if abs(dx) > abs(dy) else track.y
        if drift > MAX_DRIFT * travel or steadiness(along) < MIN_STEADINESS or scaling > MIN_SCALING:
            return None, f"no clear motion: {details}"
        if abs(dx) > abs(dy):
            return ("right" if dx > 0 else "left"), ""
        return ("down" if dy > 0 else "up"), ""
    if scaling >= MIN_SCALING and steadiness(track.size) >= MIN_STEADINESS:
        return ("grow" if ratio > 1 else "shrink"), ""
    return None, f"no clear motion: {details}"


def find_relation(one: Track, other: Track) -> tuple[str | None, bool, str]:
    """Return what one object does to the other, whether it is the second that does it, or None and the reason."""
    if len(one.x) >= MIN_FRAMES:
        for name, holds in RELATION_TESTS.items():
            for swapped, (subject, thing) in enumerate(((one, other), (other, one))):
                if holds(subject, thing):
                    return name, bool(swapped), ""
    moved = " and ".join(f"({dx:.1f}, {dy:.1f})" for dx, dy in map(displacement, (one, other)))
    return None, False, f"no clear relation: the objects moved by {moved} pixels"


def displacement(track: Track) -> tuple[float, float]:
    """Return how far an object moved, right and down, from the mean of the first frames to that of the last."""
    ends = max(1, len(track.x) // 8)
    dx, dy = (float(a[-ends:].mean() - a[:ends].mean()) for a in (track.x, track.y))
    return dx, dy


def steadiness(values: Array) -> float:
    """Return the absolute correlation of values [T] with time; 0 if they jump."""
    if len(values) >= MIN_STEPS and np.abs(np.diff(values)).max() > MAX_STEP * np.ptp(values):
        return 0.0
    time = np.arange(len(values)) - (len(values) - 1) / 2
    centred = values - values.mean()
    scale = np.linalg.norm(time) * np.linalg.norm(centred)
    return float(abs(time @ centred) / scale) if scale > 0 else 0.0


def steady_sweep(degrees: Array, period: float = 360.0) -> float:
    """Return the whole angle that is swept steadily in one direction, else 0. Angles [T] repeat after `period`."""
    swept = np.unwrap(degrees, period=period)
    total = swept[-1] - swept[0]
    onward = (np.diff(swept) * np.sign(total) > 0).mean() if len(swept) > 1 else 0.0
    if onward < MIN_ONWARD or steadiness(swept) < MIN_STEADINESS:
        return 0.0
    return float(abs(total))


def stays(track: Track) -> bool:
    """Return whether an object stays where it is."""
    return bool(np.hypot(track.x - track.x.mean(), track.y - track.y.mean()).max() <= MAX_STILL)


def _rounds(x: Array, y: Array) -> bool:
    """Return whether a place, relative to the middle of a circle, goes round it."""
    distance = np.hypot(x, y)
    round_enough = distance.std() <= MAX_UNROUND * distance.mean()
    return bool(round_enough and steady_sweep(np.degrees(np.arctan2(y, x))) >= MIN_CIRCLE)


def _circles(track: Track) -> bool:
    """Return whether an object moves on a circle: the best one by least squares (I. Kasa, 1976)."""
    x, y = track.x - track.x.mean(), track.y - track.y.mean()
    equations = np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1)
    (cx, cy, c), *_ = np.linalg.lstsq(equations, x**2 + y**2, rcond=None)
    radius = np.sqrt(max(0.0, c + cx**2 + cy**2))
    return radius >= MIN_CIRCLE_RADIUS and _rounds(x - cx, y - cy)


def _goes_down_right(track: Track, dx: float, dy: float) -> bool:
    """Return whether an object that moved by (dx, dy) went right and down alike, steadily."""
    steady = min(steadiness(track.x), steadiness(track.y)) >= MIN_STEADINESS
    return steady and min(dx, dy) >= max(MIN_TRAVEL * DIAGONAL[0], MIN_DIAGONAL * max(dx, dy))


def _bounces(track: Track) -> bool:
    """Return whether an object falls, and bounces off a floor at least twice."""
    if np.ptp(track.x) > MAX_DRIFT * np.ptp(track.y) or np.ptp(track.y) < MIN_TRAVEL:
        return False
    least = MIN_REBOUND * np.ptp(track.y)
    turns = _reversals(track.y, least / 2)
    heights = track.y[turns]
    fall = heights[1] - heights[0] if len(heights) > 1 else 0.0
    if not 4 <= len(turns) <= 7 or fall < MIN_TRAVEL:
        return False
    floors, tops = heights[1::2], heights[2::2]
    rises = floors[: len(tops)] - tops
    last = rises[:-1] if len(turns) % 2 else rises  # the last top may be where the clip ends
    on_floor = np.ptp(floors) <= MAX_FLOOR * fall
    lower = tops.min() > heights[0] - MAX_STILL
    return bool(len(floors) >= 2 and on_floor and lower and (last >= MIN_REBOUND * fall).all())


def _reversals(values: Array, least: float) -> Array:
    """Return the frames at which values [T] begin, turn round by more than `least`, and end."""
    turns, extreme, direction = [0], 0, 0.0
    for i in range(1, len(values)):
        step = values[i] - values[extreme]
        if direction == 0 and abs(step) > least:
            direction, extreme = np.sign(step), i
        elif step * direction > 0:
            extreme = i
        elif direction and abs(step) > least:
            turns.append(extreme)
            direction, extreme = -direction, i
    return np.array([*turns, extreme] if extreme != turns[-1] else turns)


def _travels(track: Track) -> Array | None:
    """Return the displacement [2] of an object that moves straight and steadily, else None."""
    moved = np.array(displacement(track))
    distance = np.linalg.norm(moved)
    if distance < MIN_TRAVEL:
        return None
    ahead = moved / distance
    along = track.x * ahead[0] + track.y * ahead[1]
    beside = track.y * ahead[0] - track.x * ahead[1]
    return moved if steadiness(along) >= MIN_STEADINESS and np.ptp(beside) <= MAX_DRIFT * distance else None


def _orbits(subject: Track, thing: Track) -> bool:
    return stays(thing) and _rounds(subject.x - thing.x, subject.y - thing.y)


def _gap_change(subject: Track, thing: Track) -> float:
    """Return by how much two objects get farther apart, if steadily and because the first moves straight, else 0."""
    moved = _travels(subject)
    if moved is None or not stays(thing):
        return 0.0
    distance = np.hypot(subject.x - thing.x, subject.y - thing.y)
    ends = max(1, len(distance) // 8)
    change = float(distance[-ends:].mean() - distance[:ends].mean())
    return change if steadiness(distance) >= MIN_STEADINESS and abs(change) >= MIN_TRAVEL else 0.0


def _approaches(subject: Track, thing: Track) -> bool:
    return _gap_change(subject, thing) < 0


def _leaves(subject: Track, thing: Track) -> bool:
    return _gap_change(subject, thing) > 0


def _follows(subject: Track, thing: Track) -> bool:
    moved, ahead = _travels(subject), _travels(thing)
    if moved is None or ahead is None:
        return False
    gap = np.stack([thing.x - subject.x, thing.y - subject.y])  # [2 T]
    distance = np.linalg.norm(gap, axis=0)
    way = (moved + ahead) / np.linalg.norm(moved + ahead)
    same = moved @ ahead >= MIN_ALIGNED * np.linalg.norm(moved) * np.linalg.norm(ahead)
    behind = (way @ gap / np.maximum(distance, 1e-6)).mean() >= MIN_ALIGNED
    return bool(same and behind and np.ptp(distance) <= MAX_GAP_CHANGE * np.linalg.norm(moved))


RELATION_TESTS = {"orbits": _orbits, "approaches": _approaches, "leaves": _leaves, "follows": _follows}
