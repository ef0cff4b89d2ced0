"""Many small videos, quickly: one is encoded, the others are copies with another comment of equal length."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from stdit.pipelines.video_io import write_mp4

LENGTH = 600
"""Bytes of a comment; shorter ones end with spaces, which JSON allows."""


class SmallVideos:
    """Videos of 3 frames of 32x16 pixels below a folder, each newer than the one before."""

    def __init__(self, folder: Path, start: float = 1_700_000_000.0) -> None:
        self.folder, self._times = folder, itertools.count(int(start * 1e9), 1_000_000_000)
        folder.mkdir(parents=True, exist_ok=True)
        template = folder / "template.mp4"
        frames = np.arange(3 * 16 * 32 * 3, dtype=np.uint8).reshape(3, 16, 32, 3)
        write_mp4(template, frames, 8.0, {"pad": "x" * (LENGTH - len('{"pad": ""}'))})
        self._comment = json.dumps({"pad": "x" * (LENGTH - len('{"pad": ""}'))}).encode()
        self._content = template.read_bytes()
        assert self._content.count(self._comment) == 1
        template.unlink()

    def make(self, name: str, prompt: str = "a red circle", **metadata: Any) -> Path:
        """Write a video with the metadata that sampling writes."""
        facts = {"prompt": prompt, "seed": 0, "num_frames": 3, "height": 16, "width": 32, "fps": 8.0}
        return self.make_raw(name, json.dumps(facts | metadata))

    def make_raw(self, name: str, comment: str) -> Path:
        """Write a video with any comment."""
        content = comment.encode().ljust(LENGTH)
        assert len(content) == LENGTH
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._content.replace(self._comment, content))
        changed = next(self._times)
        os.utime(path, ns=(changed, changed))
        return path
