"""Distinct clips: each scene is a moving pattern of its own."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stdit.data.preparation.flow import Task


def pattern(seed: int, num_frames: int, height: int = 48, width: int = 64, speed: int = 1) -> np.ndarray:
    """uint8 [T H W 3]: a random coarse pattern that moves `speed` pixels to the right with each frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = coarse.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(image, speed * k, axis=1) for k in range(num_frames)])


def task(
    source: Path,
    output: Path,
    root: Path | None = None,
    workers: int = 0,
    overwrite: bool = False,
    timeout: float = 0.0,
) -> Task:
    return Task(str(source), output, None if root is None else str(root), workers, overwrite, timeout)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clips(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """A folder of three clips, one without a caption, and three files that are not videos."""
    folder = tmp_path / "clips"
    for name, seed, length in (("a.mp4", 1, 16), ("b.mp4", 2, 8), ("c.mp4", 3, 24)):
        write_video(folder / name, frames=pattern(seed, length))
    (folder / "a.txt").write_text('a red, "large" ball\n')
    (folder / "b.txt").write_text("b")
    (folder / "broken.mp4").write_text("no video")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "outside.mp4").symlink_to(write_video(tmp_path / "outside.mp4"))
    return folder
