"""Pictures that Pillow reads as videos: still ones of one frame, animated WebP and PNG of several."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from stdit.data.decoding.frames import latest_shown
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError
from stdit.data.decoding.pixels import upright_rgb

SHORTEST = 0.011
"""Seconds: frames that claim to be shown for less are shown for LENGTH, as browsers do."""
LENGTH = 0.1


def is_still(image: Image.Image) -> bool:
    return getattr(image, "n_frames", 1) == 1


def timed_pictures(image: Image.Image) -> Iterator[tuple[float, float, np.ndarray]]:
    """(seconds after the first, seconds shown, RGB [H W 3]) of each frame in turn."""
    time = 0.0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        seconds = float(image.info.get("duration", 0)) / 1000
        seconds = seconds if seconds >= SHORTEST else LENGTH
        yield time, seconds, np.array(upright_rgb(image))
        time += seconds


def pictures_at(
    media: Media, image: Image.Image, times: list[float], tolerance: float
) -> Iterator[tuple[np.ndarray, range]]:
    """The pictures on screen at ascending `times` (seconds after the first), with their places in `times`.

    Raises DecodeError when it ends earlier; a still image has one frame, and serves one time.
    """
    if not is_still(image):
        yield from latest_shown(media, timed_pictures(image), times, tolerance)
    elif len(times) > 1:
        raise DecodeError(media, f"an image has one frame, not {len(times)}")
    else:
        yield np.array(upright_rgb(image)), range(1)
