"""Frames that a video is given: which, where in it, and how strictly they are kept.

Letters: T frames, H height, W width in pixels.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SYNTAX = re.compile(
    r"(?P<source>.+)@(?P<frame>-?\d{1,9})(:(?P<length>\d{0,9}))?(:(?P<strength>[\d.]+))?", re.DOTALL
)


@dataclass(frozen=True)
class Condition:
    """Frames from a picture or a video that stand at some place of the video to be made."""

    source: Any
    """A file's path; or a picture (see `images.first_frames`); or a video, a tensor ``[3 T H W]`` in [-1, 1]."""
    frame: int = 0
    """Where they begin, in frames of the video to be made; a negative number counts from its end."""
    length: int | None = None
    """How many of the source's first frames are taken; None: all that the video has room for."""
    strength: float = 1.0
    """1: kept as they are. Below: noised to level 1 - strength, and made anew from there."""
    skip: int = 0
    """Frames of the source before the first that is taken."""

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise UserError(f"condition {self}: its length must be at least 1 frame.")
        if not 0 < self.strength <= 1:
            raise UserError(f"condition {self}: its strength must be above 0, which keeps nothing, up to 1.")

    def __str__(self) -> str:
        source = self.source if isinstance(self.source, str | Path) else type(self.source).__name__
        return f"{source}@{self.frame}:{self.length or ''}:{self.strength:g}"

    def span(self, num_frames: int) -> tuple[int, int]:
        """Its first frame, and for how many there is room, in a video of so many frames.

        Raises:
            UserError: if it lies outside, or reaches out of the end.
        """
        start = self.frame + num_frames if self.frame < 0 else self.frame
        if not 0 <= start < num_frames:
            raise UserError(
                f"condition {self}: the video has the frames 0 to {num_frames - 1}, or {-num_frames} to -1 counted "
                "from its end: choose one of them."
            )
        room = num_frames - start
        if self.length is not None and self.length > room:
            raise UserError(
                f"condition {self}: from frame {start} on the video has {room} frames, not {self.length}: begin "
                "earlier, give fewer frames, or ask for a longer video."
            )
        return start, self.length or room


def parse_condition(text: str) -> Condition:
    """Read ``FILE@frame[:length][:strength]``, such as ``end.png@-1`` or ``clip.mp4@0:8:0.5``.

    Raises:
        UserError: if it is not of that form.
    """
    found = SYNTAX.fullmatch(text)
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
    return Condition(found["source"], int(found["frame"]), length, float(strength))


def check_source(path: str) -> None:
    """Raise UserError if no picture or video can be read from a file."""
    if not os.path.isfile(path):  # of a name that is too long, Path raises an error
        raise UserError(f"given frames {path}: there is no such file.")
    _count(Path(path), fps=1)


def settled(condition: Condition, num_frames: int, fps: float) -> Condition:
    """A condition with its length in a video of so many frames, at so many a second.

    Raises:
        UserError: if it lies outside, or its source cannot be read or has fewer frames than its length.
    """
    from torch import Tensor

    _, room = condition.span(num_frames)
    source = condition.source
    if isinstance(source, str | Path):
        has = _count(Path(source), fps)
    else:
        has = source.shape[1] if isinstance(source, Tensor) and source.ndim == 4 else 1
    if has - condition.skip < (condition.length or 1):
        after = f", of which the first {condition.skip} are left out" if condition.skip else ""
        raise UserError(
            f"condition {condition}: its source has {has} frames at {fps:g} a second{after}, not "
            f"{condition.length or 1}: leave the length out to take all."
        )
    return replace(condition, length=condition.length or min(has - condition.skip, room))


def given_frames(condition: Condition, fps: float, height: int, width: int) -> "Tensor":
    """The frames ``[3 T H W]`` in [-1, 1] of a `settled` condition, scaled and centre-cropped.

    Of a file, they are those on screen at that many frames a second.

    Raises:
        UserError: if the source cannot be read.
    """
    from torch import Tensor

    from stdit.data.dataset import to_video
    from stdit.data.decoding.decode import decode_clip, probe
    from stdit.pipelines.images import first_frames, fit, tell_size

    source, skip, length = condition.source, condition.skip, condition.length
    assert length is not None
    if isinstance(source, Tensor) and source.ndim == 4:
        return fit(source[:, skip : skip + length], height, width)
    if not isinstance(source, str | Path):
        return first_frames(source, height, width)
    with _readable():
        info = probe(Path(source))
        tell_size(f"given frames {source}", info.height, info.width, height, width)
        return to_video(decode_clip(Path(source), length, fps, height, width, start=skip / fps)[None])[0]


def _count(path: Path, fps: float) -> int:
    """Frames of a file at so many a second."""
    from stdit.data.decoding.decode import probe

    with _readable():
        info = probe(path)
    return max(1, round(info.num_frames / info.fps * fps)) if info.num_frames > 1 else 1


@contextmanager
def _readable() -> Iterator[None]:
    """A file that is no picture or video, in words for people."""
    from stdit.data.decoding.decode import DecodeError

    try:
        yield
    except DecodeError as error:
        raise UserError(f"given frames {error}: use a whole picture or video.") from None
