"""Open-Sora's ``mask_strategy``: given frames as a string of numbers, which count in latent frames.

Imports nothing heavy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stdit.errors import UserError
from stdit.pipelines.conditions import Condition
from stdit.pipelines.segments import Parts

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec

DEFAULTS = (0, 0, 0, 0, 1, 0.0)
"""Part, reference, start in the reference, start, length, edit ratio: what an entry leaves out at its end."""


@dataclass(frozen=True)
class MaskEntry:
    """One given stretch."""

    part: int
    source: str
    source_start: int
    target_start: int
    length: int
    edit_ratio: float


def parse_mask_strategy(text: str, references: Sequence[str]) -> list[MaskEntry]:
    """Read entries ``part,reference,start in it,start,length,edit ratio``, with ``;`` between them.

    What an entry leaves out at its end is as in `DEFAULTS`.

    Raises:
        UserError: for an entry of another form, or one without its reference.
    """
    return [_parse(entry.strip(), references) for entry in text.split(";") if entry.strip()]


def _parse(entry: str, references: Sequence[str]) -> MaskEntry:
    fields = entry.split(",")
    try:
        numbers = [float(field) for field in fields] + list(DEFAULTS[len(fields) :])
        *places, ratio = numbers
        part, reference, source_start, start, length = map(int, places)
    except (ValueError, OverflowError):  # of inf
        raise UserError(
            f"mask_strategy {entry!r}: must be up to six numbers: part, reference, start in the reference, "
            "start, length (all in latent frames), edit ratio; such as 0,0,0,0,1,0."
        ) from None
    if not 0 <= reference < len(references):
        raise UserError(
            f"mask_strategy {entry!r} names reference {reference}, but reference_path has {len(references)}: "
            "list them there, with ; between them."
        )
    if part < 0 or source_start < 0 or length < 1 or not 0 <= ratio <= 1:
        raise UserError(
            f"mask_strategy {entry!r}: part and start in the reference must be at least 0, the length at "
            "least 1, and the edit ratio from 0 to 1."
        )
    return MaskEntry(part, references[reference], source_start, start, length, ratio)


def translate_masks(
    entries: Iterable[MaskEntry], codec: "VideoCodec", parts: Parts, num_frames: int
) -> list[Condition]:
    """Open-Sora's entries as conditions on frames of the whole video.

    Raises:
        UserError: for a part that there is not.
    """
    latent_frames = codec.latent_shape(num_frames, 1, 1)[0]
    conditions = []
    for entry in entries:
        if entry.part >= parts.count:
            raise UserError(
                f"mask_strategy names part {entry.part}, but the video has {parts.count}, from 0: raise parts."
            )
        if entry.edit_ratio == 1:
            continue  # made like any other frame
        start = entry.target_start + (latent_frames if entry.target_start < 0 else 0)
        if not 0 <= start < latent_frames:
            raise UserError(
                f"mask_strategy has the start {entry.target_start}, but a part has {latent_frames} latent frames."
            )
        latents = min(entry.length, latent_frames - start)
        begin, end = (codec.start_frame(index, num_frames) for index in (start, start + latents))
        end = min(end, num_frames)
        skip = codec.start_frame(entry.source_start)
        length = min(codec.start_frame(entry.source_start + latents) - skip, end - begin)
        frame = parts.starts(num_frames)[entry.part] + end - length  # a last frame ends its latent frame
        conditions.append(Condition(entry.source, frame, length, 1 - entry.edit_ratio, skip))
    return conditions
