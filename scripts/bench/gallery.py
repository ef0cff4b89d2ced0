"""Measure the gallery of the server on many small videos that no index has seen yet.

    python scripts/bench/gallery.py                  # 5,000 videos in a temporary folder
    python scripts/bench/gallery.py --videos 50000

The videos are copies of one that is encoded, each with metadata of its own. Printed are the seconds of the first page
of 48, which is asked for over HTTP in this process (no network); of their thumbnails; until all files are read, while
pages are listed; of one more page and of a search; and the memory (RSS) before the first page, after all files are
read, and after paging through everything twice.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stdit.cli import run, script_parser
from stdit.pipelines.video_io import write_mp4

LENGTH = 600
"""Bytes of a video's metadata; shorter ones end with spaces."""
WORDS = (
    "red blue green white",
    "circle square star triangle",
    "moves grows spins falls",
    "left right up down",
)


def main() -> None:
    """Read the flags, and measure."""
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=int, default=5000, help="how many")
    parser.add_argument("--folder", type=Path, help="where to make them; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        measure(arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def make_videos(folder: Path, count: int) -> None:
    """Write videos of 16 frames of 64x64 pixels, a hundred in a folder."""
    pad = json.dumps({"pad": "x" * (LENGTH - len('{"pad": ""}'))})
    template = folder / "template.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8)
    write_mp4(template, frames.repeat(8, 1).repeat(8, 2), 8.0, json.loads(pad))
    content = template.read_bytes()
    template.unlink()
    prompts = itertools.cycle(itertools.product(*(words.split() for words in WORDS)))
    for number, words in zip(range(count), prompts, strict=False):
        facts = {"prompt": f"a {' '.join(words)}, {number}", "seed": number, "num_frames": 16, "height": 64}
        facts |= {"width": 64, "fps": 8.0, "checkpoint": f"outputs/run{number % 5}/pipeline"}
        video = folder / f"{number // 100:04d}" / f"{number:06d}.mp4"
        video.parent.mkdir(exist_ok=True)
        video.write_bytes(content.replace(pad.encode(), json.dumps(facts).encode().ljust(LENGTH)))
        os.utime(video, (1.7e9 + number, 1.7e9 + number))


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Make the videos, list them, and print the figures."""
    import psutil
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from stdit.serve.gallery.gallery import Gallery
    from stdit.serve.gallery.gallery_api import gallery_routes

    outputs = folder / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    make_videos(outputs, arguments.videos)
    gallery = Gallery(outputs, folder / "gallery.sqlite")
    app = FastAPI()
    app.include_router(gallery_routes(gallery, lambda _: {}))
    client = TestClient(app)
    client.get("/openapi.json")  # a server has imported all that before it is asked
    import stdit.data.decoding.frames  # noqa: F401

    memory = psutil.Process().memory_info
    before = memory().rss

    began = time.perf_counter()
    page = client.get("/v1/gallery").json()
    print(f"first page of a cold index: {time.perf_counter() - began:.3f} s, {len(page['data'])} videos")
    began = time.perf_counter()
    for video in page["data"]:
        client.get(f"/v1/gallery/{video['id']}/thumbnail").raise_for_status()
    print(f"their thumbnails, one after the other: {time.perf_counter() - began:.3f} s")

    began, slowest = time.perf_counter(), 0.0
    while client.get("/v1/gallery").json()["indexing"]:
        asked = time.perf_counter()
        client.get("/v1/gallery")
        slowest = max(slowest, time.perf_counter() - asked)
        time.sleep(0.1)
    print(
        f"all {arguments.videos} files read: {time.perf_counter() - began:.1f} s; a page meanwhile: {slowest:.3f} s"
    )
    indexed = memory().rss
    for query in ("", "search=RED+spins", "checkpoint=run3"):
        began = time.perf_counter()
        total = client.get(f"/v1/gallery?{query}").json()["total"]
        print(f"a page of {query or 'all'}: {time.perf_counter() - began:.3f} s, {total} videos")
    counts = [sum(1 for _ in everything(client)) for _ in range(2)]
    assert counts == [arguments.videos] * 2, counts
    mib = [f"{value / 2**20:.0f}" for value in (before, indexed, memory().rss)]
    print(
        f"memory: {mib[0]} MiB before, {mib[1]} MiB with all read, {mib[2]} MiB after paging through all twice"
    )
    gallery.close()


def everything(client: Any) -> Iterator[dict[str, Any]]:
    """Yield all videos, page by page."""
    query = {"limit": 200}
    while True:
        page = client.get("/v1/gallery", params=query).json()
        yield from page["data"]
        if page["next"] is None:
            return
        query = {"limit": 200, "before": page["next"]}


if __name__ == "__main__":
    run(main)
