"""Videos to score that lie in a folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from stdit.data.decoding.decode import DecodeError, decode_clip, probe
from stdit.data.shapes.outlines import Array
from stdit.data.shapes.prompt_files import Expected
from stdit.errors import UserError, listed

ToScore = tuple[Expected, str, Array]
"""A video to score: its prompt, its source (file or seed), and its frames, uint8 [T H W 3]."""


def folder_height(folder: Path) -> int:
    """Return the height in pixels of a folder's first readable video; 0 if none is. Raises UserError if empty."""
    for path in _videos(folder):
        with suppress(DecodeError):  # whether it is of interest is seen later
            return probe(path).height
    return 0


def folder_videos(folder: Path, expected: Sequence[Expected]) -> Iterator[ToScore]:
    """Yield a folder's videos whose prompt, in the .json beside them, is expected; the source is the file's name.

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
            frames = read_mp4(path)
        except DecodeError as error:
            raise UserError(f"{error}: sample it again, or remove it") from error
        yield row, path.name, frames
    if len(unknown) == len(paths):
        raise UserError(
            f"{folder}: no video has a .json beside it with a known prompt: name the files of their prompts by "
            "--prompts"
        )
    if unknown:
        print(
            f"{len(unknown)} of {len(paths)} videos have no known prompt: {listed(unknown[:3], len(unknown))}"
        )


def read_mp4(path: Path) -> Array:
    """Decode all frames of a video: uint8 [T H W 3]. Raises DecodeError."""
    info = probe(path)
    frames = decode_clip(path, info.num_frames, info.fps, info.height, info.width)
    return frames.permute(0, 2, 3, 1).numpy()


def _videos(folder: Path) -> list[Path]:
    """Return the .mp4 files of a folder. Raises UserError if there are none."""
    if paths := sorted(folder.glob("*.mp4")):
        return paths
    raise UserError(f"{folder} holds no .mp4: --videos takes the output folder of sample.py")
