"""Conditioning frames: pictures or clips that a generated video contains, where, and how strictly they are kept.

Letters: T frames, H height, W width in pixels.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SYNTAX = re.compile(
    r"(?P<source>.+)@(?P<index>-?\d{1,9})(:(?P<length>\d{0,9}))?(:(?P<strength>[\d.]+))?", re.DOTALL
)


@dataclass(frozen=True)
class FrameCondition:
    """Frames of a picture or video, and their place in the generated video."""

    source: Any
    """A file's path; an image (see `images.image_to_frame`); or a video, a tensor ``[3 T H W]`` in [-1, 1]."""
    frame_index: int = 0
    """Index of the first of these frames in the generated video; negative numbers count from the end."""
    length: int | None = None
    """How many frames of the source to use; None: as many as the source has and the video has room for."""
    strength: float = 1.0
    """1: frames are kept exactly. Below 1: noised to level 1 - strength and regenerated from there."""
    skip: int = 0
    """Frames of the source to skip before the first one used."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise UserError(f"condition {self}: its length must be at least 1 frame.")
        if not 0 < self.strength <= 1:
            raise UserError(
                f"condition {self}: its strength must be above 0 (which would keep nothing), up to 1."
            )

    def __str__(self) -> str:
        source = self.source if isinstance(self.source, str | Path) else type(self.source).__name__
        return f"{source}@{self.frame_index}:{self.length or ''}:{self.strength:g}"

    def place(self) -> str:
        """Return the name of the source and its frames in the video, such as ``clip.mp4@0:8``."""
        source = Path(self.source).name if isinstance(self.source, str | Path) else type(self.source).__name__
        strength = f", strength {self.strength:g}" if self.strength < 1 else ""
        return f"{source}@{self.frame_index}" + (f":{self.length}" if self.length else "") + strength

    def span(self, num_frames: int) -> tuple[int, int]:
        """Return the first frame and the length (None: the room) in a video of ``num_frames`` frames.

        Raises:
            UserError: if it begins or ends outside the video.
        """
        start = self.frame_index + num_frames if self.frame_index < 0 else self.frame_index
        if not 0 <= start < num_frames:
            raise UserError(
                f"condition {self}: the video has the frames 0 to {num_frames - 1}, or {-num_frames} to -1 counted "
                "from its end: choose one of them."
            )
        room = num_frames - start
        if self.length is not None and self.length > room:
            raise UserError(
                f"condition {self}: from frame {start} on the video has {room} frames, not {self.length}: begin "
                "earlier, use fewer frames, or ask for a longer video."
            )
        return start, self.length or room

    def resolved(self, num_frames: int, fps: float) -> "FrameCondition":
        """Return this condition with its length in a video of ``num_frames`` frames at ``fps`` frames per second.

        Raises:
            UserError: if it lies outside the video, or its source cannot be read or is shorter than its length.
        """
        from torch import Tensor

        _, room = self.span(num_frames)
        if isinstance(self.source, str | Path):
            available = _count_frames(Path(self.source), fps)
        else:
            is_video = isinstance(self.source, Tensor) and self.source.ndim == 4
            available = self.source.shape[1] if is_video else 1
        if available - self.skip < (self.length or 1):
            skipped = f", of which the first {self.skip} are skipped" if self.skip else ""
            raise UserError(
                f"condition {self}: its source has {available} frames at {fps:g} per second{skipped}, not "
                f"{self.length or 1}: leave the length out to use all."
            )
        return replace(self, length=self.length or min(available - self.skip, room))


def parse_frame_condition(text: str) -> FrameCondition:
    """Parse ``FILE@frame[:length][:strength]``, such as ``end.png@-1`` or ``clip.mp4@0:8:0.5``.

    Raises:
        UserError: if the text has another form.
    """
    found = _SYNTAX.fullmatch(text)
    if found is None:
        raise UserError(
            f"condition {text!r}: must be FILE@frame[:length][:strength], such as first.png@0, end.png@-1 or "
            "clip.mp4@0:8:0.5."
        )
    strength = found["strength"] or "1"
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", strength):
        raise UserError(
            f"condition {text!r}: {strength!r} is no strength: write a number up to 1, such as 0.5."
        )
    length = int(found["length"]) if found["length"] else None
    return FrameCondition(found["source"], int(found["index"]), length, float(strength))


def check_strengths(conditions: Sequence[FrameCondition], where: str = "") -> None:
    """Raise UserError for conditioning frames of which attention cannot be used again in later steps."""
    for condition in conditions:
        if condition.strength < 1:
            raise UserError(
                f"{where}pab and condition {condition}: attention of a frame without noise would be used again when "
                "that frame is generated: use strength 1, or cache instead of pab."
            )


def check_frame_source(path: str) -> None:
    """Raise UserError if no picture or video can be read from a file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(
            f"conditioning frames {path}: a folder, pipe or device: name a picture or video file."
        )
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise UserError(
            f"conditioning frames {path}: there is no such file: correct the path, or remove the condition."
        )
    _count_frames(Path(path), fps=1)


def find_unused_frames(image: str | Path) -> Iterator[str]:
    """Yield a warning if the file of a first frame has more than one frame."""
    from stdit.data.decoding.decode import probe

    with _explain_decode_errors():
        frames = probe(Path(image)).num_frames
    if frames > 1:
        yield (
            f"image {image}: a video of {frames} frames, of which the first is used: to continue N of them, use "
            f"--condition {image}@0:N"
        )


def find_overlaps(conditions: Sequence[FrameCondition], num_frames: int) -> Iterator[str]:
    """Yield a warning for each resolved condition of which a later one overwrites frames."""
    for place, earlier in enumerate(conditions):
        begin, length = earlier.span(num_frames)
        for later in conditions[place + 1 :]:
            start, count = later.span(num_frames)
            first, last = max(begin, start), min(begin + length, start + count) - 1
            if first <= last:
                frames = f"frame {first}" if first == last else f"frames {first} to {last}"
                yield f"condition {later} overwrites {frames} of condition {earlier}: the later one wins"
                break


@lru_cache(maxsize=1000)
def warn_once(message: str) -> None:
    """Log a warning of conditioning frames, unless it was logged already."""
    logger.warning(message)


def load_frames(condition: FrameCondition, fps: float, height: int, width: int) -> "Tensor":
    """Load the frames ``[3 T H W]`` in [-1, 1] of a resolved condition, scaled and centre-cropped.

    A video file is resampled to ``fps`` frames per second.

    Raises:
        UserError: if the source cannot be read.
    """
    from torch import Tensor

    from stdit.data.clip_tensors import to_video
    from stdit.data.decoding.decode import decode_clip, probe
    from stdit.pipelines.images import image_to_frame, resize_and_crop, warn_if_resized

    source, skip, length = condition.source, condition.skip, condition.length
    assert length is not None
    if isinstance(source, Tensor) and source.ndim == 4:
        return resize_and_crop(source[:, skip : skip + length], height, width)
    if not isinstance(source, str | Path):
        return image_to_frame(source, height, width)
    with _explain_decode_errors():
        info = probe(Path(source))
        warn_if_resized(f"conditioning frames {source}", info.height, info.width, height, width)
        return to_video(decode_clip(Path(source), length, fps, height, width, start=skip / fps)[None])[0]


def _count_frames(path: Path, fps: float) -> int:
    """Return the number of frames of a file resampled to ``fps`` frames per second."""
    from stdit.data.decoding.decode import probe

    with _explain_decode_errors():
        info = probe(path)
    return max(1, round(info.num_frames / info.fps * fps)) if info.num_frames > 1 else 1


@contextmanager
def _explain_decode_errors() -> Iterator[None]:
    """Raise a UserError for a file that is no picture or video."""
    from stdit.data.decoding.decode import DecodeError

    try:
        yield
    except DecodeError as error:
        raise UserError(f"conditioning frames {error}: use an intact picture or video.") from None
