"""Videos to score: those of a folder, of a model, and of a codec that encodes and decodes rendered clips.

Each is yielded as (prompt, source, uint8 [T H W 3]) with the frames that an .mp4 shows.

Letters: B batch, T frames, H height, W width.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stdit.codecs.base import VideoCodec
from stdit.data.decoding.decode import DecodeError, decode_clip, probe
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.prompt_files import Expected, render_prompt
from stdit.data.shapes.worlds import World
from stdit.errors import UserError, listed
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.video_io import to_uint8, write_mp4

Scored = tuple[Expected, str, Array]
LEAST_CONDITIONING_FRAMES = 4
"""By default, rounded up to whole latent frames; enough to show a motion."""


def folder_size(folder: Path) -> int:
    """Return the height in pixels of a folder's first video. Raises UserError if it holds none that can be read."""
    paths = _videos(folder)
    try:
        return probe(paths[0]).height
    except DecodeError as error:
        raise _damaged(error) from error


def finished_videos(folder: Path, expected: Sequence[Expected]) -> Iterator[Scored]:
    """Yield a folder's videos whose prompt, in the .json beside them, is expected. The source is the file's name.

    Raises:
        UserError: if there are none, or one cannot be decoded.
    """
    by_prompt = {row["prompt"]: row for row in reversed(expected)}
    paths = _videos(folder)
    unknown = []
    for path in tqdm(paths, desc="checking", unit="video", disable=None):
        try:
            row = by_prompt[json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["prompt"]]
        except (OSError, ValueError, KeyError, TypeError):
            unknown.append(path.name)
            continue
        try:
            frames = _read_mp4(path)
        except DecodeError as error:
            raise _damaged(error) from error
        yield row, path.name, frames
    if len(unknown) == len(paths):
        raise UserError(f"{folder}: no video has a .json beside it with a prompt of the prompt files")
    if unknown:
        print(
            f"{len(unknown)} of {len(paths)} videos have no known prompt: {listed(unknown[:3], len(unknown))}"
        )


def sampled_videos(
    pipe: STDiTPipeline,
    expected: Sequence[Expected],
    world: World,
    *,
    seed: int,
    batch_size: int,
    settings: Mapping[str, Any],
    conditioned: Sequence[slice] = (),
) -> Iterator[Scored]:
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
        clips = [_render(row, one, world, settings) for row, one in zip(rows, seeds, strict=True)]
        videos = pipe(
            prompt=[row["prompt"] for row in rows],
            generator=[torch.Generator().manual_seed(one) for one in seeds],
            conditions=[
                [FrameCondition(_to_tensor(clip[kept]), kept.start) for kept in conditioned] for clip in clips
            ],
            output_type="np",
            **settings,
        ).frames  # [B T H W 3]
        for row, one, clip, video in zip(rows, seeds, clips, videos, strict=True):
            frames = to_uint8(np.asarray(video))
            if errors := [np.abs(frames[kept].astype(int) - clip[kept]).mean() for kept in conditioned]:
                row = {**row, "conditioning_error": float(max(errors))}
            yield row, f"seed {one}", _as_mp4(frames, world.fps)
        progress.update(len(rows))
    progress.close()


def coded_videos(
    codec: VideoCodec, expected: Sequence[Expected], world: World, *, seed: int, settings: Mapping[str, Any]
) -> Iterator[Scored]:
    """Encode and decode a clip of every prompt, rendered from ``seed`` + i. See `sampled_videos`."""
    for one, row in enumerate(tqdm(expected, desc="coding", unit="video", disable=None), seed):
        video = _to_tensor(_render(row, one, world, settings))[None].to(codec.device)
        with torch.no_grad():
            decoded = codec.decode(codec.encode(video), *video.shape[2:])[0]
        frames = to_uint8((decoded.movedim(0, -1).cpu().numpy() + 1) / 2)
        yield row, f"seed {one}", _as_mp4(frames, world.fps)


def conditioned_frames(
    codec: VideoCodec, num_frames: int, ends: Sequence[str], given: int | None
) -> list[slice]:
    """Return the frames that videos are conditioned on, at each of ``ends``: first and last.

    Args:
        given: frames at each end. By default these are whole latent frames, at least `LEAST_CONDITIONING_FRAMES`:
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

    counts = {end: given or whole(end) for end in dict.fromkeys(ends)}
    if sum(counts.values()) >= num_frames:
        raise UserError(
            f"num_frames = {num_frames}: must be larger than the {sum(counts.values())} conditioning frames, so that "
            "some are left to generate"
        )
    return [slice(0, n) if end == "first" else slice(-n, None) for end, n in counts.items()]


def _videos(folder: Path) -> list[Path]:
    """Return the .mp4 files of a folder. Raises UserError if there are none."""
    if paths := sorted(folder.glob("*.mp4")):
        return paths
    raise UserError(f"{folder} holds no .mp4: --videos takes the output folder of sample.py")


def _damaged(error: DecodeError) -> UserError:
    return UserError(f"{error}: sample it again, or remove it")


def _render(row: Expected, seed: int, world: World, settings: Mapping[str, Any]) -> Array:
    return render_prompt(row, seed, world, settings["num_frames"], settings["height"])


def _read_mp4(path: Path) -> Array:
    """Decode all frames of a video: uint8 [T H W 3]. Raises DecodeError."""
    info = probe(path)
    frames = decode_clip(path, info.num_frames, info.fps, info.height, info.width)
    return frames.permute(0, 2, 3, 1).numpy()


def _as_mp4(frames: Array, fps: float) -> Array:
    """Return frames as they are after writing and decoding an .mp4: uint8 [T H W 3]."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, frames, fps)
        return _read_mp4(path)


def _to_tensor(frames: Array) -> Tensor:
    """Convert uint8 [T H W 3] to float [3 T H W] in [-1, 1]."""
    return torch.from_numpy(frames.copy()).movedim(-1, 0).float() / 127.5 - 1
