"""Views of a clip: which of its seconds, which part of its pictures, mirrored or not."""

import re
from typing import NamedTuple

from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.manifest.clips import Clip
from stdit.data.plan import slack_seconds

# Martin Roberts, The Unreasonable Effectiveness of Quasirandom Sequences, 2018: frac(1/2 + n a) in three dimensions,
# with a = (1/g, 1/g^2, 1/g^3) and g^4 = g + 1. The first point is the middle, and every further one lies far from
# those before it.
_G = 1.2207440846057596
STEPS = (_G**-1, _G**-2, _G**-3)

SIDES = (
    "left right lefts rights leftward leftwards rightward rightwards lefthand righthand sideways clockwise "
    "counterclockwise anticlockwise east eastward eastwards eastern west westward westwards western"
)
WRITING = (
    "text texts word words letter letters letterhead lettering writing writes written reads reading says saying "
    "sign signs signage signboard billboard logo logos title titles subtitle subtitles caption captions label "
    "labels labeled labelled number numbers numeral numerals digit digits handwriting inscription inscribed "
    "typography font newspaper keyboard clock license alphabet slogan banner"
)
UNMIRRORED = re.compile(rf"\b({'|'.join(f'{SIDES} {WRITING}'.split())})\b|[\"“”«»„]", re.IGNORECASE)


class AugmentedView(NamedTuple):
    """What is taken from a clip."""

    start: float
    """Seconds after the first frame of the file."""
    down: float = 0.5
    """Where the part lies in what is cut off, from the top, 0, to the bottom, 1."""
    across: float = 0.5
    """The same, from left to right."""
    mirrored: bool = False
    """Left and right changed for each other."""


def may_mirror(caption: str) -> bool:
    """Whether a caption is as true of the mirrored video.

    Not if it has a word for a side (left, right, clockwise, east, ...) or for writing (text, sign, says, logo, ...),
    or anything in double quotes. The words are English.
    """
    return UNMIRRORED.search(caption) is None


def count_augmented_views(config: DataConfig, caption: str) -> int:
    """How many views of a clip the cache keeps: `augmented_views` windows and crops, and their mirror images."""
    return config.augmented_views * (2 if config.flip and may_mirror(caption) else 1)


def augmented_view(config: DataConfig, number: int, clip: Clip, bucket: Bucket) -> AugmentedView:
    """One of the views of a clip that the cache keeps; the first is the middle.

    Args:
        number: from 0 to `count_augmented_views` - 1.
    """
    mirrored, place = divmod(number, config.augmented_views)
    when, down, across = ((0.5 + place * step) % 1 for step in STEPS)
    excess = clip.width * bucket.height - clip.height * bucket.width  # what is cut off lies on one axis alone
    if config.crop == "center" or excess >= 0:
        down = 0.5
    if config.crop == "center" or excess <= 0:
        across = 0.5
    return AugmentedView(clip.start + when * slack_seconds(clip, bucket), down, across, bool(mirrored))
