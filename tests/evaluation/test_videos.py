"""Conditioning frames of videos that are scored."""

import pytest

from stdit.codecs.base import VideoCodec
from stdit.codecs.pixel import PixelCodec
from stdit.codecs.tiny import TinyCodec
from stdit.errors import UserError
from stdit.evaluation.videos import conditioned_frames


@pytest.mark.parametrize(
    ("codec", "num_frames", "frames_per_end", "frames"),
    [
        (TinyCodec(4, (16, 16, 16)), 25, None, [slice(0, 5), slice(-4, None)]),
        (TinyCodec(4, (16, 16, 16)), 16, None, [slice(0, 5), slice(-7, None)]),
        (PixelCodec(), 16, None, [slice(0, 4), slice(-4, None)]),
        (TinyCodec(4, (16, 16, 16)), 25, 1, [slice(0, 1), slice(-1, None)]),
    ],
)
def test_conditioning_frames_are_whole_latent_frames(
    codec: VideoCodec, num_frames: int, frames_per_end: int | None, frames: list[slice]
) -> None:
    assert conditioned_frames(codec, num_frames, ["first", "last", "first"], frames_per_end) == frames


def test_conditioning_frames_leave_some_to_generate() -> None:
    with pytest.raises(UserError, match="num_frames = 9: must be larger than the 9 conditioning frames"):
        conditioned_frames(TinyCodec(4, (16, 16, 16)), 9, ["first", "last"], None)
