"""Recognises the background of a video, and measures the noise of a plain one.

Letters: T frames, H height, W width, n pixels.
"""

from dataclasses import dataclass

import numpy as np

from stdit.data.shapes.outlines import Array
from stdit.data.shapes.render import GRADIENTS, PLAIN, STRIPES
from stdit.data.shapes.worlds import World

MAX_BACKGROUND_DISTANCE = 45.0
"""Distance in RGB (0 to 255) below which a pixel belongs to the background."""
MIN_BORDER = 0.7
"""Fraction of the border that must have the background's colour."""
MAX_CHROMA = 40.0
"""Largest mean difference of the channels of a patterned background: all are grey."""
MIN_RAMP = 60.0
"""Minimum difference in grey levels between the ends of a gradient."""
MIN_CORRELATION = 0.9
"""Minimum correlation of a gradient's levels with the place."""
STRIPE_PAIRS = (2, 8)
"""Least and largest number of pairs of stripes in a frame."""
MIN_CONTRAST = 12.0
"""Minimum standard deviation in grey levels of stripes."""
MIN_REGULARITY = 0.6
"""Minimum fraction of the stripes' variance that is at one frequency."""
NOISE_ROWS = 4
"""Rows at the top and at the bottom in which noise is measured."""
NOISE_DISTANCE = 60.0
"""Difference in levels of a channel above which a pixel is not the background."""


@dataclass(frozen=True)
class Background:
    """The background of all frames: [1 1 3] if plain, [H 1 3] or [1 W 3] if it changes along one side."""

    image: Array
    name: str | None
    """None if it is not one of the world's."""

    @property
    def plain(self) -> bool:
        return self.image.shape == (1, 1, 3)


def find_background(video: Array, world: World) -> Background | None:
    """Return the background of a video, float32 [T H W 3]; None if the border shows none.

    It is estimated from the outermost pixels of all frames, as plain; failing that, in a world that has others, as a
    function of the row or of the column.
    """
    plain = np.median(border(video), axis=(0, 1))[None, None]
    if _share(video, plain) >= MIN_BORDER:
        return Background(plain, _plain_name(plain[0, 0], world))
    if set(world.backgrounds) <= set(PLAIN):
        return None
    rows = np.median(video[:, :, [0, -1]], axis=(0, 2))[:, None]  # [H 1 3]
    columns = np.median(video[:, [0, -1]], axis=(0, 1))[None]  # [1 W 3]
    share, image = max(((_share(video, image), image) for image in (rows, columns)), key=lambda pair: pair[0])
    if share < MIN_BORDER:
        return None
    return Background(image, _pattern_name(image, world))


def background_noise(frames: Array) -> float | None:
    """Return the noise of a plain background: rms difference of its pixels from their common colour.

    It is measured in the top and bottom four rows, where objects seldom are: their colour is the median of these
    rows, and pixels of which a channel is 60 or more away from it are no background.

    Args:
        frames: uint8 [T H W 3], RGB.

    Returns:
        Levels of 255; None if the background is not plain.
    """
    video = frames.astype(np.float32)
    rows = np.concatenate([video[:, :NOISE_ROWS], video[:, -NOISE_ROWS:]], axis=1)
    plain = np.median(rows, axis=(0, 1, 2))
    if _share(video, plain) < MIN_BORDER:
        return None
    offset = rows - plain
    return float(np.sqrt((offset[np.abs(offset).max(-1) < NOISE_DISTANCE] ** 2).mean()))


def border(volume: Array) -> Array:
    """Return the outermost pixels of every frame: [T n ...]."""
    edges = (volume[:, 0], volume[:, -1], volume[:, 1:-1, 0], volume[:, 1:-1, -1])
    return np.concatenate(edges, axis=1)


def _share(video: Array, image: Array) -> float:
    """Return the share of the border's pixels that have the colour of a background image."""
    return float((np.linalg.norm(border(video - image), axis=-1) < MAX_BACKGROUND_DISTANCE).mean())


def _plain_name(rgb: Array, world: World) -> str | None:
    known = [name for name in world.backgrounds if name in PLAIN]
    distances = {name: float(np.linalg.norm(rgb - np.array(PLAIN[name]))) for name in known}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < 1.5 * MAX_BACKGROUND_DISTANCE else None


def _pattern_name(image: Array, world: World) -> str | None:
    """Return the name of a background that changes along one side."""
    axis = 0 if image.shape[1] == 1 else 1
    if np.ptp(image, axis=-1).mean() > MAX_CHROMA:
        return None
    levels = image.mean(-1).ravel()
    place = np.arange(len(levels))
    offset = levels - levels.mean()
    if levels.std() < MIN_CONTRAST:
        return None
    correlation, ends = np.corrcoef(levels, place)[0, 1], max(1, len(levels) // 8)
    ramp = levels[-ends:].mean() - levels[:ends].mean()
    if axis == 0 and abs(correlation) >= MIN_CORRELATION and abs(ramp) >= MIN_RAMP:
        found = next(name for name, (top, bottom) in GRADIENTS.items() if (bottom > top) == (ramp > 0))
    else:
        power = np.abs(np.fft.rfft(offset)) ** 2
        main = int(power[1:].argmax()) + 1
        regular = power[main - 1 : main + 2].sum() / power.sum()
        if not STRIPE_PAIRS[0] <= main <= STRIPE_PAIRS[1] or regular < MIN_REGULARITY:
            return None
        found = next(name for name, along in STRIPES.items() if along == axis)
    return found if found in world.backgrounds else None
