"""Simulate a training step on many GPUs, from counted bytes and floating-point operations; runs on any machine.

    python scripts/bench/simulate.py
    python scripts/bench/simulate.py --gpus 8 64 512 --frames 64 --height 90 --width 160 --network_gbit 200
    sudo python scripts/bench/sequence.py --ranks 4 --grids all --rate 200mbit 1gbit --output bench.json
    python scripts/bench/simulate.py --check bench.json

For each number of GPUs, number of ranks that share a video (sp) and grid of these ranks, it prints the seconds of:

- computation: operations of the rank with most tokens, block by block, as torch counts them, at --tflops; with
  --checkpointing a third more. A video for each group of sp ranks.
- exchanges of the ranks that share a video: calls times --latency_us, and of the bytes that the first rank sends, as
  counted by stdit/parallel/sequence/traffic.py, the share for ranks of its node at --node_gbit and for others at
  --network_gbit, whichever takes longer. Neighbours share a node. Nothing is overlapped with computation.
- averaging of gradients in float32: a ring in each node, and one across nodes for the share of each GPU.

"of ideal" is the time in which the GPUs would do the operations without waiting, over the step. The grid that
parallel.grid auto chooses for the link has a star.

--check compares with steps that scripts/bench/sequence.py measured, for all grids: for each number of ranks the speed
of one is taken from the first step measured, without its exchanges, and rate and latency of the link from the
exchanges that it timed alone. The rest is predicted.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scripts.arguments import output_file, positive_int, preset_file
from scripts.bench.sequence_rank import grid_of
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, count_on_meta, training_flops
from stdit.parallel.sequence.layouts import Grid
from stdit.parallel.sequence.planner import FLOAT32_BYTES, ParallelDims, Workload
from stdit.parallel.sequence.stages import Speeds, grids
from stdit.parallel.sequence.traffic import exchanges_of_a_clip, sent_for_a_clip

TEXT_TOKENS = 300


@dataclass(frozen=True)
class Machine:
    """What the GPUs and their links reach."""

    tflops: float
    """TFLOP/s of a GPU."""
    node: int
    """GPUs of a node."""
    node_gbit: float
    """Gbit/s that a GPU sends to those of its node."""
    network_gbit: float
    """Gbit/s that a GPU sends to those of other nodes."""
    latency_us: float
    """Microseconds that an exchange takes besides its bytes."""

    def speeds(self, ranks: int) -> Speeds:
        """Return what each of some ranks computes and sends, in values of bfloat16."""
        gbit = self.node_gbit if ranks <= self.node else self.network_gbit
        values = gbit * 1e9 / 8 / 2  # per second
        return Speeds(self.tflops * 1e12 / values, self.latency_us / 1e6 * values)


class Flops(NamedTuple):
    """Floating-point operations of a clip, forward and backward."""

    of_block: dict[str, int]
    """Of a block of each kind."""
    rest: int
    """Of everything else."""


class Seconds(NamedTuple):
    """Times of a step."""

    compute: float
    exchange: float
    gradients: float

    @property
    def step(self) -> float:
        return sum(self)


def main() -> None:
    args = parse_args()
    machine = machine_of(args)
    if args.check:
        check(args.check, args.latency_us)
        return
    config = model_of(args.model, args.blocks)
    for sp in args.sp or ():
        if all(gpus % sp for gpus in args.gpus):
            raise UserError(
                f"--sp {sp}: divides none of --gpus {' '.join(map(str, args.gpus))}: choose a divisor"
            )
    figures = list(simulate_all(args, config, machine))
    print(
        f"{args.model}, blocks {config.blocks}, {args.frames} x {args.height} x {args.width} latents; a GPU: "
        f"{machine.tflops:g} TFLOP/s, {machine.node_gbit:g} Gbit/s in nodes of {machine.node}, "
        f"{machine.network_gbit:g} Gbit/s between them, {machine.latency_us:g} us a call"
    )
    head = (
        "GPUs",
        "sp",
        "dp",
        "grid",
        "tokens",
        "MB sent",
        "calls",
        "compute s",
        "exchange s",
        "gradients s",
    )
    print("".join(f"{name:>12}" for name in (*head, "step s", "of ideal")))
    for found in figures:
        print(
            f"{found['gpus']:>12,}{found['sp']:>12,}{found['dp']:>12,}{found['grid'] + found['chosen']:>12}"
            f"{found['tokens']:>12,}{found['megabytes']:>12,.1f}{found['calls']:>12,}{found['compute']:>12.3f}"
            f"{found['exchange']:>12.3f}{found['gradients']:>12.3f}{found['step']:>12.3f}{found['of_ideal']:>12.0%}"
        )
    if args.output:
        settings = {"model": args.model, "blocks": config.blocks, **asdict(machine)}
        args.output.write_text(json.dumps({"settings": settings, "figures": figures}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--model", default="XL-2", help="preset of configs/models (XL-2)")
    parser.add_argument("--blocks", help="pattern of the blocks (that of the preset)")
    parser.add_argument("--frames", type=positive_int, default=64, help="latent frames of a video (64)")
    parser.add_argument("--height", type=positive_int, default=90, help="latent rows (90: 720p)")
    parser.add_argument("--width", type=positive_int, default=160, help="latent columns (160: 720p)")
    parser.add_argument(
        "--gpus", type=positive_int, nargs="+", default=[8, 32, 128, 512, 2048], help="numbers of GPUs"
    )
    parser.add_argument(
        "--sp",
        type=positive_int,
        nargs="+",
        help="ranks that share a video, of those that divide (8, and all)",
    )
    parser.add_argument(
        "--all_grids", action="store_true", help="show all grids, not the chosen one and DSP's"
    )
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--tflops", type=float, default=400, help="TFLOP/s that a GPU reaches (400)")
    parser.add_argument("--node", type=positive_int, default=8, help="GPUs of a node (8)")
    parser.add_argument("--node_gbit", type=float, default=3200, help="Gbit/s in a node (3200: NVLink)")
    parser.add_argument(
        "--network_gbit", type=float, default=400, help="Gbit/s between nodes, for each GPU (400: InfiniBand)"
    )
    parser.add_argument(
        "--latency_us", type=float, help="microseconds of an exchange (20; --check: as measured)"
    )
    parser.add_argument("--check", type=Path, help="JSON of scripts/bench/sequence.py to compare with")
    parser.add_argument("--output", type=output_file, help="JSON file for the figures")
    return parser.parse_args()


def machine_of(args: argparse.Namespace) -> Machine:
    """Return the speeds in arguments. Raises UserError if one is not positive."""
    speeds = {name: getattr(args, name) for name in ("tflops", "node_gbit", "network_gbit")}
    for name, value in speeds.items():
        if not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: must be positive")
    latency = 20 if args.latency_us is None else args.latency_us
    if not 0 <= latency < math.inf:
        raise UserError(f"--latency_us {latency:g}: must be 0 or more")
    return Machine(**speeds, node=args.node, latency_us=latency)


def model_of(preset: str, blocks: str | None) -> STDiTConfig:
    """Return the settings of a preset. Raises UserError if there is none."""
    settings = yaml.safe_load(preset_file(preset).read_text(encoding="utf-8"))["model"]
    return STDiTConfig(**{**settings, **({"blocks": blocks} if blocks else {})})


def simulate_all(args: argparse.Namespace, config: STDiTConfig, machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield the figures of each number of GPUs, sp and grid."""
    shape = (args.frames, args.height, args.width)
    flops, parameters = count_flops(config, shape), count_on_meta(config)
    saved = "recompute" if args.checkpointing else "keep"
    load = batch_load(config, shape, 1, element_size=2, saved=saved)  # type: ignore[arg-type]
    for gpus in args.gpus:
        for sp in dict.fromkeys(args.sp or (8, gpus)):
            if gpus % sp:
                continue
            dims = ParallelDims(sp, sp, speeds=machine.speeds(sp))
            chosen = dims.grid_of(load)
            for grid in grids(sp) if args.all_grids else dict.fromkeys((Grid(sp, 1), chosen)):
                here = replace(dims, grid=grid)
                times = simulate(load, flops, here, machine)
                times = times._replace(gradients=averaging_seconds(parameters, gpus, machine))
                ideal = total_flops(flops, load) / sp / machine.tflops / 1e12
                sent = sent_for_a_clip(load, here, 0)
                yield {
                    **{"gpus": gpus, "sp": sp, "dp": gpus // sp, "grid": str(grid)},
                    "chosen": " *" if grid == chosen else "",
                    "tokens": load.frames * load.patches // sp,
                    "megabytes": (sent.forward + sent.backward) / 1e6,
                    "calls": sent.calls,
                    **times._asdict(),
                    "step": times.step,
                    "of_ideal": ideal / times.step,
                }


def count_flops(config: STDiTConfig, latent_shape: tuple[int, int, int]) -> Flops:
    """Return the operations of a clip, from models of few blocks."""

    def count(blocks: str) -> int:
        few = replace(config, depth=len(blocks) // 2, blocks=" ".join(blocks))
        return training_flops(few, 1, latent_shape, min(TEXT_TOKENS, config.model_max_length))

    twice = {kind: count(2 * kind) for kind in set(config.kinds)}
    of_block = {kind: (count(4 * kind) - two) // 2 for kind, two in twice.items()}
    kind = config.kinds[0]
    return Flops(of_block, twice[kind] - 2 * of_block[kind])


def total_flops(flops: Flops, load: Workload) -> float:
    """Return the operations of all ranks for a clip, with those that activation checkpointing repeats."""
    return _passes(load) * sum(flops.of_block[kind] for kind in load.kinds) + flops.rest


def _passes(load: Workload) -> float:
    """Return forward and backward of a block, with what checkpointing repeats, over these alone."""
    return 4 / 3 if load.saved == "recompute" else 1


def simulate(load: Workload, flops: Flops, dims: ParallelDims, machine: Machine) -> Seconds:
    """Return the seconds of a step on clips that ``dims.sp`` ranks share, without those of averaging gradients."""
    tokens = load.frames * load.patches
    stages = dims.stages(load)
    share = {
        layout: max(each.size for each in dims.tokens(load, layout)) / tokens
        for layout in {stage.layout for stage in stages}
    }
    operations = sum(_passes(load) * flops.of_block[stage.kind] * share[stage.layout] for stage in stages)
    operations += flops.rest * share[stages[0].layout]
    exchange = 0.0
    for ranks, sent in exchanges_of_a_clip(load, dims, 0):
        near = sum(rank // machine.node == 0 for rank in ranks) - 1  # this is rank 0
        bits = 8 * load.clips * (sent.forward + sent.backward)
        far = bits * (len(ranks) - 1 - near) / max(1, len(ranks) - 1)
        waited = max((bits - far) / machine.node_gbit, far / machine.network_gbit) / 1e9
        exchange += waited + sent.calls * machine.latency_us / 1e6
    return Seconds(load.clips * operations / machine.tflops / 1e12, exchange, 0.0)


def averaging_seconds(parameters: int, gpus: int, machine: Machine) -> float:
    """Return the seconds of an all-reduce over all GPUs: in each node, and across nodes of the share of a GPU."""
    bits, in_node = 8 * FLOAT32_BYTES * parameters, min(gpus, machine.node)
    nodes = -(-gpus // machine.node)
    near = 2 * bits * (in_node - 1) / in_node / machine.node_gbit
    far = 2 * bits / in_node * (nodes - 1) / nodes / machine.network_gbit
    return (near + far) / 1e9


def check(path: Path, latency_us: float | None) -> None:
    """Compare with measured steps. Raises UserError if a file has none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings, results = found["settings"], found["results"]
        rows = [(result, row) for result in results for row in result["rows"] if result["ranks"] > 1]
    except OSError as error:
        raise UserError(f"--check {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--check {path}: is no file that sequence.py --output wrote") from None
    rows = [(result, row) for result, row in rows if row["method"] == "dsp" or _is_grid(row["method"])]
    if not rows:
        raise UserError(f"--check {path}: has no steps on several ranks: measure with --ranks 4 --grids all")
    config = STDiTConfig(
        **settings["model"],
        blocks=settings["blocks"],
        pred_sigma=False,
        caption_channels=64,
        model_max_length=16,
    )
    speeds: dict[int, float] = {}  # TFLOP/s of a rank, by the number of ranks, which may share cores
    print(f"{'link':<12}{'ranks':>5}  {'method':<14}{'measured ms':>12}{'predicted ms':>14}{'ratio':>8}")
    for result, row in rows:
        shape = (row["frames"], settings["height"], settings["width"])
        flops = count_flops(config, shape)
        saved = "recompute" if settings["checkpointing"] else "keep"
        size = {"fp32": 4, "bf16": 2}[settings["precision"]]
        load = batch_load(config, shape, settings["batch"], size, saved=saved)  # type: ignore[arg-type]
        grid = grid_of(row["method"], result["ranks"])
        dims = ParallelDims(result["ranks"], result["ranks"], grid=grid, speeds=Speeds(*result["speeds"]))
        if dims.sp not in speeds:
            at_one = simulate(load, flops, dims, Machine(1, 1, 1, 1, 0)).compute  # seconds at 1 TFLOP/s
            speeds[dims.sp] = at_one / row["compute_seconds"]
        rate, latency = result["mbit_per_s"] / 1000, latency_us or result["latency_us"]
        seconds = simulate(load, flops, dims, Machine(speeds[dims.sp], 1, rate, rate, latency)).step
        measured = row["seconds"]
        print(
            f"{result['link']:<12}{dims.sp:>5}  {row['method']:<14}{1e3 * measured:>12.1f}{1e3 * seconds:>14.1f}"
            f"{seconds / measured:>8.2f}"
        )


def _is_grid(method: str) -> bool:
    return method.startswith("grid ") and method != "grid auto"


if __name__ == "__main__":
    run(main)
