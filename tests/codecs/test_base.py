"""`encode_span`: frames at their place in a longer video, with a codec that keeps one frame per latent frame."""

import pytest
import torch
from torch import Tensor

from stdit.codecs.base import VideoCodec


class LastOfFour(VideoCodec):
    """A codec that keeps the last of the frames of each latent frame."""

    name, stride, channels = "last", (4, 1, 1), 3

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal_first_frame = causal

    def _encode(self, video: Tensor) -> Tensor:
        return video[:, :, (0 if self.causal_first_frame else 3) :: 4]


@pytest.mark.parametrize(
    "causal, start, count, first, kept",
    [
        (False, 4, 8, 1, [3, 7]),
        (False, 2, 4, 0, [1, 3]),
        (False, 15, 1, 3, [0]),
        (True, 0, 9, 0, [0, 4, 8]),
        (True, 5, 8, 2, [3, 7]),
        (True, 6, 5, 2, [2, 4]),
        (True, 0, 3, 0, [0, 2]),
        (True, 16, 1, 4, [0]),
    ],
)
def test_encode_span_returns_the_latent_frames_inside_the_video(
    causal: bool, start: int, count: int, first: int, kept: list[int]
) -> None:
    video = torch.arange(count).float().view(1, 1, count, 1, 1).expand(1, 3, count, 2, 2) / 10
    found_first, found = LastOfFour(causal).encode_span(video, start, 17 if causal else 16)
    assert found_first == first
    assert torch.equal(found, video[:, :, kept])
