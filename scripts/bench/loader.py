"""Measure how many clips per second the loaders deliver, and how many the model trains on.

    python scripts/bench/loader.py                                      # the quickstart, two threads
    python scripts/bench/loader.py --config configs/train/own-clips.yaml --data.manifest clips/manifest.csv

Without --data.manifest it builds a small part of the embedded data set in a temporary folder. All other flags are
settings of train.py. Measured one after the other, in one process:

    training     training steps, on batches that are in memory
    memory       data.cache memory: latents and text states are in memory
    disk         data.cache disk: read from the files of the cache, by the training process or by loader processes
    mp4          decoded, resized, converted to float32, by the training process or by loader processes
    mp4, codec   the same, and encoded by the codec in the training process, as with data.cache none

None of them encodes text: a run without a cache encodes a caption whenever it occurs, one with a cache once. The last
line is the text encoder alone.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stdit.cli import run, script_parser
from stdit.training.config import TrainConfig, parse_train

if TYPE_CHECKING:
    from stdit.data.batch import EncodedBatch
    from stdit.training.build import RunComponents
    from stdit.training.trainer import Trainer

CLIPS = 256
Cache = Literal["memory", "disk"]
DEFAULT = "configs/train/quickstart.yaml"


def main(argv: list[str] | None = None) -> None:
    args, settings = parse_args(argv)
    if not any(argument.split("=")[0] == "--config" for argument in settings):
        settings = ["--config", DEFAULT, *settings]
    with tempfile.TemporaryDirectory() as folder:
        if not any(argument.split("=")[0] == "--data.manifest" for argument in settings):
            settings += ["--data.manifest", str(shapes(Path(folder)))]
        config = parse_train([*settings, "--trainer.num_threads", str(args.threads)])
        data = replace(config.data, cache_dir=str(Path(folder) / "cache"))
        measure(replace(config, data=data), args.seconds, args.loaders)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the script's own flags, and the arguments that are settings of train.py."""
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    loaders = min(2, os.cpu_count() or 1)
    parser.add_argument("--loaders", type=int, default=loaders, help="processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the training process (%(default)s)")
    return parser.parse_known_args(argv)


def shapes(folder: Path) -> Path:
    """Build a small part of the embedded data set; returns its manifest."""
    from stdit.data.shapes.build import ShapesConfig, build

    build(folder / "shapes", ShapesConfig(num_clips=CLIPS))
    return folder / "shapes" / "manifest.csv"


def measure(config: TrainConfig, seconds: float, loaders: int) -> None:
    """Print the clips per second of each loader, and their ratio to those of training."""
    import torch

    from stdit.parallel.processes.mesh import Mesh
    from stdit.training.batches import build_batches
    from stdit.training.build import build_components
    from stdit.training.methods import build_trainer
    from stdit.training.system import prepare_process

    accelerator = prepare_process(config.trainer, 60)
    mesh = Mesh(device=accelerator.device)

    folder = Path(str(config.data.cache_dir)).parent
    base = build_components(replace(config, data=replace(config.data, cache="memory")), None, 1, 1 << 60)
    base.to(mesh.device)

    def parts(cache: Cache, workers: int = 0) -> "RunComponents":
        data = replace(base.config.data, cache=cache, workers=workers)
        return replace(base, config=replace(base.config, data=data))

    def loader(cache: Cache, workers: int = 0) -> Iterator[int]:
        batches = build_batches(parts(cache, workers), folder, mesh)(0, 1 << 40)
        return (batch.batch_size for batch in batches)

    memory = build_batches(parts("memory"), folder, mesh)(0, 1 << 40)  # encodes everything
    some = [next(memory) for _ in range(20)]
    trainer = build_trainer(base, accelerator, mesh)
    rates = {
        "training": rate(training(trainer, some), seconds),
        "memory": rate((batch.batch_size for batch in memory), seconds),
    }
    rates["disk, 0 loaders"] = rate(loader("disk"), seconds)
    rates[f"disk, {loaders} loaders"] = rate(loader("disk", loaders), seconds)
    rates["mp4, 0 loaders"] = rate(videos(base, 0), seconds)
    rates[f"mp4, {loaders} loaders"] = rate(videos(base, loaders), seconds)
    rates[f"mp4, codec, {loaders} loaders"] = rate(videos(base, loaders, encode=True), seconds)
    rates["(text encoder)"] = rate(texts(base, some), seconds)
    print(
        f"{torch.get_num_threads()} threads, batches of {some[0].batch_size}, {config.model.hidden_size} wide"
    )
    print(f"{'':<24}{'clips/s':>12}{'of training':>14}")
    for name, clips in rates.items():
        print(f"{name:<24}{clips:>12,.0f}{clips / rates['training']:>13.1f}x")


def rate(clips: Iterator[int], seconds: float) -> float:
    """Measure clips per second after the first two batches; the iterator yields the number of clips of each batch."""
    for _ in range(2):
        next(clips)
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        count += next(clips)
    return count / passed


def training(trainer: "Trainer", batches: list["EncodedBatch"]) -> Iterator[int]:
    """Train on the batches, again and again."""
    for step in itertools.count():
        batch = batches[step % len(batches)]
        trainer.step(replace(batch, step=step))
        yield batch.batch_size


def videos(parts: "RunComponents", workers: int, encode: bool = False) -> Iterator[int]:
    """Read videos as data.cache none does, as float32, and encode them if asked to."""
    from stdit.data.clip_tensors import to_video
    from stdit.data.dataset import video_loader

    for raw in video_loader(parts.plan, workers, parts.config.data.crop)(0):
        assert raw.content is not None
        video = to_video(raw.content)
        if encode:
            parts.codec.encode(video)
        yield raw.info.batch_size


def texts(parts: "RunComponents", batches: list["EncodedBatch"]) -> Iterator[int]:
    """Encode the captions of the batches, again and again."""
    for batch in itertools.cycle(batches):
        parts.text_encoder.encode(batch.captions)
        yield batch.batch_size


if __name__ == "__main__":
    run(main)
