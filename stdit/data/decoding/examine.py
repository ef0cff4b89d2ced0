"""Decode a whole file to find what its header does not say: damage, HDR and interlacing."""

from pathlib import Path
from typing import NamedTuple

from stdit.data.decoding.colors import SDR, color_of
from stdit.data.decoding.decode import VideoInfo, probe
from stdit.data.decoding.frames import frames_in_order
from stdit.data.decoding.interlacing import PROGRESSIVE, find_field_order
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, Video, open_clip


class Examination(NamedTuple):
    """What a file holds that can be used."""

    info: VideoInfo
    """Of the frames before the first damage."""
    color: str
    """The colour of `colors.color_of`."""
    field_order: str
    """One of `interlacing.FIELD_ORDERS`."""
    readable_seconds: float
    """Duration of the frames before the first damage; nothing after it is used."""
    damage: str
    """Where the damage begins, and what it is; empty for an intact file."""


def examine(file: Media | Path, quick: bool = False) -> Examination:
    """Examine a video or image by decoding all of its frames. Raises DecodeError if none can be read.

    Args:
        quick: decode a few frames only, and take the others to be intact.
    """
    media = Media.of(file)
    info, color = probe(media), SDR
    count, seconds, damage = 0, 0.0, ""
    with open_clip(media, quick=False) as opened:
        if not isinstance(opened, Video):
            return Examination(info, SDR, PROGRESSIVE, round(info.num_frames / info.fps, 3), "")
        try:
            for time, length, frame in frames_in_order(opened):
                color = color_of(frame) if count == 0 else color
                if time >= 0:  # earlier frames refer to frames that are missing
                    count, seconds = count + 1, time + length
                if quick and count:
                    break
        except DecodeError as error:
            if not count:
                raise
            header = float((opened.stream.duration or 0) * (opened.stream.time_base or 0))
            stated = max(header, info.num_frames / info.fps, seconds)
            damage = f"from {seconds:.3f} s of {stated:.3f} s on: {error.reason}"
            info = VideoInfo(count, count / seconds, info.height, info.width)
    return Examination(info, color, find_field_order(media), round(info.num_frames / info.fps, 3), damage)
