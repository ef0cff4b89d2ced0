"""Kill the server and its workers at random while clients wait for videos; count what was lost, repeated or changed.

    python scripts/chaos/serving.py                                      # 200 videos, 20 clients, 20 kills
    python scripts/chaos/serving.py --videos 40 --clients 4 --kills 4 --seed 1 --output outputs/chaos-serving-1

Every client sends its requests one after the other and waits for their videos, as `stdit.serve.client.VideoClient`
does it: a request that finds no server is sent again with the same key. Meanwhile the server, a worker or both get
SIGKILL; the server is started again by the same command. At the end each request must have one video, the folder must
hold these and no others, and the frames of each, before they are encoded (`keep_frames`), must be within a level of
255 of those that the pipeline makes of this request alone. Exits with 1 if not. Needs Linux and the extra serve.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import positive_int
from stdit.cli import run, script_parser
from stdit.serve.client import VideoClient

ROOT = Path(__file__).parents[2]
TARGETS = ("worker", "server", "both")
SECONDS_BETWEEN = (1.0, 8.0)
_PROMPTS = ("a red star orbits a blue square", "a green heart bounces", "a yellow ring rises")
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 6, "refine_pairs": 0},
    {"num_inference_steps": 8, "refine_pairs": 0, "guidance_scale": 2.0},
    {"num_inference_steps": 4, "refine_pairs": 1},
)
LEVELS = 1
"""Levels of 255 by which a frame may differ from the one made alone: batches add up in another order."""


@dataclass
class Server:
    """The server's command, started again after each kill."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    kills: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        flags = ["--server.port", str(self.port), "--server.runs", str(self.folder)]
        flags += ["--server.requests_per_second", "10000", "--import", "keep_frames"]
        kept = {"KEEP_FRAMES": str(self.frames), "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
        with open(self.folder.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "sample.py"), "--serve", *flags],
                stdout=log,
                stderr=log,
                env=os.environ | kept,
                start_new_session=True,
            )

    @property
    def frames(self) -> Path:
        """Folder of the frames before they are encoded."""
        return self.folder.parent / "frames"

    def workers(self) -> list[psutil.Process]:
        """Return the processes of its workers."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self, target: str) -> None:
        """Kill the server, its workers or both; start it again if it was killed."""
        assert self.process is not None
        self.kills.append(target)
        workers = self.workers() if target != "server" else []
        if target != "worker":
            self.process.kill()
            self.process.wait()
        for worker in workers:
            try:
                worker.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        if target != "worker":
            self.start()

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@contextmanager
def kills_at_random(server: Server, count: int, draw: random.Random) -> Iterator[None]:
    """Kill something at random moments during a block, at most ``count`` times."""
    over = threading.Event()

    def work() -> None:
        for _ in range(count):
            if over.wait(draw.uniform(*SECONDS_BETWEEN)):
                return
            target = draw.choice(TARGETS)
            print(f"  kill {target}", flush=True)
            server.kill(target)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def requests_of(videos: int) -> list[dict[str, Any]]:
    """Return requests of several prompts and settings, each with a seed of its own."""
    return [
        {"prompt": _PROMPTS[seed % len(_PROMPTS)], "seed": seed, **_SETTINGS[seed % 7 % len(_SETTINGS)]}
        for seed in range(videos)
    ]


def ask(port: int, requests: Sequence[dict[str, Any]], clients: int) -> list[dict[str, Any]]:
    """Send the requests from several clients; return their videos, in order."""

    def of_client(first: int) -> list[dict[str, Any]]:
        client = VideoClient(f"http://127.0.0.1:{port}", patience=300)
        own = [client.create(**request) for request in requests[first::clients]]
        return [client.wait(video) for video in own]

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(of_client, range(clients)))
    return [found[place % clients][place // clients] for place in range(len(requests))]


def largest_difference(kept: Path, request: dict[str, Any], pipe: Any) -> int:
    """Return by how many levels of 255 the frames of a served video differ from those made alone."""
    import numpy as np
    import torch

    from stdit.pipelines.video_io import to_uint8

    settings = {name: value for name, value in request.items() if name not in ("prompt", "seed")}
    generator = torch.Generator().manual_seed(request["seed"])
    alone = to_uint8(pipe(request["prompt"], generator=generator, output_type="np", **settings).frames[0])
    return int(np.abs(alone.astype(int) - np.load(kept)).max())


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--videos", type=positive_int, default=200)
    parser.add_argument("--clients", type=positive_int, default=20)
    parser.add_argument("--kills", type=positive_int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=positive_int, default=8765)
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos-serving"))
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    runs = args.output / "outputs"
    server, requests = Server(runs.absolute(), args.port), requests_of(args.videos)
    for folder in (runs, server.frames):
        folder.mkdir(parents=True)
    began = time.monotonic()
    server.start()
    try:
        with kills_at_random(server, args.kills, random.Random(args.seed)):
            videos = ask(args.port, requests, args.clients)
    finally:
        server.stop()
    seconds = time.monotonic() - began
    files = sorted(path.name for path in (runs / "served").iterdir())
    named = sorted(video["file"] for video in videos)
    from stdit import STDiTPipeline

    pipe = STDiTPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    differences = [
        largest_difference(server.frames / f"{Path(video['file']).stem}.npy", request, pipe)
        for video, request in zip(videos, requests, strict=True)
    ]
    result = {
        "videos": len(videos),
        "completed": sum(video["status"] == "completed" for video in videos),
        "files": len(files),
        "duplicates": len(files) - len(set(named)),
        "kills": {target: server.kills.count(target) for target in TARGETS},
        "seconds": round(seconds, 1),
        "largest difference": max(differences),
        "equal in all pixels": sum(difference == 0 for difference in differences),
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    right = files == named and len(set(named)) == args.videos == result["completed"]
    return 0 if right and max(differences) <= LEVELS else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    run(main)
