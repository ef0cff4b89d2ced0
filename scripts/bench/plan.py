"""Benchmark the plan of a million clips: seconds to make it and to resume in the middle, and its memory.

    python scripts/bench/plan.py
    python scripts/bench/plan.py --clips 100000 --step 10000 --output plan.json

The manifest is a CSV with complete metadata and captions of 18 words; all its clips are links to one small video;
there are 24 buckets. Each measurement runs in its own process. Seconds are wall time, followed by processor time; MiB
is the peak above the memory of the imports.
"""

import csv
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stdit.cli import run, script_parser
from stdit.data.config import BucketConfig, DataConfig
from stdit.errors import UserError

CLIPS_A_FOLDER = 1000
SECONDS = 25.0
"""Of the video."""
SIZES = [(240, 426), (480, 854), (720, 1280), (1080, 1920), (1280, 720), (640, 640), (480, 640), (300, 300)]
RATES = (24, 25, 30, 29.97)
WORDS = (
    "a red blue green ball cat dog bird that runs over the hill while rain falls and the camera pans slowly left "
    "then right under an old bridge"
).split()


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000, help="clips in the manifest (%(default)s)")
    parser.add_argument("--step", type=int, default=100_000, help="step at which to resume (%(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.clips < 1 or args.step < 0:
        raise UserError(
            f"clips = {args.clips}, step = {args.step}: give at least 1 clip, and a step of 0 or more"
        )

    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.clips)
        results = {}
        for name in ("start", "resume"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                results[name] = pool.submit(measure, Path(folder), args.step).result()
            show(name, results[name])
    if args.output:
        figures = {"clips": args.clips, "step": args.step, **results}
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"{name}: {found['clips']:,} clips in {found['buckets']} buckets")
    for part, (seconds, computing) in found["seconds"].items():
        print(f"  {part:<36}{seconds:>8.2f} s{computing:>8.2f} s of processor")
    print(f"  {'peak memory above the imports':<36}{found['mib']:>8.0f} MiB", flush=True)


def make_data(folder: Path, count: int) -> None:
    """Write a manifest of `count` clips, and their files: hard links to one video, in folders that are links."""
    import numpy as np

    from stdit.pipelines.video_io import write_mp4

    first = folder / "all"
    first.mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), dtype=np.uint8)
    write_mp4(first / "000.mp4", np.repeat(frames, round(SECONDS * 24), axis=0), 24)
    for i in range(1, min(count, CLIPS_A_FOLDER)):
        os.link(first / "000.mp4", first / f"{i:03}.mp4")
    draw = random.Random(0)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "num_frames", "fps", "height", "width", "motion"])
        for i in range(count):
            part, number = divmod(i, CLIPS_A_FOLDER)
            if number == 0:
                (folder / f"part-{part:05}").symlink_to(first)
            fps = draw.choice(RATES)
            writer.writerow(
                [
                    f"part-{part:05}/{number:03}.mp4",
                    " ".join(draw.choices(WORDS, k=18)),
                    draw.randint(8, int(SECONDS * fps)),
                    fps,
                    *draw.choice(SIZES),
                    round(draw.random(), 3),
                ]
            )


def settings(folder: Path) -> DataConfig:
    """24 buckets: two resolutions, three lengths, four aspect ratios."""
    buckets = [
        BucketConfig(
            resolution=resolution,
            aspect_ratio=["16:9", "9:16", "1:1", "4:3"],
            num_frames=frames,
            fps=24,
            batch_size=8,
            keep_probability=0.9,
        )
        for resolution in ("144p", "240p")
        for frames in (1, 17, 51)
    ]
    return DataConfig(manifest=str(folder / "manifest.csv"), buckets=buckets)


@dataclass
class Laps:
    """Seconds of the clock and of the processor, by what they went into."""

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        began, computed = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = (time.perf_counter() - began, time.process_time() - computed)


def peak_mib() -> float:
    """Return the peak memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def measure(folder: Path, step: int) -> dict[str, Any]:
    """Time what train.py does with the data up to and including the batch of `step`."""
    from stdit.data.build import build_assignment, without_dead_buckets
    from stdit.data.dataset import video_loader
    from stdit.data.plan import BatchPlan
    from stdit.training.build import clips_hash

    config, laps, before = settings(folder), Laps(), peak_mib()
    with laps.lap("read the manifest, fill the buckets"):
        assignment = build_assignment(config, index=folder / "clips")
    with laps.lap(f"find step {step:,}"):
        plan = BatchPlan(assignment)
        plan.batch(step)
    with laps.lap("hash the clips"):
        clips_hash(plan)
    mib = peak_mib() - before
    with laps.lap("look at a clip of each bucket"):
        without_dead_buckets(assignment, config.max_skipped_share)
    whole = [sum(column) for column in zip(*laps.seconds.values(), strict=True)]
    with laps.lap("read the first batch"):
        next(iter(video_loader(plan)(step)))
    laps.seconds["in all, before that batch"] = (whole[0], whole[1])
    return {
        "clips": assignment.kept,
        "buckets": len(assignment.buckets),
        "mib": mib,
        "seconds": laps.seconds,
    }


if __name__ == "__main__":
    run(main)
