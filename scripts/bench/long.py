"""Measure one training step on one very long video that several processes share; starts its own ranks, on CPUs.

    python scripts/bench/long.py                                        # 1,048,576 tokens on 4 ranks
    python scripts/bench/long.py --blocks "S T J" --frames 16 --height 64 --width 64
    python scripts/bench/long.py --frames 16 --height 32 --width 32 --scaling
    python scripts/bench/long.py --frames 5 --height 3 --width 7 --precision fp64 --check

The step is forward, loss, backward and AdamW on random latents. Weights, gradients and moments are sharded over all
ranks (FSDP2), and every block is recomputed in backward. Printed are the seconds of the slowest rank, the MB that the
busiest rank sends (tokens and states, not weights), and memory: PSS, in which pages that processes share count in
part, is read from /proc (Linux) four times a second, and its sum has this process, too. Peak RSS is the kernel's own,
which misses no short peak; "step" is what of it the step adds.

--scaling repeats the step with a half and a quarter of frames and ranks: memory per rank should stay the same.

--check does the same step in one process, too, and compares output, loss, every gradient and every updated weight.
Differences are relative to the largest value of a tensor, and at most 1e-12 in fp64 and 1e-5 in fp32. AdamW divides
each gradient by its own size, also one that is only rounding error (that of the keys' biases, which softmax cancels).
So updated weights are compared only if their gradient is at least 1e-6 (fp64) or 1e-3 (fp32) of the largest of its
tensor; how many are left out is printed. Gradients are all compared.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import output_file, positive_int
from scripts.bench.long_rank import Step, proportional
from scripts.bench.sequence import run_ranks
from scripts.network import LOOPBACK
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.parallel.config import ParallelConfig
from stdit.parallel.processes.mesh import Mesh, parallel_dims
from stdit.parallel.sequence.planner import format_gib

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
COMPARED_ABOVE = {"fp64": 1e-6, "fp32": 1e-3}
"""Updated weights are compared if their gradient is at least this part of the largest of its tensor."""
INTERVAL = 0.25
"""Seconds between two measurements of memory."""
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""For glibc: tensors of more bytes go back to the system when they are freed. Without it that holds above 32 MiB, and
short videos take up to twice the memory for a token that long ones take."""


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended
    args = parse_args()
    settings = settings_of(args)
    results = []
    for ranks, frames in lengths(args.ranks, args.frames) if args.scaling else [(args.ranks, args.frames)]:
        results.append(measure({**settings, "frames": frames}, ranks))
        print(report(results[-1]), flush=True)
    if args.scaling:
        print(growth(results))
    if args.output:
        args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0 if all(result.get("equal", True) for result in results) else 1


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--blocks",
        default="S T S L",
        help="pattern of the blocks, run once, or twice if it has an odd number: S T J has 6 blocks (S T S L)",
    )
    parser.add_argument("--frames", type=positive_int, default=64, help="frames of tokens (64)")
    parser.add_argument("--height", type=positive_int, default=128, help="rows of patches of a frame (128)")
    parser.add_argument("--width", type=positive_int, default=128, help="columns of patches (128)")
    parser.add_argument("--ranks", type=positive_int, default=4, help="processes that share the video (4)")
    parser.add_argument(
        "--grid",
        default="auto",
        help="how they divide it: TIMExSPACE, such as 2x2, or auto, the fastest (auto)",
    )
    parser.add_argument("--hidden_size", type=positive_int, default=64, help="width of the tokens (64)")
    parser.add_argument("--num_heads", type=positive_int, default=2, help="attention heads (2)")
    parser.add_argument("--linear_causal", action="store_true", help="L blocks see no later frames")
    parser.add_argument(
        "--precision", choices=tuple(TOLERANCE), default="fp32", help="dtype of weights and tokens (fp32)"
    )
    parser.add_argument("--threads", type=positive_int, default=1, help="threads per rank (1)")
    parser.add_argument(
        "--check", action="store_true", help="compare with one process; exit with 1 if unequal"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="repeat with a half and a quarter of ranks and frames"
    )
    parser.add_argument("--output", type=output_file, help="JSON file for all figures")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are sent to every rank. Raises UserError if they do not fit together."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError(
            "long.py reads memory from /proc/PID/smaps_rollup, which is not here: run it on Linux"
        )
    check_grid(args)
    if args.check and args.ranks == 1:
        raise UserError("--check --ranks 1: compares several processes with one: use --ranks 2 or more")
    if args.scaling and args.grid != "auto":
        raise UserError(
            f"--scaling --grid {args.grid}: each number of ranks needs its own grid: use --grid auto"
        )
    if args.scaling and len(lengths(args.ranks, args.frames)) == 1:
        raise UserError(
            f"--scaling --ranks {args.ranks} --frames {args.frames}: both are halved, so both must be even: use "
            "such as --ranks 4 --frames 64"
        )
    letters = len(args.blocks.replace(" ", ""))
    model = {name: getattr(args, name) for name in ("hidden_size", "num_heads", "blocks", "linear_causal")}
    model["depth"] = max(1, letters // math.gcd(2, letters))  # half the blocks
    STDiTConfig(**model)
    names = ("frames", "height", "width", "grid", "precision", "threads", "check")
    return {"model": model, **{name: getattr(args, name) for name in names}}


def check_grid(args: argparse.Namespace) -> None:
    """Raise UserError unless the grid has as many ranks as are started."""
    if args.grid == "auto":
        return
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.grid):
        raise UserError(f"--grid {args.grid}: must be TIMExSPACE, such as 2x2, or auto")
    time_parts, space_parts = map(int, args.grid.split("x"))
    if time_parts * space_parts != args.ranks:
        raise UserError(
            f"--grid {args.grid}: has {time_parts} x {space_parts} = {time_parts * space_parts} ranks, but --ranks "
            f"is {args.ranks}: let the two numbers multiply to {args.ranks}, or use --grid auto"
        )


def lengths(ranks: int, frames: int) -> list[tuple[int, int]]:
    """Return ranks and frames, and up to two halvings of both, the shortest first."""
    found = [(ranks, frames)]
    while len(found) < 3 and not (found[0][0] % 2 or found[0][1] % 2):
        found.insert(0, (found[0][0] // 2, found[0][1] // 2))
    return found


def measure(settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Do the step on ``ranks`` ranks; return its figures, and the differences from one process if asked for."""
    speeds = parallel_dims(ParallelConfig(), ranks, ranks, on_cpu=True).speeds
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        settings = {**settings, "figures": str(figures), "speeds": speeds}
        network = LOOPBACK._replace(environment=LOOPBACK.environment | ALLOCATOR)
        run_ranks(settings, ranks, network, Path(folder), "long_rank.py", memory.sample)
        result = json.loads(figures.read_text())
        found = load_file(f"{figures}.safetensors")
    frames, patches = settings["frames"], settings["height"] * settings["width"]
    result |= {"ranks": ranks, "frames": frames, "tokens": frames * patches, **memory.figures()}
    for kind in ("pss", "rss"):
        pairs = zip(result[f"peak_{kind}"], result[f"{kind}_before"], strict=True)
        result[f"step_{kind}"] = [max(0, peak - before) for peak, before in pairs]
    if settings["check"]:
        result |= compare(found, one_process(settings), settings["precision"])
    return result


class Memory:
    """Peaks of the PSS of processes, in bytes."""

    def __init__(self) -> None:
        self.samples, self.total = 0, 0
        self.peaks: list[int] = []
        self._next = 0.0

    def sample(self, pids: Sequence[int]) -> None:
        """Measure the ranks and this process, unless it is too soon."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL
        now = [proportional(pid) for pid in pids]
        self.samples += 1
        self.total = max(self.total, sum(now) + proportional(os.getpid()))
        self.peaks = [max(pair) for pair in zip(now, self.peaks or now, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Return the peak of the sum, and that of each rank."""
        return {"peak_pss_sum": self.total, "peak_pss": self.peaks, "samples": self.samples}


def one_process(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Do the step here; return its results."""
    torch.set_num_threads(settings["threads"])
    step = Step({**settings, "grid": "1x1"}, Mesh())
    step.measure()
    return step.results()


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], precision: str) -> dict[str, Any]:
    """Return the largest difference of each kind of tensor, and whether all are within the tolerance."""
    worst: dict[str, dict[str, Any]] = {}
    left_out, tolerance = 0, TOLERANCE[precision]
    for name in {**expected, **found}:
        compared = _compared(expected, name, COMPARED_ABOVE[precision])
        difference = math.inf
        if name in found and name in expected:
            difference = _difference(found[name][compared], expected[name][compared], expected[name])
            left_out += int((~compared).sum())
        kind, _, tensor = name.partition(" ")
        if difference >= worst.setdefault(kind, {"difference": 0.0})["difference"]:
            worst[kind] = {"difference": difference, "tensor": tensor}
    equal = all(each["difference"] <= tolerance for each in worst.values())
    return {"equal": equal, "tolerance": tolerance, "differences": worst, "weights_left_out": left_out}


def _compared(tensors: dict[str, Tensor], name: str, above: float) -> Tensor:
    """Return which values of a tensor are compared: all, but for updated weights with small gradients."""
    gradient = tensors.get(name.replace("weight ", "gradient ", 1))
    if not name.startswith("weight ") or gradient is None:
        return torch.tensor(True)
    return gradient.abs() >= above * gradient.abs().max()


def _difference(found: Tensor, expected: Tensor, whole: Tensor) -> float:
    """Return the largest difference relative to the largest value of the whole tensor; nan counts as infinite."""
    gap = (found - expected).abs().nan_to_num(nan=math.inf)
    return float(gap.max() / whole.abs().max())


def report(result: dict[str, Any]) -> str:
    """Format the figures of one length."""
    seconds, grid = result["seconds"], "x".join(map(str, result["grid"]))
    by_rank = {name: f"{format_gib(max(result[name]))} GiB" for name in ("peak_pss", "peak_rss", "step_rss")}
    lines = [
        f"\n{result['tokens']:,} tokens ({result['frames']} frames), {result['ranks']} rank(s), grid {grid}",
        f"  seconds: forward {seconds['forward']:.2f}, backward {seconds['backward']:.2f}, "
        f"optimizer {seconds['update']:.2f}",
        f"  sent by a rank: {result['sent_bytes'] / 1e6:,.1f} MB",
        f"  memory, all processes: peak PSS {format_gib(result['peak_pss_sum'])} GiB",
        f"  memory, largest rank: peak PSS {by_rank['peak_pss']}, peak RSS {by_rank['peak_rss']}, "
        f"step {by_rank['step_rss']}",
    ]
    for kind, worst in result.get("differences", {}).items():
        verdict = "" if worst["difference"] <= result["tolerance"] else f"  ABOVE {result['tolerance']:g}"
        lines.append(f"  {kind:<10}{worst['difference']:.1e}  {worst['tensor']}{verdict}".rstrip())
    if "equal" in result:
        left_out = result["weights_left_out"]
        if left_out:
            lines.append(f"  {left_out:,} updated weights are not compared: their gradients are too small")
        lines.append("  as in one process" if result["equal"] else "  NOT as in one process")
    return "\n".join(lines)


def growth(results: Sequence[dict[str, Any]]) -> str:
    """Format how memory of the largest rank changes with length and ranks."""
    lines = [
        f"\n{'ranks':>6}{'tokens':>12}{'peak PSS':>12}{'peak RSS':>12}{'step':>12}  of the largest rank, GiB"
    ]
    for result in results:
        cells = "".join(
            f"{format_gib(max(result[name])):>12}" for name in ("peak_pss", "peak_rss", "step_rss")
        )
        lines.append(f"{result['ranks']:>6}{result['tokens']:>12,}{cells}")
    first, last = (max(results[index]["peak_rss"]) for index in (0, -1))
    lines.append(f"from the first to the last: {last / first - 1:+.1%} (peak RSS)")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
