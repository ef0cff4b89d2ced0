"""Separate the objects of a video from its background: soft masks, places, sizes and colours.

Letters: T frames, H height, W width, n pixels.
"""

from dataclasses import dataclass

import numpy as np

from stdit.data.shapes.checker.background import MAX_BACKGROUND_DISTANCE, Background
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.render import COLOURS
from stdit.data.shapes.scenes import FRAME
from stdit.data.shapes.worlds import World

CLUTTER = 75.0
"""Distance in RGB from all mixtures of object and background above which a pixel belongs to neither."""
NEUTRAL = 25.0
"""Distance in RGB from grey below which a pixel of a patterned background is no object: known colours have 100."""
MIN_AREA = 12.0
"""Square pixels that an object must cover to count as visible (a circle of radius 2)."""
MIN_SATURATION = 0.45
MIN_BRIGHTNESS = 0.5
"""Largest channel, as a fraction of the known colour's: a dark orange is brown."""
MAX_HUE_DISTANCE = 20.0
"""Degrees."""
MIN_AGREEMENT = 0.75
"""Fraction of the pixels that the winner among the colours needs."""
MIN_SEEN = 0.3
"""Fraction of the frames in which a second colour must be visible to count as another object."""
MIN_APART = 0.6
"""Minimum distance of two objects' centres in mean sides (square roots of areas): otherwise they are parts of one."""
MAX_SPREAD = 0.6
"""Maximum root mean square distance of an object's pixels from its centre, in sides: a disc has 0.4, a star 0.43."""


@dataclass(frozen=True)
class Track:
    """An object over time. Lengths are pixels of a frame whose shorter side is 32."""

    alpha: Array
    """Soft mask [T H W]."""
    scale: float
    """Pixels of the mask in one of the frame of 32."""
    area: Array
    x: Array
    y: Array
    """Area and centre, each [T]."""
    spread: Array
    """Root mean square distance of its pixels from the centre [T]."""

    @property
    def size(self) -> Array:
        """Square root of the area [T]."""
        return np.sqrt(self.area)

    @property
    def present(self) -> Array:
        """Whether the object is visible [T]."""
        return self.area > MIN_AREA

    @property
    def scattered(self) -> bool:
        """Whether it is several objects rather than one."""
        seen = self.present
        return bool(np.median(self.spread[seen] / self.size[seen]) > MAX_SPREAD) if seen.any() else False

    def at(self, frames: Array) -> "Track":
        """Return the track of some frames, a mask or indices."""
        parts = (self.area[frames], self.x[frames], self.y[frames], self.spread[frames])
        return Track(self.alpha[frames], self.scale, *parts)


def frame_scale(volume: Array) -> float:
    """Return the pixels of a volume [T H W ...] in one pixel of a frame whose shorter side is 32."""
    return min(volume.shape[1:3]) / FRAME


def length(vectors: Array) -> Array:
    """Return the norm along the last axis."""
    return np.sqrt(np.einsum("...c,...c->...", vectors, vectors))


def blur(volume: Array) -> Array:
    """Blur [T H W ...] by (1, 2, 1) / 4 along both sides of the frame."""
    for axis in (1, 2):
        here = np.moveaxis(volume, axis, 0)
        total = 2 * here
        total[1:] += here[:-1]
        total[0] += here[0]
        total[:-1] += here[1:]
        total[-1] += here[-1]
        volume = np.moveaxis(total / 4, 0, axis)
    return volume


def sharpen(alpha: Array) -> Array:
    """Remove faint noise in the background and inside the object, without moving edges."""
    return np.clip((alpha - 0.2) / 0.6, 0.0, 1.0)


def object_mask(offset: Array, background: Array, where: Array | None = None) -> Array:
    """Return a soft mask [T H W] of an object.

    A pixel between the background and the object's typical colour is an edge, in proportion. Pixels of other colours
    count as object, so that they spoil its shape.

    Args:
        offset: of the blurred pixels from the blurred background, [T H W 3].
        background: the blurred background, which broadcasts to [H W 3].
        where: pixels [T H W] to take the object's colour from; None: those that differ most from the background.
    """
    distance = length(offset)
    if where is None:
        where = distance > MAX_BACKGROUND_DISTANCE
        where &= distance > 0.7 * np.percentile(distance[where], 75)
    typical = np.median((offset + background)[where], axis=0)
    contrast = typical - background
    square = np.maximum((contrast**2).sum(-1), MAX_BACKGROUND_DISTANCE**2)
    along = (offset * contrast).sum(-1) / square
    beside = np.sqrt(np.maximum(distance**2 - along**2 * square, 0.0))
    return np.where(beside > CLUTTER, 1.0, sharpen(along))


def track(alpha: Array) -> Track:
    """Measure area and centre of a soft mask [T H W] in every frame."""
    h, w = alpha.shape[1:]
    scale = frame_scale(alpha)
    area = alpha.sum((1, 2))
    mass = np.maximum(area, 1e-6)
    columns, rows = np.arange(w) + 0.5, np.arange(h) + 0.5
    across, down = alpha.sum(1), alpha.sum(2)  # [T W], [T H]
    x, y = across @ columns / mass, down @ rows / mass
    square = across @ columns**2 / mass - x**2 + down @ rows**2 / mass - y**2
    spread = np.sqrt(np.maximum(square, 0.0))
    return Track(alpha, scale, area / scale**2, x / scale, y / scale, spread / scale)


def vote(pixels: Array, world: World) -> Array:
    """Return the place in the world's colours that each pixel [... 3] is nearest to in hue [...].

    It is -1 for a pixel that is too grey, too dark, or too far from all.
    """
    known = np.array([COLOURS[name] for name in world.colours], np.float32)
    hue, saturation = _hue(pixels)
    gap = np.abs((hue[..., None] - _hue(known)[0] + 180) % 360 - 180)
    nearest = gap.argmin(-1)
    bright = pixels.max(-1) > MIN_BRIGHTNESS * known.max(-1)[nearest]
    valid = bright & (saturation > MIN_SATURATION) & (gap.min(-1) < MAX_HUE_DISTANCE)
    return np.where(valid, nearest, -1)


def colour(pixels: Array, world: World) -> tuple[str | None, str]:
    """Return the colour that most pixels [n 3] vote for, or None and the reason."""
    votes = np.bincount(vote(pixels, world) + 1, minlength=len(world.colours) + 1)[1:]
    winner = int(np.argmax(votes))
    share = votes[winner] / max(1, len(pixels))
    if share < MIN_AGREEMENT:
        return None, f"no clear colour ({world.colours[winner]} {share:.0%})"
    return world.colours[winner], ""


def object_masks(video: Array, background: Background, world: World) -> list[Array]:
    """Return a soft mask [T H W] of every object: one per colour that is seen apart from the others."""
    base = blur(np.broadcast_to(background.image, (1, *video.shape[1:])))
    smooth = blur(video)
    offset = smooth - base
    if not background.plain:  # its own irregularities are grey, too
        offset[length(smooth - smooth.mean(-1, keepdims=True)) < NEUTRAL] = 0.0
    clear = length(offset) > MAX_BACKGROUND_DISTANCE
    if not clear.any():
        return []
    parts = _parts(smooth, clear, world) if world.relations else []
    if len(parts) < 2:
        return [object_mask(offset, base)]
    nearest = _nearest(parts)
    return [np.where(nearest == i, object_mask(offset, base, part), 0.0) for i, part in enumerate(parts)]


def _nearest(parts: list[Array]) -> Array:
    """Return for every pixel [T H W] which part's outline, taken as a circle, is nearest."""
    h, w = parts[0].shape[1:]
    rows, columns = np.arange(h)[None, :, None] + 0.5, np.arange(w)[None, None, :] + 0.5
    distances = []
    for part in parts:
        found = track(part.astype(np.float32))
        x, y, side = (a[:, None, None] * found.scale for a in (found.x, found.y, found.size))
        distance = np.hypot(rows - y, columns - x) - side / np.sqrt(np.pi)
        distances.append(np.where(side > 0, distance, np.inf))
    return np.argmin(distances, axis=0)


def _parts(smooth: Array, clear: Array, world: World) -> list[Array]:
    """Return the pixels [T H W] of every colour that is an object of its own, the largest first."""
    votes = np.full(clear.shape, -1)
    votes[clear] = vote(smooth[clear], world)
    counts = np.bincount(votes[clear] + 1, minlength=len(world.colours) + 1)[1:]
    parts: list[tuple[Array, Track]] = []
    for place in np.argsort(-counts, kind="stable"):
        if counts[place] < MIN_SEEN * MIN_AREA * frame_scale(smooth) ** 2 * len(smooth):
            break
        mask = votes == place
        found = track(mask.astype(np.float32))
        if found.present.mean() < MIN_SEEN:
            continue
        if all(_apart(found, other) for _, other in parts):
            parts.append((mask, found))
    return [mask for mask, _ in parts]


def _apart(one: Track, other: Track) -> bool:
    both = one.present & other.present
    if not both.any():
        return True
    distance = np.hypot(one.x - other.x, one.y - other.y)[both]
    return bool(np.median(2 * distance / (one.size + other.size)[both]) > MIN_APART)


def _hue(rgb: Array) -> tuple[Array, Array]:
    """Return hue (degrees) and saturation of HSV, for colours [... 3]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    high, chroma = rgb.max(-1), np.ptp(rgb, axis=-1)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, chroma / np.maximum(high, 1e-6)
