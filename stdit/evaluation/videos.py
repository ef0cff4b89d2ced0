"""Videos to score: those that a model samples, and clips that a codec encodes and decodes.

The frames are those that an .mp4 shows.

Letters: B batch, T frames, H height, W width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stdit.codecs.base import VideoCodec
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.prompt_files import Expected, render_prompt
from stdit.data.shapes.worlds import World
from stdit.errors import UserError
from stdit.evaluation.folder import ToScore, read_mp4
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.video_io import to_uint8, write_mp4

LEAST_CONDITIONING_FRAMES = 4
"""By default, rounded up to whole latent frames; enough to show a motion."""


def sampled_videos(
    pipe: STDiTPipeline,
    expected: Sequence[Expected],
    world: World,
    *,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
    conditioned: Sequence[slice] = (),
) -> Iterator[ToScore]:
    """Sample a video of every prompt. The source is its seed: prompt i has ``seed`` + i.

    Args:
        settings: of the pipeline's calls, with num_frames and height; frames are square.
        conditioned: frames that are those of a clip rendered from the prompt, see `conditioned_frames`. The prompt
            is yielded with "conditioning_error": the mean difference of these frames in levels of 255.
    """
    progress = tqdm(total=len(expected), desc="sampling", unit="video", disable=None)
    for start in range(0, len(expected), batch_size):
        rows = expected[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(rows))
        clips = [
            _render(row, of_prompt, world, settings) if conditioned else None
            for row, of_prompt in zip(rows, seeds, strict=True)
        ]
        videos = pipe(
            prompt=[row["prompt"] for row in rows],
            generator=[torch.Generator().manual_seed(of_prompt) for of_prompt in seeds],
            conditions=[
                [FrameCondition(_to_tensor(clip[kept]), kept.start) for kept in conditioned]
                for clip in clips
                if clip is not None
            ],
            output_type="np",
            **settings,
        ).frames  # [B T H W 3]
        for row, of_prompt, clip, video in zip(rows, seeds, clips, videos, strict=True):
            frames = to_uint8(np.asarray(video))
            if clip is not None:
                errors = [np.abs(frames[kept].astype(int) - clip[kept]).mean() for kept in conditioned]
                row = {**row, "conditioning_error": float(max(errors))}
            yield row, f"seed {of_prompt}", as_mp4(frames, world.fps)
        progress.update(len(rows))
    progress.close()


def coded_videos(
    codec: VideoCodec, expected: Sequence[Expected], world: World, *, seed: int, settings: Mapping[str, Any]
) -> Iterator[ToScore]:
    """Encode and decode a clip of every prompt, rendered from ``seed`` + i. See `sampled_videos`."""
    for of_prompt, row in enumerate(tqdm(expected, desc="coding", unit="video", disable=None), seed):
        video = _to_tensor(_render(row, of_prompt, world, settings))[None].to(codec.device)
        with torch.no_grad():
            decoded = codec.decode(codec.encode(video), *video.shape[2:])[0]
        frames = to_uint8((decoded.movedim(0, -1).cpu().numpy() + 1) / 2)
        yield row, f"seed {of_prompt}", as_mp4(frames, world.fps)


def conditioned_frames(
    codec: VideoCodec, num_frames: int, ends: Sequence[str], frames_per_end: int | None
) -> list[slice]:
    """Return the frames that videos are conditioned on, at each of ``ends``: first and last.

    Args:
        frames_per_end: by default these are whole latent frames, at least `LEAST_CONDITIONING_FRAMES`:
            the rest of one that is given in part becomes a repetition.

    Raises:
        UserError: if no others are left.
    """

    def is_whole(frames: int) -> bool:
        return bool(codec.pixel_shape(*codec.latent_shape(frames, 1, 1))[0] == frames)

    def whole(end: str) -> int:
        whole_ones = (
            n
            for n in range(LEAST_CONDITIONING_FRAMES, num_frames)
            if is_whole(n if end == "first" else num_frames - n)
        )
        return next(whole_ones, LEAST_CONDITIONING_FRAMES)

    counts = {end: frames_per_end or whole(end) for end in dict.fromkeys(ends)}
    if sum(counts.values()) >= num_frames:
        raise UserError(
            f"num_frames = {num_frames}: must be larger than the {sum(counts.values())} conditioning frames, so that "
            "some are left to generate: ask for more frames, or for fewer conditioning_frames at each end"
        )
    return [slice(0, n) if end == "first" else slice(-n, None) for end, n in counts.items()]


def _render(row: Expected, seed: int, world: World, settings: Mapping[str, Any]) -> Array:
    return render_prompt(row, seed, world, settings["num_frames"], settings["height"])


def as_mp4(frames: Array, fps: float) -> Array:
    """Return frames as they are after writing and decoding an .mp4: uint8 [T H W 3]."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, frames, fps)
        return read_mp4(path)


def _to_tensor(frames: Array) -> Tensor:
    """Convert uint8 [T H W 3] to float [3 T H W] in [-1, 1]."""
    return torch.from_numpy(frames.copy()).movedim(-1, 0).float() / 127.5 - 1
