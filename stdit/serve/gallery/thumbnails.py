"""Thumbnails: a few frames of a video as a small animated WebP, made once. Imports no torch."""

import os
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import PIL.Image

from stdit.atomic_files import atomic_write
from stdit.errors import UserError
from stdit.serve.webp import webp_of_frames

THUMBNAIL_FRAMES = 8
"""Most frames of a thumbnail."""
THUMBNAIL_PIXELS = 192
"""Most pixels of a thumbnail's longer side."""
_MOST_DECODED = 2000
"""Frames of a video among which those of its thumbnail are chosen: a hostile file may hold millions."""
_MOST_SECONDS = 20.0
"""Seconds of decoding after which a video gets no thumbnail."""


def thumbnail(video: Path, cache: Path, pictures: bool = False) -> Path:
    """Return the file with the thumbnail of a video, or of a picture; make it unless it is there.

    It is named after path, time and size of the video, so that another video under the same name gets its own.

    Args:
        cache: folder of all thumbnails, whose files may be deleted at any time.
        pictures: accept a picture, too.

    Raises:
        UserError: if it is missing, damaged, or neither video nor picture, or the thumbnail cannot be written.
    """
    try:
        status = video.stat()
    except OSError as error:
        raise UserError(f"{video.name} cannot be read ({error.strerror}).") from None
    place = _place(video, cache)
    file = place.with_name(f"{place.name}-{status.st_mtime_ns:x}-{status.st_size:x}.webp")
    if not file.is_file():
        frames, fps = thumbnail_frames(video, pictures)
        content = webp_of_frames(frames, fps, THUMBNAIL_PIXELS)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_thumbnails(video, cache)
            with atomic_write(file) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise UserError(
                f"thumbnail of {video.name}: cannot be written ({error.strerror}): make room on the disk."
            ) from None
    return file


def remove_thumbnails(video: Path, cache: Path) -> None:
    """Remove what `thumbnail` made of a video, also of earlier ones under its name."""
    place = _place(video, cache)
    for file in place.parent.glob(f"{place.name}-*.webp"):
        file.unlink(missing_ok=True)


def thumbnail_frames(video: Path, pictures: bool = False) -> tuple[np.ndarray, float]:
    """Decode at most `THUMBNAIL_FRAMES` frames, spread over a video, of at most `THUMBNAIL_PIXELS` pixels a side.

    Args:
        pictures: accept a picture, too, which is one frame.

    Returns:
        uint8 ``[T H W 3]``, and how many of them are shown per second, so that they last as long as the video, within
        limits between which an animation is pleasant.

    Raises:
        UserError: if it is damaged or no video, or takes too long.
    """
    from stdit.data.decoding.opening import DecodeError

    try:
        frames, seconds = _decode(video, pictures)
    except DecodeError as error:
        raise UserError(f"{video.name}: {error.reason}.") from None
    return frames, min(max(len(frames) / max(seconds, 1e-3), 2.0), 16.0)


def _decode(video: Path, pictures: bool) -> tuple[np.ndarray, float]:
    """Return the frames of a thumbnail, and the seconds that the video lasts."""
    from stdit.data.decoding.frames import frames_in_order
    from stdit.data.decoding.media import Media
    from stdit.data.decoding.opening import DecodeError, Video, open_clip
    from stdit.pipelines.video_io import spread

    media, shown = Media.of(video), list[np.ndarray]()
    with open_clip(media) as opened:
        if not isinstance(opened, Video):
            if not pictures:
                raise DecodeError(media, "is a picture, not a video")
            return _small(opened)[None], 1.0
        stated = opened.stream.frames or THUMBNAIL_FRAMES
        wanted = spread(min(stated, _MOST_DECODED), THUMBNAIL_FRAMES)
        rate = float(opened.stream.average_rate or 8)
        late = time.monotonic() + _MOST_SECONDS
        for index, (_, _, frame) in enumerate(frames_in_order(opened)):
            if index in wanted:
                scale = min(1.0, THUMBNAIL_PIXELS / max(frame.height, frame.width))
                height, width = (max(1, round(side * scale)) for side in (frame.height, frame.width))
                shown.append(frame.reformat(width=width, height=height, format="rgb24").to_ndarray())
            if index >= wanted[-1]:
                break
            if time.monotonic() > late:
                raise DecodeError(media, f"decoding takes more than {_MOST_SECONDS:.0f} s")
    if len(shown) < (len(wanted) if opened.stream.frames else 1):
        raise DecodeError(media, f"it ends before its frame {wanted[len(shown)] + 1} of {stated}")
    shape = shown[0].shape
    return np.stack([one for one in shown if one.shape == shape]), stated / rate


def _small(picture: PIL.Image.Image) -> np.ndarray:
    """Return a picture, uint8 ``[H W 3]``, of at most `THUMBNAIL_PIXELS` pixels a side."""
    from stdit.data.decoding.pixels import upright_rgb

    small = upright_rgb(picture)
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return np.asarray(small)


def _place(video: Path, cache: Path) -> Path:
    """Return the folder and the beginning of the name of a video's thumbnails."""
    digest = blake2b(os.path.abspath(video).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return cache / digest[:2] / digest
