"""Keep the frames of each video before they are encoded: ``--import keep_frames``, as scripts/chaos/serving.py does.

They are written as .npy files of the videos' names into the folder that KEEP_FRAMES names.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from stdit.atomic_files import atomic_write
from stdit.pipelines import video_io

_write_mp4 = video_io.write_mp4


def _write_and_keep(path: Path, frames: np.ndarray, *args: Any, **options: Any) -> dict[str, Any]:
    with atomic_write(Path(os.environ["KEEP_FRAMES"]) / f"{path.stem}.npy") as temporary:
        with temporary.open("wb") as file:
            np.save(file, frames)
    return _write_mp4(path, frames, *args, **options)


video_io.write_mp4 = _write_and_keep
