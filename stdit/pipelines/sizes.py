"""Named sizes and lengths (240p, 16:9, 2s) in pixels and frames, for a checkpoint."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stdit.data.config import ASPECT_RATIOS, LENGTHS, RESOLUTIONS, resolve_size
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.loading import find_checkpoint_source, load_codec, model_settings

if TYPE_CHECKING:
    from stdit.codecs.base import VideoCodec


def size_multiple(codec: "VideoCodec", patch_size: Sequence[int]) -> int:
    """Return the number of pixels of which height and width of a named size are multiples.

    It is the codec's own, or else the smallest even one that codec and patch size divide (h264 needs even sizes).
    """
    return codec.size_multiple or math.lcm(
        2, codec.stride[1] * patch_size[1], codec.stride[2] * patch_size[2]
    )


def list_sizes(config: SampleConfig) -> str:
    """Return a table of the named sizes and lengths for a checkpoint, without loading its model."""
    source = find_checkpoint_source(config.checkpoint, config.ema)
    codec = load_codec(source)
    multiple = size_multiple(codec, model_settings(source)["patch_size"])
    lines = [f"width x height in pixels, multiples of {multiple}, by --resolution and --aspect_ratio:"]
    lines.append("".join(f"{ratio:>11}" for ratio in ("", *ASPECT_RATIOS)))
    for resolution in RESOLUTIONS:
        sizes = [resolve_size(resolution, ratio, multiple) for ratio in ASPECT_RATIOS]
        cells = [resolution, *(f"{width}x{height}" for height, width in sizes)]
        lines.append("".join(f"{cell:>11}" for cell in cells))
    lines.append("lengths, by --num_frames:")
    for name, frames in LENGTHS.items():
        latent_frames = codec.latent_shape(frames, multiple, multiple)[0]
        lines.append(f"{name:>11}{frames:>5} frames ({latent_frames} in latents)")
    return "\n".join(lines)
