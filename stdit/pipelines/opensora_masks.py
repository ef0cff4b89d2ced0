"""Open-Sora's ``mask_strategy``: conditioning frames as a string of numbers, counted in latent frames.

Imports no torch at module level.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.segments import Segments

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec

_ENTRY_DEFAULTS = (0, 0, 0, 0, 1, 0.0)
"""Segment, reference, start in the reference, start, length, edit ratio: used for what an entry omits at its end."""


@dataclass(frozen=True)
class MaskEntry:
    """One entry of a mask strategy: a run of conditioning frames; starts and length are in latent frames."""

    segment: int
    source: str
    source_start: int
    target_start: int
    length: int
    edit_ratio: float


def parse_mask_strategy(text: str, references: Sequence[str]) -> list[MaskEntry]:
    """Parse entries ``segment,reference,start in the reference,start,length,edit ratio`` separated by ``;``.

    Numbers that an entry omits at its end take the defaults 0,0,0,0,1,0.

    Args:
        references: paths, which the second number of an entry indexes.

    Raises:
        UserError: for an entry of another form, or one without its reference.
    """
    return [_parse_entry(entry.strip(), references) for entry in text.split(";") if entry.strip()]


def _parse_entry(entry: str, references: Sequence[str]) -> MaskEntry:
    fields = entry.split(",")
    try:
        numbers = [float(field) for field in fields] + list(_ENTRY_DEFAULTS[len(fields) :])
        *places, ratio = numbers
        segment, reference, source_start, start, length = map(int, places)
    except (ValueError, OverflowError):  # OverflowError: int(inf)
        raise UserError(
            f"mask_strategy {entry!r}: must be up to six numbers: segment, reference, start in the reference, "
            "start, length (all in latent frames), edit ratio; such as 0,0,0,0,1,0."
        ) from None
    if not 0 <= reference < len(references):
        raise UserError(
            f"mask_strategy {entry!r} names reference {reference}, but reference_path has {len(references)}: "
            "list them there, separated by ;."
        )
    if segment < 0 or source_start < 0 or length < 1 or not 0 <= ratio <= 1:
        raise UserError(
            f"mask_strategy {entry!r}: segment and start in the reference must be at least 0, the length at "
            "least 1, and the edit ratio from 0 to 1."
        )
    return MaskEntry(segment, references[reference], source_start, start, length, ratio)


def mask_entries_to_conditions(
    entries: Iterable[MaskEntry], codec: "VideoCodec", segments: Segments, num_frames: int
) -> list[FrameCondition]:
    """Convert entries, which count latent frames of a segment, to conditions on frames of the whole video.

    Raises:
        UserError: for a segment or a latent frame that the video does not have.
    """
    latent_frames = codec.latent_shape(num_frames, 1, 1)[0]
    conditions = []
    for entry in entries:
        if entry.segment >= segments.count:
            raise UserError(
                f"mask_strategy names segment {entry.segment}, but the video has {segments.count}, from 0: raise "
                "segments."
            )
        if entry.edit_ratio == 1:
            continue  # regenerated from pure noise, like any other frame
        start = entry.target_start + (latent_frames if entry.target_start < 0 else 0)
        if not 0 <= start < latent_frames:
            raise UserError(
                f"mask_strategy has the start {entry.target_start}, but a segment has {latent_frames} latent "
                "frames: choose one of them."
            )
        latents = min(entry.length, latent_frames - start)
        begin, end = (codec.start_frame(index, num_frames) for index in (start, start + latents))
        end = min(end, num_frames)
        skip = codec.start_frame(entry.source_start)
        length = min(codec.start_frame(entry.source_start + latents) - skip, end - begin)
        # A clip that is shorter than its latent frames stands at their end.
        index = segments.starts(num_frames)[entry.segment] + end - length
        conditions.append(FrameCondition(entry.source, index, length, 1 - entry.edit_ratio, skip))
    return conditions
