"""Videos that are longer than one call makes: part after part, each beginning with the last frames of the one before.

Imports nothing heavy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.errors import UserError
from stdit.pipelines.conditions import Condition

if TYPE_CHECKING:
    from torch import Tensor

    from stdit.codecs.base import VideoCodec


@dataclass(frozen=True)
class Parts:
    """How a video is put together."""

    count: int = 1
    """Parts."""
    overlap: int | None = None
    """Frames that a part is given from the one before; None: a quarter of a part (see `fitted`)."""
    close: bool = False
    """The last part leads back to the first frame, so that the video can be played in a loop."""

    def check(self, where: str, prompts: int) -> None:
        """Raise UserError, naming value, rule and way out, for settings that do not go together."""
        if self.count < prompts:
            raise UserError(
                f"{where}parts = {self.count}: must be at least {prompts}, the number of prompts with those of then."
            )
        if self.count > MAX_DIMENSION:
            raise UserError(f"{where}parts = {self.count}: must be at most {MAX_DIMENSION}.")
        if self.overlap is not None and self.overlap < 1:
            raise UserError(f"{where}overlap = {self.overlap}: must be at least 1 frame.")
        if self.close and self.count < 2:
            raise UserError(f"{where}close needs a second part that leads back: add parts = 2.")

    @property
    def is_fitted(self) -> bool:
        """Whether its length is known without the codec."""
        return self.count == 1 or self.overlap is not None

    def fitted(self, num_frames: int, codec: "VideoCodec") -> "Parts":
        """With an overlap: where there was none, as many whole latent frames as there are in a quarter of a part."""
        if self.overlap is not None:
            return self
        quarter = max(1, num_frames // 4)
        return replace(self, overlap=codec.start_frame(codec.latent_index(quarter)) or quarter)

    def shared(self, num_frames: int) -> int:
        """Frames that two parts of so many frames share. Raises UserError if that leaves a part none of its own."""
        shared = max(1, num_frames // 4) if self.overlap is None else self.overlap
        taken = shared * (2 if self.close else 1)
        if self.count > 1 and taken >= num_frames:
            raise UserError(
                f"overlap = {shared}: a part of num_frames = {num_frames} would be given {taken} frames, and have "
                "none to make: lower the overlap, or raise num_frames."
            )
        return shared

    def starts(self, num_frames: int) -> list[int]:
        """Where each part begins in the whole video."""
        return [part * (num_frames - self.shared(num_frames)) for part in range(self.count)]

    def total(self, num_frames: int) -> int:
        """Frames of the whole video."""
        back = self.shared(num_frames) if self.close else 0
        return self.starts(num_frames)[-1] + num_frames - back

    def conditions(self, part: int, conditions: Iterable[Condition], num_frames: int) -> list[Condition]:
        """Those that lie in a part, as the part counts its frames.

        Args:
            conditions: in the whole video, with their lengths (see `settled`).

        Raises:
            UserError: if one lies outside of the video.
        """
        begin, found = self.starts(num_frames)[part], []
        for condition in conditions:
            start, length = condition.span(self.total(num_frames))
            low, high = max(start, begin), min(start + length, begin + num_frames)
            if low < high:
                skip = condition.skip + low - start
                found.append(replace(condition, frame=low - begin, length=high - low, skip=skip))
        return found

    def check_free(self, conditions: Sequence[Condition], num_frames: int, where: str = "") -> None:
        """Raise UserError if all frames of a part are given: by `settled` conditions, or by its neighbours."""
        shared = self.shared(num_frames)
        for part in range(self.count):
            own = self.conditions(part, conditions, num_frames)
            kept = [condition.span(num_frames) for condition in own if condition.strength == 1]
            kept += [(0, shared)] if part else []
            kept += [(num_frames - shared, shared)] if self.close and part == self.count - 1 else []
            if len({frame for start, count in kept for frame in range(start, start + count)}) == num_frames:
                of_part = f" of part {part + 1}" if self.count > 1 else ""
                raise UserError(
                    f"{where}all {num_frames} frames{of_part} are given, which leaves nothing to make: give fewer, "
                    "or ask for more frames."
                )


def make_in_parts(
    make: Callable[[int, list[list[Condition]]], "Tensor"],
    parts: Parts,
    conditions: Sequence[Sequence[Condition]],
    num_frames: int,
) -> "Tensor":
    """Whole videos ``[B T 3 H W]`` in [0, 1] from those of their parts.

    Args:
        make: from the number of a part and the given frames of each video to that part of all videos.
        conditions: of each whole video, with their lengths (see `settled`).
        num_frames: of a part.

    Raises:
        UserError: if a condition lies outside, or the overlap leaves nothing to make.
    """
    import torch

    def given(frames: "Tensor", place: int) -> Condition:
        return Condition(frames.transpose(0, 1) * 2 - 1, place, len(frames))

    shared = parts.shared(num_frames)
    made: list[Tensor] = []
    for part in range(parts.count):
        own = [parts.conditions(part, some, num_frames) for some in conditions]
        for index, some in enumerate(own):
            if part:
                some.append(given(made[-1][index, -shared:], 0))
            if parts.close and part == parts.count - 1:
                some.append(given(made[0][index, :shared], -shared))
        made.append(make(part, own))
    whole = torch.cat([made[0], *(frames[:, shared:] for frames in made[1:])], 1)
    return whole[:, : parts.total(num_frames)]
