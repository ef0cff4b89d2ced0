"""Read pictures as videos with Pillow: still ones have one frame, animated WebP and PNG several."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from stdit.data.decoding.frames import latest_shown
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError
from stdit.data.decoding.pixels import upright_rgb

MIN_SECONDS = 0.011
"""Frames with a shorter duration are shown for DEFAULT_SECONDS, as in browsers."""
DEFAULT_SECONDS = 0.1


def is_still(image: Image.Image) -> bool:
    return getattr(image, "n_frames", 1) == 1


def timed_pictures(image: Image.Image) -> Iterator[tuple[float, float, np.ndarray]]:
    """Yield (seconds after the first frame, duration in seconds, RGB [H W 3]) of each frame."""
    time = 0.0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        seconds = float(image.info.get("duration", 0)) / 1000
        seconds = seconds if seconds >= MIN_SECONDS else DEFAULT_SECONDS
        yield time, seconds, np.array(upright_rgb(image))
        time += seconds


def pictures_at(
    media: Media, image: Image.Image, times: list[float], tolerance: float
) -> Iterator[tuple[np.ndarray, range]]:
    """Yield the pictures on screen at ascending `times` (seconds), with their range of indices in `times`.

    Raises DecodeError if the animation ends earlier, or for several times of a still image.
    """
    if not is_still(image):
        yield from latest_shown(media, timed_pictures(image), times, tolerance)
    elif len(times) > 1:
        raise DecodeError(media, f"an image has one frame, not {len(times)}")
    else:
        yield np.array(upright_rgb(image)), range(1)
