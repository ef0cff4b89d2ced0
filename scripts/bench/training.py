"""Compare whole training steps of a run under several settings: their time, and what they learn.

    python scripts/bench/training.py --config configs/train/quickstart.yaml --side 'trainer.matmul_precision medium'
    python scripts/bench/training.py --config configs/train/quickstart.yaml --steps 300 \
        --side 'trainer.matmul_precision medium' --side 'trainer.precision bf16' --side 'trainer.compile true'

The first side is the run as its settings say (any flag of train.py may be added); each --side changes settings of
trainer, optimizer or ema. All start from the same weights and take every step with the same batch, one after the
other in changing order, in one process, since on a machine that others use, too, times are only comparable in pairs.
Printed are the median seconds of a step, the median over steps of the ratio to the first side, with quartiles, and
the mean loss of each window of steps. The run folder is temporary; the cache of data.cache is used, and filled.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.pipelines.writer import check_output_file
from stdit.training.config import TrainConfig, parse_train

OWN = ("trainer", "optimizer", "ema")
"""Groups of settings in which sides may differ."""
OF_THE_PROCESS = ("trainer.device", "trainer.num_threads", "trainer.keep_freed_memory")
"""Settings of these groups that all sides share, as they run in one process."""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--side", action="append", default=[], metavar="'KEY VALUE ...'", help="see above")
    parser.add_argument("--steps", type=int, default=50, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=3, help="first steps that do not count in the times")
    parser.add_argument("--window", type=int, default=50, help="steps whose losses are averaged")
    parser.add_argument("--output", type=Path, help="a JSON file of all times and losses")
    args, settings = parser.parse_known_args()
    for name in ("steps", "window"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} = {getattr(args, name)}: must be at least 1")
    if args.warmup < 0:
        raise UserError(f"warmup = {args.warmup}: must be at least 0")
    if again := next((side for side in args.side if args.side.count(side) > 1), None):
        raise UserError(f"side {again!r} is given twice: leave one out")
    if args.output:
        check_output_file(args.output, "bench.json")
    with tempfile.TemporaryDirectory(prefix="stdit-bench-") as folder:
        sides = {"as set": parse_side(settings, "", folder)}
        sides |= {side: parse_side(settings, side, folder) for side in args.side}
        measured = measure(sides, args)
    report(measured, args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(measured) + "\n")


def parse_side(settings: list[str], side: str, folder: str) -> TrainConfig:
    """Return the settings of a side. Raises UserError if it changes others than a side may."""
    words = side.split()
    for key in words[::2]:
        if key.partition(".")[0] not in OWN or "." not in key:
            raise UserError(f"side {side!r}: {key} must begin with {', '.join(f'{own}.' for own in OWN)}")
        if key in OF_THE_PROCESS:
            raise UserError(
                f"side {side!r}: {key} is the same for all sides: give it as --{key}, in runs of their own"
            )
    if len(words) % 2:
        raise UserError(f"side {side!r}: must be pairs of a key and a value")
    changes = [f"--{word}" if place % 2 == 0 else word for place, word in enumerate(words)]
    no_validation = ["--validation.prompts", "[]"]
    return parse_train([*settings, *changes, *no_validation, "--output_dir", folder, "--name", "bench"])


def measure(sides: dict[str, TrainConfig], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Train all sides in turn on the same batches -> seconds and loss of each step, by side."""
    from stdit.training.session import start
    from stdit.training.stop_signals import StopSignals

    measured: dict[str, dict[str, list[float]]] = {side: {"seconds": [], "loss": []} for side in sides}
    base = next(iter(sides.values()))
    with start(base, StopSignals()) as session:  # signals are not handled: Ctrl-C ends it at once
        trainers = {side: build_trainer(session, config) for side, config in sides.items()}
        names = list(sides)
        for batch in session.batches(0, args.warmup + args.steps):
            first = batch.step % len(names)
            for name in names[first:] + names[:first]:
                began = time.perf_counter()
                loss = trainers[name].step(batch)["loss"]
                measured[name]["seconds"].append(time.perf_counter() - began)
                measured[name]["loss"].append(loss)
    return measured


def build_trainer(session: Any, config: TrainConfig) -> Any:
    """Build a trainer of one side on a copy of the session's model, which is not trained itself."""
    import torch

    from stdit.training.flow_matching import FlowMatching
    from stdit.training.trainer import Trainer

    components, device = session.sampler.components, session.mesh.device
    bf16 = config.trainer.precision == "bf16"
    accelerator: Any = SimpleNamespace(  # accelerate's allows one precision in a process
        device=device,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False),
    )
    model = copy.deepcopy(components.model)
    model.set_activations(config.memory.block_activations(len(model.blocks)))
    return Trainer(
        model,
        FlowMatching(components.flow),
        accelerator,
        session.mesh,
        config.trainer,
        config.optimizer,
        config.ema,
        config.seed,
        memory=config.memory,
    )


def report(measured: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    """Print seconds, ratios and losses of all sides."""
    width = max(len(side) for side in measured)
    base = next(iter(measured.values()))["seconds"][args.warmup :]
    for side, found in measured.items():
        seconds = found["seconds"][args.warmup :]
        ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"{side:<{width}}  {1000 * statistics.median(seconds):7.1f} ms a step (median)"
            f"  {middle:.2f}x ({low:.2f} to {high:.2f})"
        )
    print(f"mean loss of each {args.window} steps:")
    for side, found in measured.items():
        losses = found["loss"]
        windows = [losses[begin : begin + args.window] for begin in range(0, len(losses), args.window)]
        print(f"{side:<{width}}  {'  '.join(f'{statistics.fmean(window):.4f}' for window in windows)}")


if __name__ == "__main__":
    run(main)
