"""Videos longer than one pipeline call: segments, each of which begins with the last frames of the previous one.

Imports no torch at module level.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition

if TYPE_CHECKING:
    from torch import Tensor

    from stdit.codecs.base import VideoCodec


@dataclass(frozen=True)
class Segments:
    """How a video is divided into segments of ``num_frames`` frames."""

    count: int = 1
    """Number of segments."""
    overlap: int | None = None
    """Frames that a segment shares with the previous one; None: about a quarter of it (see `resolved`)."""
    loop: bool = False
    """The last segment ends with the first frames of the first, so that the video loops."""

    def check(self, where: str, prompts: int) -> None:
        """Raise UserError for settings that contradict each other or the number of prompts."""
        if self.count < prompts:
            raise UserError(
                f"{where}segments = {self.count}: must be at least {prompts}, the number of prompts with "
                "segment_prompts."
            )
        if self.count > MAX_DIMENSION:
            raise UserError(f"{where}segments = {self.count}: must be at most {MAX_DIMENSION}.")
        if self.overlap is not None and self.overlap < 1:
            raise UserError(f"{where}overlap = {self.overlap}: must be at least 1 frame.")
        if self.overlap is not None and self.count < 2:
            raise UserError(
                f"{where}overlap = {self.overlap} is shared by two segments: add segments = 2, or segment_prompts."
            )
        if self.loop and self.count < 2:
            raise UserError(f"{where}loop needs a second segment that leads back: add segments = 2.")

    @property
    def has_known_length(self) -> bool:
        """Whether the length of the whole video is known without the codec."""
        return self.count == 1 or self.overlap is not None

    def resolved(self, num_frames: int, codec: "VideoCodec") -> "Segments":
        """Return these segments with an overlap: by default the whole latent frames in a quarter of a segment."""
        if self.overlap is not None:
            return self
        quarter = max(1, num_frames // 4)
        return replace(self, overlap=codec.start_frame(codec.latent_index(quarter)) or quarter)

    def shared_frames(self, num_frames: int) -> int:
        """Return how many frames two segments share.

        Raises:
            UserError: if no frame of a segment is left to generate.
        """
        shared = max(1, num_frames // 4) if self.overlap is None else self.overlap
        conditioning = shared * (2 if self.loop else 1)
        if self.count > 1 and conditioning >= num_frames:
            quarter = max(1, num_frames // 4)
            way_out = (
                f"leave the overlap out (it is then about {quarter})" if quarter < shared else "lower it"
            )
            raise UserError(
                f"overlap = {shared}: a segment of num_frames = {num_frames} would have {conditioning} conditioning "
                f"frames{' with loop' if self.loop else ''}, and none to generate: {way_out}, or raise num_frames."
            )
        return shared

    def check_latents_left(self, num_frames: int, codec: "VideoCodec", where: str = "") -> None:
        """Raise UserError if the frames that segments share leave no latent frame of one to generate."""
        shared = self.resolved(num_frames, codec).overlap
        assert shared is not None
        if self.count == 1 or self._latents_left(shared, num_frames, codec):
            return
        fewer = range(min(shared, num_frames), 0, -1)
        largest = next((one for one in fewer if self._latents_left(one, num_frames, codec)), None)
        total = codec.latent_index(num_frames - 1, num_frames) + 1
        latents = f"{total} latent {'frame' if total == 1 else 'frames'}"
        loop = " with loop" if self.loop else ""
        raise UserError(
            f"{where}overlap = {shared}{loop}: a segment of num_frames = {num_frames} is {latents}, and conditioning "
            "frames take part in all of them, which leaves none to generate: "
            + ("" if largest is None else f"use overlap {largest} or less, or ")
            + "raise num_frames."
        )

    def _latents_left(self, shared: int, num_frames: int, codec: "VideoCodec") -> bool:
        """Return whether an overlap leaves a latent frame that is wholly generated."""
        taken = [*range(shared), *(range(num_frames - shared, num_frames) if self.loop else ())]
        latents = {codec.latent_index(frame, num_frames) for frame in range(num_frames)}
        return bool(latents - {codec.latent_index(frame, num_frames) for frame in taken})

    def starts(self, num_frames: int) -> list[int]:
        """Return the first frame of each segment, counted in the whole video."""
        return [segment * (num_frames - self.shared_frames(num_frames)) for segment in range(self.count)]

    def total_frames(self, num_frames: int) -> int:
        """Return the number of frames of the whole video."""
        back = self.shared_frames(num_frames) if self.loop else 0
        return self.starts(num_frames)[-1] + num_frames - back

    def conditions_of(
        self, segment: int, conditions: Iterable[FrameCondition], num_frames: int
    ) -> list[FrameCondition]:
        """Return the conditions that lie in a segment, cut to it and with frame indices counted in it.

        Args:
            conditions: of the whole video, resolved (see `FrameCondition.resolved`).

        Raises:
            UserError: if a condition lies outside the video.
        """
        begin, found = self.starts(num_frames)[segment], []
        for condition in conditions:
            start, length = condition.span(self.total_frames(num_frames))
            low, high = max(start, begin), min(start + length, begin + num_frames)
            if low < high:
                skip = condition.skip + low - start
                found.append(replace(condition, frame_index=low - begin, length=high - low, skip=skip))
        return found

    def check_frames_left(
        self, conditions: Sequence[FrameCondition], num_frames: int, where: str = ""
    ) -> None:
        """Raise UserError if resolved conditions and shared frames leave a segment no frame to generate."""
        shared = self.shared_frames(num_frames)
        for segment in range(self.count):
            own = self.conditions_of(segment, conditions, num_frames)
            kept = [condition.span(num_frames) for condition in own if condition.strength == 1]
            kept += [(0, shared)] if segment else []
            kept += [(num_frames - shared, shared)] if self.loop and segment == self.count - 1 else []
            if len({frame for start, count in kept for frame in range(start, start + count)}) == num_frames:
                of_segment = f" of segment {segment + 1}" if self.count > 1 else ""
                raise UserError(
                    f"{where}all {num_frames} frames{of_segment} are conditioning frames, which leaves nothing to "
                    "generate: condition on fewer, or ask for more frames."
                )


def generate_segments(
    generate: Callable[[int, list[list[FrameCondition]]], "Tensor"],
    segments: Segments,
    conditions: Sequence[Sequence[FrameCondition]],
    num_frames: int,
) -> "Tensor":
    """Generate the segments one after another and return the whole videos ``[B T 3 H W]`` in [0, 1].

    Args:
        generate: maps the index of a segment and the conditions of each video to that segment of all videos,
            ``[B num_frames 3 H W]``.
        conditions: of each whole video, resolved (see `FrameCondition.resolved`).
        num_frames: length of a segment.

    Raises:
        UserError: if a condition lies outside the video, or the overlap leaves nothing to generate.
    """
    import torch

    def condition_on(frames: "Tensor", frame_index: int) -> FrameCondition:
        return FrameCondition(frames.transpose(0, 1) * 2 - 1, frame_index, len(frames))

    shared = segments.shared_frames(num_frames)
    done: list[Tensor] = []
    for segment in range(segments.count):
        own = [segments.conditions_of(segment, of_video, num_frames) for of_video in conditions]
        for index, of_video in enumerate(own):
            if segment:
                of_video.append(condition_on(done[-1][index, -shared:], 0))
            if segments.loop and segment == segments.count - 1:
                of_video.append(condition_on(done[0][index, :shared], -shared))
        done.append(generate(segment, own))
    whole = torch.cat([done[0], *(frames[:, shared:] for frames in done[1:])], 1)
    return whole[:, : segments.total_frames(num_frames)]
