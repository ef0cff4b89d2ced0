"""Measure how long saving a checkpoint stops training, in the background and synchronously, and its memory.

    python scripts/bench/checkpoint.py
    python scripts/bench/checkpoint.py --folder /scratch/bench --saves 5 --output checkpoint.json
    python scripts/bench/checkpoint.py --device cuda

One process saves weights, averages and AdamW's moments of a model of 100 million parameters, in both ways in turn, to
a folder that is removed afterwards: choose it on the disk of your checkpoints. Between saves, optimizer steps
continue; the figures say how much slower they are while a checkpoint is written. Memory is the peak of the process
above what it held before the first save, as a multiple of the size of a checkpoint.
"""

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psutil
import torch

from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.parallel.processes.device import find_device
from stdit.parallel.processes.mesh import Mesh
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, EMAConfig, OptimizerConfig
from stdit.training.ema import EMA
from stdit.training.optim import build_optimizer


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--depth", type=int, default=5, help="pairs of blocks")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind, of which the median counts")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--folder", type=Path, help="folder to write to (that of temporary files)")
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    args = parser.parse_args()
    if args.saves < 1:
        raise UserError(f"saves = {args.saves}: must be at least 1")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        figures = measure(State(args.hidden_size, args.depth, args.device), folder, args.saves)
    finally:
        shutil.rmtree(folder)
    print(
        f"{figures['parameters'] / 1e6:.0f} M parameters, {figures['bytes'] / 2**30:.2f} GiB a checkpoint\n"
        f"synchronous       {figures['at_once_seconds']:8.3f} s\n"
        f"in the background {figures['pause_seconds']:8.3f} s that training stops, "
        f"{100 * figures['pause_ratio']:.1f}% of that (first save {figures['first_pause_seconds']:.3f} s)\n"
        f"                  {figures['behind_seconds']:8.3f} s until it is on the disk; steps meanwhile take "
        f"{figures['slowdown']:.2f} times as long\n"
        f"memory            {figures['memory_ratio']:8.2f} checkpoints at most"
    )
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


class State:
    """A model with its average and AdamW, and optimizer steps without data."""

    def __init__(self, hidden_size: int, depth: int, device: str) -> None:
        torch.manual_seed(0)
        heads = max(1, hidden_size // 64)
        model = STDiT(depth=depth, hidden_size=hidden_size, num_heads=heads, caption_channels=hidden_size)
        self.model = model.to(find_device(device))
        self.ema = EMA(self.model, EMAConfig())
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.step()

    def step(self) -> float:
        """Run an optimizer step; return its seconds."""
        begin = time.perf_counter()
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.ema.update(0)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - begin

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }


def measure(state: State, folder: Path, saves: int) -> dict[str, float]:
    """Save in the background and synchronously in turn, once before to allocate the copy; return the figures."""
    checkpoints = CheckpointWriter(folder, CheckpointConfig(keep_last=1), Mesh())
    size = sum(tensor.nbytes for part in state.tensors().values() for tensor in part.values())
    quiet = [state.step() for _ in range(saves)]
    pauses, at_once, behind, busy = [], [], [], []
    with peak_memory() as peak:
        for number in range(saves + 1):
            pauses.append(save(checkpoints, 2 * number, state, at_once=False))
            begin = time.perf_counter()
            while not checkpoints.writing.ended(0):  # type: ignore[union-attr]
                busy.append(state.step())
            behind.append(time.perf_counter() - begin)
            checkpoints.wait()
            at_once.append(save(checkpoints, 2 * number + 1, state, at_once=True))
    pause, synchronous = statistics.median(pauses[1:]), statistics.median(at_once[1:])
    return {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "bytes": size,
        "at_once_seconds": synchronous,
        "pause_seconds": pause,
        "pause_ratio": pause / synchronous,
        "first_pause_seconds": pauses[0],
        "behind_seconds": statistics.median(behind[1:]),
        "slowdown": statistics.mean(busy) / statistics.mean(quiet),
        "memory_ratio": peak[0] / size,
    }


def save(checkpoints: CheckpointWriter, step: int, state: State, at_once: bool) -> float:
    """Save, and return the seconds that training stops."""
    begin = time.perf_counter()
    checkpoints.save(step, state.tensors(), {}, at_once=at_once)
    return time.perf_counter() - begin


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Measure the peak of resident bytes in the block, above those at its start."""
    process, done = psutil.Process(), Event()
    before, peak = process.memory_info().rss, [0]

    def look() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    thread = Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    run(main)
