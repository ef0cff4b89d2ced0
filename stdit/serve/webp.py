"""Frames as animated WebP, which browsers show in an ``<img>``."""

import io

import numpy as np
import PIL.Image

_QUALITY = 75


def webp_of_frames(frames: np.ndarray, fps: float, longest: int) -> bytes:
    """Return frames as an animated WebP that loops, or as a still one if there is one frame.

    Args:
        frames: uint8 ``[T H W 3]``.
        fps: frames per second.
        longest: pixels; larger frames are reduced until their longer side is this long.
    """
    height, width = frames.shape[1:3]
    scale = min(1.0, longest / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [PIL.Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    if size != (width, height):
        pictures = [picture.resize(size, PIL.Image.Resampling.BILINEAR) for picture in pictures]
    first, *rest = pictures
    milliseconds = max(20, round(1000 / fps))
    file = io.BytesIO()
    options = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0} if rest else {}
    first.save(file, format="WEBP", quality=_QUALITY, method=2, **options)
    return file.getvalue()
