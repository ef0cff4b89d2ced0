"""Videos per minute of the server with batches and without, and how long its page waits meanwhile.

    python scripts/bench/serving.py                       # the bundled model, 32 videos each way
    python scripts/bench/serving.py --checkpoint outputs/quickstart --videos 64 --batch_size 16

Two servers run one after the other on the same requests: one with --batch_size N, one with --batch_size 1. The
clock runs from the first request to the end of the last video; both have loaded the model before. Meanwhile what
the page asks when somebody clicks (its health, list of videos, an estimate, the gallery) is asked about eight times a
second; the 50th and 95th percentile of these answers are printed. The first preview is that of a single video of a
server that waits: seconds from the request. Needs the extra serve.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import positive_int
from stdit.cli import run, script_parser
from stdit.serve.client import VideoClient

ROOT = Path(__file__).parents[2]
PROMPT = "a red star orbits a blue square on a white background"
CLICKS: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/health", None),
    ("GET", "/v1/videos?limit=20", None),
    ("POST", "/v1/estimate", {"prompt": PROMPT}),
    ("GET", "/v1/gallery?limit=48", None),
)
"""What the page asks when somebody clicks."""
CLICK_SECONDS = 0.12


@contextmanager
def served(folder: Path, port: int, flags: Sequence[str]) -> Iterator[VideoClient]:
    """Run a server during a block, from when its worker has loaded the model."""
    command = [sys.executable, str(ROOT / "sample.py"), "--serve", "--server.port", str(port)]
    process = subprocess.Popen(
        [*command, "--server.runs", str(folder), "--server.requests_per_second", "10000", *flags],
        stdout=subprocess.DEVNULL,
    )
    try:
        client = VideoClient(f"http://127.0.0.1:{port}")
        while not any(one["state"] == "idle" for one in client.health()["workers"]):
            time.sleep(0.1)
        yield client
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def clicks(client: VideoClient) -> Iterator[list[float]]:
    """Yield a list of the seconds of clicks, which grows during the block."""
    over, seconds = threading.Event(), list[float]()

    def click() -> None:
        turn = 0
        while not over.wait(CLICK_SECONDS):
            method, path, body = CLICKS[turn % len(CLICKS)]
            began = time.perf_counter()
            client.request(method, path, body)
            seconds.append(time.perf_counter() - began)
            turn += 1

    client.request(*CLICKS[2])  # what is done once
    thread = threading.Thread(target=click)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()


def first_preview(client: VideoClient) -> float:
    """Return the seconds from the request for a video to its first preview."""
    began = time.perf_counter()
    for name, _ in client.events(client.create(PROMPT)):
        if name == "preview":
            break
    return time.perf_counter() - began


def measure(folder: Path, port: int, videos: int, flags: Sequence[str]) -> dict[str, float]:
    """Return what one server reaches."""
    with served(folder, port, flags) as client:
        client.wait(client.create(PROMPT))
        previews = [first_preview(client) for _ in range(3)]
        while client.health()["running"]:
            time.sleep(0.05)
        with clicks(client) as seconds, ThreadPoolExecutor(8) as pool:
            asked = list(pool.map(lambda seed: client.create(PROMPT, seed=seed), range(videos)))
            ends = [client.wait(one)["completed_at"] for one in asked]
            took = max(ends) - min(client.get(one)["created_at"] for one in asked)
    return {
        "videos per minute": 60 * videos / took,
        "click p50 ms": 1000 * statistics.median(seconds),
        "click p95 ms": 1000 * statistics.quantiles(seconds, n=20)[-1],
        "first preview s": statistics.median(previews),
    }


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--checkpoint", help="of the model; none: the bundled one")
    parser.add_argument("--videos", type=positive_int, default=32)
    parser.add_argument("--batch_size", type=positive_int, default=8)
    parser.add_argument("--port", type=positive_int, default=8766)
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stdit-serving-"))
    found = {}
    try:
        for size in (args.batch_size, 1):
            flags = ["--batch_size", str(size)]
            flags += ["--checkpoint", args.checkpoint] if args.checkpoint else []
            found[f"batch_size {size}"] = measure(folder / str(size), args.port, args.videos, flags)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = list(next(iter(found.values())))
    print(f"{'':<16}" + "".join(f"{name:>20}" for name in names))
    for label, values in found.items():
        print(f"{label:<16}" + "".join(f"{values[name]:>20.2f}" for name in names))
    with_batches, alone = (values["videos per minute"] for values in found.values())
    print(f"batches: {with_batches / alone:.2f}x the videos per minute")
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
