"""Clips as tensors: the frames of a view, and their conversion to what codecs encode.

Letters: B samples, T frames, H height, W width.
"""

import torch
from torch import Tensor

from stdit.data.buckets import Bucket
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.clips import Clip
from stdit.data.views import AugmentedView, augmented_view


def middle_window(clip: Clip, bucket: Bucket) -> Tensor:
    """Decode the bucket's window from the middle of a clip, uint8 [T 3 H W]. Raises DecodeError."""
    return read_view(clip, bucket, augmented_view(DataConfig(), 0, clip, bucket))


def read_view(clip: Clip, bucket: Bucket, view: AugmentedView) -> Tensor:
    """Decode the frames of a view, uint8 [T 3 H W]. Raises DecodeError."""
    frames = decode_clip(
        clip.media,
        bucket.num_frames,
        bucket.fps,
        bucket.height,
        bucket.width,
        start=view.start,
        crop=(view.down, view.across),
        field_order=clip.field_order,
    )
    return frames.flip(-1) if view.mirrored else frames


def to_video(frames: Tensor) -> Tensor:
    """Convert uint8 [B T 3 H W] to float32 [B 3 T H W] in [-1, 1], on the same device.

    The result lies in page-locked memory if the frames do.
    """
    if frames.device.type != "cpu":
        return frames.transpose(1, 2).float().div_(127.5).sub_(1)
    video = torch.empty(frames.shape, dtype=torch.float32, pin_memory=frames.is_pinned())
    values = video.numpy()  # in this thread: torch's threads would wait for those of the workers
    values[...] = frames.numpy()
    values /= 127.5
    values -= 1
    return video.transpose(1, 2)
