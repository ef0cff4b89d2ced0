"""Recognises shape, colour, motion and background from the pixels of a video, to score generated clips.

It knows the vocabulary of the data set and nothing of the prompt. It should accept what a person would accept (slight
blur, faint noise, compression artefacts) and reject the rest: an attribute that cannot be recognised is None. Lengths
are pixels of a frame whose shorter side is 32; larger frames are averaged down to about that.

The shape is scored in two ways, and a whole video likewise (`compare`):

    strict    the object matches the expected shape well: its outline fits (intersection over union >= MIN_FIT) and
              clearly better than any other shape's
    lenient   the object is closer to the expected shape than to any other, however soft or lopsided its outline

Letters: T frames, H height, W width, n pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stdit.data.shapes.render import BACKGROUNDS, COLOURS, FRAME, SHAPES, Array, coverage

ATTRIBUTES = ("shape", "colour", "motion", "background")

MAX_BACKGROUND_DISTANCE = 45.0
"""Distance in RGB (0 to 255) below which a pixel belongs to the background."""
CLUTTER = 75.0
"""Distance in RGB from all mixtures of object and background above which a pixel belongs to neither."""
MIN_BORDER = 0.7
"""Fraction of the border that must have the background's colour."""
MIN_AREA = 12.0
"""Square pixels that an object must cover to count as visible (a circle of radius 2)."""
MIN_PRESENT = 0.9
"""Fraction of the frames in which the object must be visible."""
MIN_SATURATION = 0.45
MIN_BRIGHTNESS = 0.5
"""Largest channel, as a fraction of the known colour's: a dark orange is brown."""
MAX_HUE_DISTANCE = 20.0
"""Degrees."""
MIN_AGREEMENT = 0.75
"""Fraction of votes (pixels for the colour, frames for the shape) that the winner needs."""
MIN_TRAVEL = 3.5
MAX_DRIFT = 0.4
"""Maximum sideways part of a movement, as a fraction of it."""
MIN_SCALING = 1.4
"""Minimum ratio of the radii at the ends of a clip that grows or shrinks."""
MIN_STEADINESS = 0.9
"""Minimum correlation of the position (or radius) with time."""
MIN_FIT = 0.9
MIN_MARGIN = 0.03
"""Minimum lead of the best shape over the second best, in intersection over union."""
BLURS = 3
"""Rendered shapes are blurred one to this many times; the video is blurred once by `check`, and by 4:2:0 colours."""
MIN_WHOLE_FRAMES = 3
"""Frames, with the object clear of the border, that are needed to recognise its shape."""


@dataclass(frozen=True)
class Verdict:
    """What a video shows; an attribute that is not recognised is None, and `reason` says why."""

    shape: str | None = None
    """The shape by the strict rule."""
    shape_lenient: str | None = None
    """The shape by the lenient rule."""
    colour: str | None = None
    motion: str | None = None
    background: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Track:
    """The object over time: its soft mask alpha [T H W], its area and centre, each [T]."""

    alpha: Array
    area: Array
    x: Array
    y: Array

    @property
    def size(self) -> Array:
        """Square root of the area [T]."""
        return np.sqrt(self.area)


def check(frames: Array) -> Verdict:
    """Recognise the attributes of a video.

    Args:
        frames: uint8 [T H W 3], RGB.

    Raises:
        ValueError: for another type or number of axes.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, but must be uint8 [T H W 3]")
    video = _shrink(frames)
    plain, background = _background(video)
    if plain is None:
        return Verdict(reason="no plain background")
    distance = np.linalg.norm(video - plain, axis=-1)  # [T H W]
    if (distance > MAX_BACKGROUND_DISTANCE).sum((1, 2)).max() < MIN_AREA:
        return Verdict(background=background, reason="nothing stands out from the background")

    offset = _blur(video - plain)
    if not (np.linalg.norm(offset, axis=-1) > MAX_BACKGROUND_DISTANCE).any():
        return Verdict(background=background, reason="only specks stand out from the background")
    alpha = _object_mask(offset)
    track = _track(alpha)
    colour, colour_reason = _colour(video[alpha > 0.9])
    present = track.area > MIN_AREA
    if present.mean() < MIN_PRESENT:
        reason = f"the object is visible in only {present.sum()} of {len(present)} frames"
        return Verdict(colour=colour, background=background, reason=reason)
    motion, motion_reason = _motion(track)
    shape, shape_lenient, shape_reason = _shape(track)
    background_reason = "" if background else f"background {plain.round()} is not one of the known ones"
    reasons = (shape_reason, colour_reason, motion_reason, background_reason)
    return Verdict(shape, shape_lenient, colour, motion, background, "; ".join(filter(None, reasons)))


def score(frames: Array, expected: Mapping[str, str]) -> dict[str, bool]:
    """Compare a video (uint8 [T H W 3]) with expected attributes; see `compare`."""
    return compare(check(frames), expected)


def compare(verdict: Verdict, expected: Mapping[str, str]) -> dict[str, bool]:
    """Compare the verdict on a video with expected attributes.

    Returns:
        One boolean per attribute ("shape" by the strict rule), "shape_lenient", and "strict" and "lenient": whether
        all four attributes are right, the shape by the strict or by the lenient rule.
    """
    right = {name: getattr(verdict, name) == expected[name] for name in ATTRIBUTES}
    lenient = verdict.shape_lenient == expected["shape"]
    others = all(right[name] for name in ATTRIBUTES if name != "shape")
    return {
        **right,
        "shape_lenient": lenient,
        "strict": right["shape"] and others,
        "lenient": lenient and others,
    }


def _shrink(frames: Array) -> Array:
    """Average blocks of pixels so that the shorter side is about 32: float32 [T H W 3]."""
    t, h, w, _ = frames.shape
    k = max(1, min(h, w) // int(FRAME))
    video = frames[:, : h // k * k, : w // k * k].astype(np.float32)
    return video.reshape(t, h // k, k, w // k, k, 3).mean((2, 4))


def _border(volume: Array) -> Array:
    """Return the outermost pixels of every frame: [T n ...]."""
    edges = (volume[:, 0], volume[:, -1], volume[:, 1:-1, 0], volume[:, 1:-1, -1])
    return np.concatenate(edges, axis=1)


def _background(video: Array) -> tuple[Array | None, str | None]:
    """Return the colour [3] of a plain background (None if the border is not plain), and its name if it has one."""
    border = _border(video)  # [T n 3]
    plain = np.median(border, axis=(0, 1))
    close = np.linalg.norm(border - plain, axis=-1) < MAX_BACKGROUND_DISTANCE
    if close.mean() < MIN_BORDER:
        return None, None
    distances = {name: float(np.linalg.norm(plain - np.array(rgb))) for name, rgb in BACKGROUNDS.items()}
    name = min(distances, key=distances.__getitem__)
    return plain, name if distances[name] < 1.5 * MAX_BACKGROUND_DISTANCE else None


def _sharpen(alpha: Array) -> Array:
    """Remove faint noise in the background and inside the object, without moving edges."""
    return np.clip((alpha - 0.2) / 0.6, 0.0, 1.0)


def _object_mask(offset: Array) -> Array:
    """Return a soft mask [T H W] of the object, from the pixels' offset [T H W 3] from the background.

    A pixel between the background and the object's typical colour is an edge, in proportion. Pixels of other colours
    count as object, so that they spoil its shape.
    """
    distance = np.linalg.norm(offset, axis=-1)
    clear = distance > MAX_BACKGROUND_DISTANCE
    clear &= distance > 0.7 * np.percentile(distance[clear], 75)
    typical = np.median(offset[clear], axis=0)
    contrast = float(np.linalg.norm(typical))
    along = offset @ (typical / contrast)
    beside = np.sqrt(np.maximum(distance**2 - along**2, 0.0))
    return np.where(beside > CLUTTER, 1.0, _sharpen(along / contrast))


def _track(alpha: Array) -> _Track:
    """Measure area and centre of a soft mask [T H W] in every frame."""
    h, w = alpha.shape[1:]
    area = alpha.sum((1, 2))
    mass = np.maximum(area, 1e-6)
    x = (alpha.sum(1) @ (np.arange(w) + 0.5)) / mass
    y = (alpha.sum(2) @ (np.arange(h) + 0.5)) / mass
    return _Track(alpha, area, x, y)


def _hue(rgb: Array) -> tuple[Array, Array]:
    """Return hue (degrees) and saturation of HSV, for colours [... 3]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    high, chroma = rgb.max(-1), np.ptp(rgb, axis=-1)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return hue, chroma / np.maximum(high, 1e-6)


def _colour(pixels: Array) -> tuple[str | None, str]:
    """Return the colour that most pixels [n 3] vote for, or None and the reason.

    A pixel votes for the nearest hue, unless it is too grey, too dark, or too far from all.
    """
    names = list(COLOURS)
    known = np.array([COLOURS[name] for name in names], np.float32)
    hue, saturation = _hue(pixels)
    gap = np.abs((hue[:, None] - _hue(known)[0] + 180) % 360 - 180)  # [n 6]
    nearest = gap.argmin(1)
    bright = pixels.max(-1) > MIN_BRIGHTNESS * known.max(-1)[nearest]
    valid = bright & (saturation > MIN_SATURATION) & (gap.min(1) < MAX_HUE_DISTANCE)
    votes = np.bincount(nearest[valid], minlength=len(names))
    winner = int(np.argmax(votes))
    share = votes[winner] / max(1, len(pixels))
    if share < MIN_AGREEMENT:
        return None, f"no clear colour ({names[winner]} {share:.0%})"
    return names[winner], ""


def _steadiness(values: Array) -> float:
    """Return the absolute correlation of values [T] with time."""
    time = np.arange(len(values)) - (len(values) - 1) / 2
    centred = values - values.mean()
    scale = np.linalg.norm(time) * np.linalg.norm(centred)
    return float(abs(time @ centred) / scale) if scale > 0 else 0.0


def _motion(track: _Track) -> tuple[str | None, str]:
    """Return the motion (straight and steady, or a steady change of size in place), or None and the reason."""
    frames = len(track.x)
    if frames < MIN_WHOLE_FRAMES:
        return None, f"no motion in {frames} frames"
    ends = max(1, frames // 8)
    dx, dy = (float(a[-ends:].mean() - a[:ends].mean()) for a in (track.x, track.y))
    ratio = float(track.size[-ends:].mean() / track.size[:ends].mean())
    travel, drift = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    details = f"moved by ({dx:.1f}, {dy:.1f}) pixels, grew by {ratio:.2f}"
    scaling = max(ratio, 1 / ratio)
    if travel >= MIN_TRAVEL:
        along = track.x if abs(dx) > abs(dy) else track.y
        if drift > MAX_DRIFT * travel or _steadiness(along) < MIN_STEADINESS or scaling > MIN_SCALING:
            return None, f"no clear motion: {details}"
        if abs(dx) > abs(dy):
            return ("right" if dx > 0 else "left"), ""
        return ("down" if dy > 0 else "up"), ""
    if scaling >= MIN_SCALING and _steadiness(track.size) >= MIN_STEADINESS:
        return ("grow" if ratio > 1 else "shrink"), ""
    return None, f"no clear motion: {details}"


def _blur(volume: Array) -> Array:
    """Blur [T H W ...] by (1, 2, 1) / 4 along both sides of the frame."""
    for axis in (1, 2):
        padded = np.pad(volume, [(1, 1) if a == axis else (0, 0) for a in range(volume.ndim)], mode="edge")
        n = volume.shape[axis]
        before, here, after = (np.take(padded, np.arange(i, i + n), axis) for i in range(3))
        volume = (before + 2 * here + after) / 4
    return volume


def _fits(track: _Track, shape: str) -> Array:
    """Return the intersection over union [T] of the object with a rendered shape of its size and place.

    The rendered shape may be slightly larger, smaller or blurred: the variant with the best mean is taken.
    """
    h, w = track.alpha.shape[1:]
    centre, one = np.full(1, 64.0), np.full(1, 40.0)
    unit_area = coverage(shape, centre, centre, one, 128, 128).sum() / 40.0**2  # of radius 1
    candidates = []
    for scale in (0.95, 1.0, 1.05):
        radius = np.sqrt(track.area / unit_area) * scale
        drawn = coverage(shape, track.x, track.y, radius, h, w)
        for _ in range(BLURS):
            drawn = _blur(drawn)
            template = _sharpen(drawn)
            overlap = np.minimum(template, track.alpha).sum((1, 2))
            union = np.maximum(template, track.alpha).sum((1, 2))
            candidates.append(overlap / np.maximum(union, 1e-6))
    return max(candidates, key=lambda fit: fit.mean())


def _shape(track: _Track) -> tuple[str | None, str | None, str]:
    """Return the shape by the strict rule, the shape by the lenient rule, and why there is no strict one.

    Only frames in which the object is clear of the border count, weighted by its area.
    """
    whole = (_border(track.alpha).max(1) < 0.5) & (track.area > MIN_AREA)
    if whole.sum() < min(MIN_WHOLE_FRAMES, len(whole)):
        return None, None, "the object is cut by the border"
    seen = _Track(track.alpha[whole], track.area[whole], track.x[whole], track.y[whole])
    names = list(SHAPES)
    fits = np.stack([_fits(seen, name) for name in names])  # [shapes T]
    weight = seen.area / seen.area.sum()
    mean = fits @ weight
    second, best = np.argsort(mean)[-2:]
    agreement = weight[fits.argmax(0) == best].sum()
    details = f"{names[best]} {mean[best]:.2f}, {names[second]} {mean[second]:.2f}"
    if mean[best] < MIN_FIT or mean[best] - mean[second] < MIN_MARGIN or agreement < MIN_AGREEMENT:
        return None, names[best], f"no clear shape ({details})"
    return names[best], names[best], ""
