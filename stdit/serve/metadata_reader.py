"""Read the metadata of stdit in videos that anybody may have written. Imports no torch."""

import io
import json
import struct
from pathlib import Path

from PIL import Image

_MOST_METADATA = 1 << 20
"""Characters of metadata; a longer comment is not ours."""
_GIF = b"GIF8"


def read_hostile_metadata(video: Path) -> dict | None:
    """Return the metadata inside a video or GIF that anybody may have written; None if it has none of ours.

    The content decides, not the name. No frame is decoded, and no file that this one names is opened.
    """
    from stdit.data.decoding.media import Media
    from stdit.data.decoding.opening import DecodeError, Video, open_clip

    try:
        with open(video, "rb") as file:
            head = file.read(len(_GIF))
        if head == _GIF:
            comment = _gif_comment(video)
        else:
            with open_clip(Media.of(video)) as opened:
                comment = opened.container.metadata.get("comment", "") if isinstance(opened, Video) else ""
        found = json.loads(comment) if len(comment) <= _MOST_METADATA else None
    except (OSError, DecodeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _gif_comment(file: Path) -> bytes | str:
    """Return the comment before the first frame of a GIF, of which no more than is needed is read.

    Raises:
        ValueError: if it is damaged, or its frames are too large.
    """
    from stdit.data.decoding.media import Media
    from stdit.data.decoding.opening import check_frame_size

    with open(file, "rb") as opened:
        start = opened.read(_MOST_METADATA)
    try:
        width, height = struct.unpack_from("<HH", start, 6)
        check_frame_size(Media.of(file), width, height)
        with Image.open(io.BytesIO(start), formats=["GIF"]) as image:
            comment: bytes | str = image.info.get("comment", b"")
            return comment
    except (OSError, SyntaxError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"a damaged GIF ({error})") from None
