"""Named sizes and lengths (240p, 16:9, 2s) in pixels and frames, for a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stdit.data.config import ASPECT_RATIOS, LENGTHS, RESOLUTIONS, resolve_size
from stdit.pipelines.config import PIPELINE_DEFAULTS, SampleConfig
from stdit.pipelines.loading import load_codec, model_settings, pipeline_settings
from stdit.pipelines.sources import find_checkpoint_source

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
    """Return a table of the named sizes and lengths for a checkpoint, without loading its model.

    Sizes and lengths that it was trained on are marked and listed, where its pipeline records them.
    """
    source = find_checkpoint_source(config.checkpoint, config.ema)
    recorded = {**PIPELINE_DEFAULTS, **pipeline_settings(source)}
    fps = float(recorded["fps"] if config.fps is None else config.fps)
    trained: list[dict[str, Any]] = recorded.get("trained_sizes") or []
    codec = load_codec(source)
    multiple = size_multiple(codec, model_settings(source)["patch_size"])
    note = ("; *: trained on" if len(trained) else "") + ":"
    return "\n".join(
        [
            f"width x height in pixels, multiples of {multiple}, by --resolution and --aspect_ratio{note}",
            *_size_rows(multiple, {(one["height"], one["width"]) for one in trained}),
            f"lengths at {fps:g} frames per second, by --num_frames{note}",
            *_length_rows(codec, multiple, fps, {one["num_frames"] for one in trained}),
            *_trained_rows(trained),
        ]
    )


def _size_rows(multiple: int, trained: set[tuple[int, int]]) -> list[str]:
    rows = ["".join(f"{ratio:>11}" for ratio in ("", *ASPECT_RATIOS))]
    for resolution in RESOLUTIONS:
        sizes = [resolve_size(resolution, ratio, multiple) for ratio in ASPECT_RATIOS]
        cells = [f"{width}x{height}{'*' * ((height, width) in trained)}" for height, width in sizes]
        rows.append("".join(f"{cell:>11}" for cell in (resolution, *cells)))
    return rows


def _length_rows(codec: "VideoCodec", multiple: int, fps: float, trained: set[int]) -> list[str]:
    rows = []
    for frames in sorted({*LENGTHS.values(), *trained}):
        lasts = "image" if frames == 1 else _seconds(frames, fps)
        latent_frames = codec.latent_shape(frames, multiple, multiple)[0]
        mark = "*" * (frames in trained)
        rows.append(f"{frames:>11}{mark:1}{lasts:>9}  ({latent_frames} in latents)")
    return rows


def _trained_rows(trained: Sequence[Mapping[str, Any]]) -> list[str]:
    if not trained:
        return ["trained on: not recorded"]
    rows = ["trained on:"]
    for one in trained:
        size, frames, fps = f"{one['width']}x{one['height']}", one["num_frames"], float(one["fps"])
        length = "images" if frames == 1 else f"{frames} frames at {fps:g} fps ({_seconds(frames, fps)})"
        rows.append(f"{size:>11}, {length}, {one['clips']} clip{'' if one['clips'] == 1 else 's'}")
    return rows


def _seconds(frames: int, fps: float) -> str:
    return f"{round(frames / fps, 2):g} s"
