"""Recognise the background of a video, and measure noise and patch borders of a plain one.

Letters: T frames, H height, W width, n pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
EDGE = 2
"""Pixels around an object that are left out of the measure of patch borders: compression blurs edges into them."""
LEAST_JUMP = 1.0
"""Levels; smaller mean jumps cannot be seen, and compression makes them at the borders of its own blocks."""


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
    plain = _plain_colour(video)
    if plain is None:
        return None
    offset = _outer_rows(video) - plain
    return float(np.sqrt((offset[np.abs(offset).max(-1) < NOISE_DISTANCE] ** 2).mean()))


def patch_borders(frames: Array, height: int, width: int) -> float | None:
    """Return how visible the borders of a model's patches are in a plain background; 1: not at all.

    It is the mean absolute difference of neighbouring pixels on either side of a border, divided by that of all other
    neighbours, both of at least a level. Objects are left out, with two pixels around them: their edges are steeper
    than any border of patches, wherever they happen to be.

    Args:
        frames: uint8 [T H W 3], RGB.
        height: height of a patch in pixels.
        width: width of a patch in pixels.

    Returns:
        The ratio; None if the background is not plain, or shows no border or nothing else.
    """
    video = frames.astype(np.float32)
    plain = _plain_colour(video)
    if plain is None:
        return None
    flat = ~_widened(np.abs(video - plain).max(-1) >= NOISE_DISTANCE, EDGE)
    across, elsewhere = np.zeros(2), np.zeros(2)  # sum and number
    for axis, period in ((1, height), (2, width)):
        jumps = np.moveaxis(np.abs(np.diff(video, axis=axis)).mean(-1), axis, -1)  # [T n n-1]
        pixels = np.moveaxis(flat, axis, -1)
        both = pixels[..., 1:] & pixels[..., :-1]
        at_border = np.arange(1, jumps.shape[-1] + 1) % period == 0
        for total, chosen in ((across, jumps[both & at_border]), (elsewhere, jumps[both & ~at_border])):
            total += chosen.sum(), chosen.size
    if not (across[1] and elsewhere[1]):
        return None
    mean_across, mean_elsewhere = (max(total[0] / total[1], LEAST_JUMP) for total in (across, elsewhere))
    return float(mean_across / mean_elsewhere)


def _plain_colour(video: Array) -> Array | None:
    """Return the colour of a plain background, the median of its outer rows; None if it is not plain."""
    plain: Array = np.median(_outer_rows(video), axis=(0, 1, 2))
    return plain if _share(video, plain) >= MIN_BORDER else None


def _outer_rows(video: Array) -> Array:
    return np.concatenate([video[:, :NOISE_ROWS], video[:, -NOISE_ROWS:]], axis=1)


def _widened(mask: Array, pixels: int) -> Array:
    """Return a mask [T H W] with all pixels that are in reach of its own: a square around each."""
    for axis in (1, 2):
        pad = [(pixels, pixels) if axis == side else (0, 0) for side in range(3)]
        mask = sliding_window_view(np.pad(mask, pad), 2 * pixels + 1, axis=axis).max(-1)
    return mask


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
