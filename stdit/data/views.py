"""Augmented views of a clip: a temporal window, a crop, and whether it is mirrored."""

import re
from typing import NamedTuple

from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.manifest.clips import Clip
from stdit.data.plan import slack_seconds

# Martin Roberts, The Unreasonable Effectiveness of Quasirandom Sequences, 2018: frac(1/2 + n a) in three dimensions,
# with a = (1/g, 1/g^2, 1/g^3) and g^4 = g + 1. The first point is the middle; any first n points are well spread.
_G = 1.2207440846057596
_STEPS = (_G**-1, _G**-2, _G**-3)

_SIDES = (
    "left right lefts rights leftward leftwards rightward rightwards lefthand righthand sideways clockwise "
    "counterclockwise anticlockwise east eastward eastwards eastern west westward westwards western"
)
_WRITING = (
    "text texts word words letter letters letterhead lettering writing writes written reads reading says saying "
    "sign signs signage signboard billboard logo logos title titles subtitle subtitles caption captions label "
    "labels labeled labelled number numbers numeral numerals digit digits handwriting inscription inscribed "
    "typography font newspaper keyboard clock license alphabet slogan banner"
)
_UNMIRRORED = re.compile(rf"\b({'|'.join(f'{_SIDES} {_WRITING}'.split())})\b|[\"“”«»„]", re.IGNORECASE)


class AugmentedView(NamedTuple):
    """What is read from a clip: where its window begins, where it is cropped, and whether it is mirrored."""

    start: float
    """Seconds after the first frame of the file."""
    down: float = 0.5
    """Vertical place of the crop: 0 at the top, 1 at the bottom."""
    across: float = 0.5
    """Horizontal place of the crop: 0 at the left, 1 at the right."""
    mirrored: bool = False
    """Flipped left to right."""


def may_mirror(caption: str) -> bool:
    """Whether a caption also describes the mirrored video.

    False if it has an English word for a side (left, right, clockwise, east, ...) or for writing (text, sign, says,
    logo, ...), or double quotes.
    """
    return _UNMIRRORED.search(caption) is None


def count_augmented_views(config: DataConfig, caption: str) -> int:
    """Return how many views of a clip the cache keeps: `augmented_views`, doubled if it may be mirrored."""
    return config.augmented_views * (2 if config.flip and may_mirror(caption) else 1)


def augmented_view(config: DataConfig, number: int, clip: Clip, bucket: Bucket) -> AugmentedView:
    """Return view `number` of a clip that the cache keeps; view 0 is the middle.

    Args:
        number: from 0 to `count_augmented_views` - 1.
    """
    mirrored, place = divmod(number, config.augmented_views)
    when, down, across = ((0.5 + place * step) % 1 for step in _STEPS)
    excess = clip.width * bucket.height - clip.height * bucket.width  # only one axis is cropped
    if config.crop == "center" or excess >= 0:
        down = 0.5
    if config.crop == "center" or excess <= 0:
        across = 0.5
    return AugmentedView(clip.start + when * slack_seconds(clip, bucket), down, across, bool(mirrored))
