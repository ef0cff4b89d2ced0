import shutil
from dataclasses import replace

import numpy as np
import pytest

from stdit.data.config import BucketConfig, DataConfig
from tests.data.cache.tiny import Work

CAPTIONS = ["a", "two words", "a b c", "a", "two words", "six", "turn left"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory, write_video):
    """Five clips that fill their bucket exactly; two that are longer and wider than theirs."""
    folder = tmp_path_factory.mktemp("cached")
    rng = np.random.default_rng(0)
    rows = ["path,text,num_frames,fps,height,width"]
    for i, caption in enumerate(CAPTIONS):
        length, height, width = (8, 32, 32) if i < 5 else (12, 48, 64)
        coarse = rng.integers(0, 255, (length, height // 8, width // 8, 3), np.uint8)
        write_video(folder / f"{i}.mp4", frames=coarse.repeat(8, axis=1).repeat(8, axis=2))
        rows.append(f"{i}.mp4,{caption},{length},8,{height},{width}")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def config(tmp_path, videos):
    shutil.copytree(videos, tmp_path, dirs_exist_ok=True)
    buckets = [BucketConfig(num_frames=8, fps=8, height=size, width=size, batch_size=2) for size in (32, 48)]
    return DataConfig(manifest=str(tmp_path / "manifest.csv"), buckets=buckets, cache="disk")


@pytest.fixture
def work(config):
    return lambda seed=0, codec="tiny", text="text", **changes: Work(
        replace(config, **changes), seed, codec, text
    )
