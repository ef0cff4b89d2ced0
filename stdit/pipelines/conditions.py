"""Frames that a video is given: which, where in it, and how strictly they are kept.

Letters: T frames, H height, W width in pixels.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SYNTAX = re.compile(r"(?P<source>.+)@(?P<frame>-?\d+)(:(?P<length>\d*))?(:(?P<strength>[\d.]+))?", re.DOTALL)


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


def parse_condition(text: str, folder: Path = Path()) -> Condition:
    """Read ``FILE@frame[:length][:strength]``, such as ``end.png@-1`` or ``clip.mp4@0:8:0.5``.

    Args:
        folder: from which a relative path counts.

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
    return Condition(str(folder / found["source"]), int(found["frame"]), length, float(strength))


def check_source(path: str) -> None:
    """Raise UserError if no picture or video can be read from a file."""
    from stdit.data.decode import DecodeError, probe

    if not Path(path).is_file():
        raise UserError(f"given frames {path}: there is no such file.")
    try:
        probe(Path(path))
    except DecodeError as error:
        raise UserError(f"given frames {error}: use a whole picture or video.") from None


def given_frames(condition: Condition, room: int, fps: float, height: int, width: int) -> "Tensor":
    """The frames ``[3 T H W]`` in [-1, 1] of a condition, scaled and centre-cropped; T at most ``room``.

    Of a file, they are those on screen at that many frames per second.

    Raises:
        UserError: if the source cannot be read, or has fewer frames than the condition's length.
    """
    from torch import Tensor

    from stdit.pipelines.images import first_frames, fit

    source = condition.source
    if isinstance(source, str | Path):
        frames = _read(Path(source), room, fps, height, width)
    elif isinstance(source, Tensor) and source.ndim == 4:
        frames = fit(source, height, width)[:, :room]
    else:
        frames = first_frames(source, height, width)
    if condition.length is not None and frames.shape[1] < condition.length:
        raise UserError(
            f"condition {condition}: {source if isinstance(source, str | Path) else 'the source'} has "
            f"{frames.shape[1]} frames at {fps:g} a second, not {condition.length}: leave the length out to take all."
        )
    return frames


def _read(path: Path, room: int, fps: float, height: int, width: int) -> "Tensor":
    from stdit.data.dataset import to_video
    from stdit.data.decode import DecodeError, decode_clip, probe
    from stdit.pipelines.images import tell_size

    try:
        info = probe(path)
        tell_size(f"given frames {path}", info.height, info.width, height, width)
        count = max(1, round(info.num_frames / info.fps * fps)) if info.num_frames > 1 else 1
        return to_video(decode_clip(path, min(count, room), fps, height, width)[None])[0]
    except DecodeError as error:
        raise UserError(f"given frames {error}: use a whole picture or video.") from None
