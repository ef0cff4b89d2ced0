"""Measure traffic, time and memory of dynamic sequence parallelism (DSP) and the baselines; starts its own ranks.

    python scripts/bench/sequence.py --ranks 1 2 4
    python scripts/bench/sequence.py --preset S --frames 16 32 --output bench.json --plot bench.png
    sudo python scripts/bench/sequence.py --ranks 2 --methods dsp dsp-overlap --rate 200mbit 1gbit 4gbit

Bytes are counted where the collectives are called, on the rank that sends most, and printed beside the formula of
stdit/parallel/README.md (with a ~ if sizes do not divide evenly). "compute" is the time of the same step with
exchanges that move nothing. A single rank runs the code path of DSP; "overhead" is its time relative to the same step
without that path. With --rate, each rank runs in a network namespace of its own, and sends and receives at most that
rate, which needs Linux, root, ip and tc. --grids adds grids of the ranks to the methods: some, all, or auto, the one
that is chosen for a rate.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import output_file, positive_int
from scripts.bench.sequence_rank import grid_of
from scripts.network import LOOPBACK, Network, NoLinkError, limited_link, megabits
from scripts.plots import empty_figure
from stdit.cli import run, script_parser
from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load
from stdit.parallel.config import ParallelConfig
from stdit.parallel.processes.mesh import parallel_dims
from stdit.parallel.sequence.planner import ParallelDims
from stdit.parallel.sequence.stages import grids, ulysses_size
from stdit.parallel.sequence.traffic import estimate_traffic

ROOT = Path(__file__).parents[2]
METHODS = (
    "dsp",
    "dsp-overlap",
    "dsp-paired",
    "ulysses",
    "ulysses-all",
    "usp",
    "ring",
    "megatron",
    "lasp-ring",
)
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are ended and links removed
    args = parse_args()
    settings = settings_of(args)
    for rate in args.rate:
        megabits(rate)
    results = [] if args.rate else [measure(settings, ranks, LOOPBACK) for ranks in args.ranks]
    for rate in args.rate:
        try:
            for ranks in [count for count in args.ranks if count > 1] or [2]:
                with limited_link(rate, ranks) as link:
                    results.append(measure(settings, ranks, link))
        except NoLinkError as error:
            print(f"--rate {rate}: skipped: {error}")
    for result in results:
        print(table(result, settings))
    if args.output:
        args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    if args.plot and results:
        plot(results, args.plot)


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--ranks", type=positive_int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)"
    )
    parser.add_argument(
        "--methods", choices=METHODS, nargs="*", help="methods to measure (all that know --blocks)"
    )
    parser.add_argument(
        "--grids", nargs="+", default=[], help="grids to measure, too: TIMExSPACE, such as 2x2, all, or auto"
    )
    parser.add_argument("--blocks", default="S T", help="pattern of the blocks (S T)")
    parser.add_argument(
        "--tflops", type=float, default=0.02, help="TFLOP/s of a rank, for --grids auto (0.02)"
    )
    parser.add_argument(
        "--latency_us", type=float, default=1000, help="microseconds of an exchange, likewise (1000)"
    )
    parser.add_argument("--preset", choices=PRESETS, help="take width, heads and depth from configs/models")
    parser.add_argument("--hidden_size", type=positive_int, help="width D (64)")
    parser.add_argument("--num_heads", type=positive_int, help="attention heads (4)")
    parser.add_argument("--depth", type=positive_int, help="pairs of blocks (4)")
    parser.add_argument("--frames", type=positive_int, nargs="+", default=[16], help="latent frames T (16)")
    parser.add_argument("--height", type=positive_int, default=16, help="latent rows; a patch has 2 (16)")
    parser.add_argument("--width", type=positive_int, default=16, help="latent columns; a patch has 2 (16)")
    parser.add_argument("--batch", type=positive_int, default=1, help="videos B (1)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of weights and tokens (fp32)"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="activation checkpointing in timed steps"
    )
    parser.add_argument("--overlap_chunks", type=positive_int, default=4, help="chunks of dsp-overlap (4)")
    parser.add_argument("--steps", type=positive_int, default=5, help="timed steps per method (5)")
    parser.add_argument("--warmup", type=positive_int, default=2, help="steps before them (2)")
    parser.add_argument("--threads", type=positive_int, default=1, help="threads per rank (1)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU for each rank"
    )
    parser.add_argument("--rate", nargs="+", default=[], help="rates of links, such as 200mbit 1gbit")
    parser.add_argument("--output", type=output_file, help="JSON file for all figures")
    parser.add_argument("--plot", type=output_file, help="picture of bytes and times; needs matplotlib")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are sent to every rank. Raises UserError if the sizes make no model."""
    model: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "depth": 4}
    if args.preset:
        preset = yaml.safe_load((ROOT / "configs" / "models" / f"{args.preset}.yaml").read_text())["model"]
        model = {name: preset[name] for name in model}
    model |= {name: getattr(args, name) for name in model if getattr(args, name)}
    config = STDiTConfig(**model, blocks=args.blocks)
    if args.methods is None:
        args.methods = [name for name in METHODS if set(config.kinds) <= set(_known_kinds(name))]
    own = {"ranks", "preset", "rate", "output", "plot", *model}
    for name in args.grids:
        if name not in ("all", "auto") and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
            raise UserError(f"--grids {name}: must be TIMExSPACE, such as 2x2, all or auto")
        sizes = name.split("x")
        if len(sizes) == 2 and prod(map(int, sizes)) not in args.ranks:
            raise UserError(
                f"--grids {name}: has {prod(map(int, sizes))} ranks, but --ranks are "
                f"{' '.join(map(str, args.ranks))}: let the two numbers multiply to one of these"
            )
    for name in args.methods:
        if odd := sorted(set(config.kinds) - set(_known_kinds(name))):
            raise UserError(
                f"--methods {name} with --blocks {config.blocks!r}: it cannot share blocks of kind {', '.join(odd)}"
            )
    return {"model": model, **{name: value for name, value in vars(args).items() if name not in own}}


def _known_kinds(method: str) -> str:
    """Return the kinds of blocks that a method can share; dsp-paired has a pattern of its own."""
    if method in ("dsp", "dsp-overlap"):
        return "STJL"
    return "SL" if method == "lasp-ring" else "ST"


def measure(settings: dict[str, Any], ranks: int, network: Network) -> dict[str, Any]:
    """Run the benchmark on ``ranks`` ranks, and return its figures with those of the formulas."""
    gbit = megabits(network.name) / 1000 if network.prefixes else 8.0
    parallel = ParallelConfig(link_gbit=gbit, latency_us=settings["latency_us"], tflops=settings["tflops"])
    dims = parallel_dims(parallel, ranks, ranks, settings["device"] == "cpu")
    settings = {
        **settings,
        "methods": ["dsp"] if ranks == 1 else [*settings["methods"], *_grids(settings["grids"], ranks)],
        "speeds": dims.speeds,
    }
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        run_ranks({**settings, "figures": str(figures)}, ranks, network, Path(folder))
        result = json.loads(figures.read_text())
    for row in result["rows"]:
        row["formula"] = formula(row["method"], settings, row["frames"], dims)
    return {"ranks": ranks, "link": network.name, "speeds": dims.speeds, **result}


def _grids(names: list[str], ranks: int) -> Iterator[str]:
    """Yield the methods that ``--grids`` asks for."""
    for name in names:
        if name == "all":
            yield from (f"grid {grid.time}x{grid.space}" for grid in grids(ranks))
        elif name == "auto" or prod(map(int, name.split("x"))) == ranks:
            yield f"grid {name}"


def run_ranks(
    settings: dict[str, Any],
    ranks: int,
    network: Network,
    folder: Path,
    script: str = "sequence_rank.py",
    watch: Callable[[Sequence[int]], object] = lambda pids: None,
) -> None:
    """Run a script on every rank; if one fails, end all, and raise UserError with its last lines.

    Args:
        script: in scripts/bench; it gets the settings as JSON.
        watch: called ten times a second with the ids of the processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | network.environment | {"MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    environment |= {"OMP_NUM_THREADS": str(settings["threads"])}
    command = [sys.executable, str(ROOT / "scripts" / "bench" / script), json.dumps(settings)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            prefix = network.prefixes[rank] if network.prefixes else []
            with (folder / f"{rank}.err").open("wb") as errors:
                of_rank = environment | {"RANK": str(rank)}
                processes.append(subprocess.Popen([*prefix, *command], env=of_rank, stderr=errors))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            watch([process.pid for process in processes])
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        if code:
            lines = (folder / f"{rank}.err").read_text(errors="replace").strip().splitlines()
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(
                f"rank {rank} of {ranks} ended with code {code}: " + "\n".join(said or lines[-5:])
            )


def formula(method: str, settings: dict[str, Any], frames: int, dims: ParallelDims) -> dict[str, Any]:
    """Return the bytes that a rank sends in forward, in backward, and in backward with activation checkpointing.

    M is the size of the tokens; see stdit/parallel/README.md. The last switch back to whole frames carries the output
    only: 4 channels of a patch of 2 x 2.
    """
    if method.startswith("grid"):
        return _formula_of_grid(method, settings, frames, dims)
    config = STDiTConfig(**settings["model"], blocks=settings["blocks"])
    if method in ("dsp", "dsp-overlap") and config.blocks != "S T":
        return _formula_of_grid(f"grid {dims.sp}x1", settings, frames, dims)
    N, pairs, D = dims.sp, settings["model"]["depth"], settings["model"]["hidden_size"]
    heads = settings["model"]["num_heads"]
    U = ulysses_size(N, heads)
    state = 4 * settings["batch"] * D * (D // heads + 1)
    S = -(-settings["height"] // 2) * -(-settings["width"] // 2)
    tokens = settings["batch"] * frames * S * {"fp32": 4, "bf16": 2}[settings["precision"]]
    M, output = tokens * D, tokens * 4 * 2 * 2
    S_blocks, T_blocks, L_blocks = (config.kinds.count(kind) for kind in "STL")
    ring_of_parts = T_blocks * 2 * M / N * (N / U - 1)
    sent = {
        "dsp": ((2 * pairs - 1) * M + output) / N * (N - 1) / N,
        "dsp-paired": (pairs * M + pairs % 2 * output) / N * (N - 1) / N,
        "ulysses": T_blocks * 4 * M / N * (N - 1) / N,
        "ulysses-all": (S_blocks + T_blocks) * 4 * M / N * (N - 1) / N,
        "usp": (S_blocks + T_blocks) * 4 * M / N * (U - 1) / U + ring_of_parts,
        "ring": T_blocks * 2 * M * (N - 1) / N,
        "megatron": (S_blocks + T_blocks) * 4 * M * (N - 1) / N,
        "lasp-ring": L_blocks * (N - 1) * state,
    }
    forward = sent["dsp" if method == "dsp-overlap" else method]
    backward = forward + {"ring": forward, "usp": ring_of_parts}.get(method, 0)
    repeated = 0 if method.startswith("dsp") else forward
    even = not (frames % N or S % N or heads % N)
    return {"forward": forward, "backward": backward, "checkpointing": backward + repeated, "exact": even}


def _formula_of_grid(
    method: str, settings: dict[str, Any], frames: int, dims: ParallelDims
) -> dict[str, Any]:
    """Return what the busiest rank of a grid sends; exact for any sizes."""
    config = STDiTConfig(**settings["model"], blocks=settings["blocks"], in_channels=4, pred_sigma=False)
    dims = replace(dims, grid=grid_of(method, dims.sp))
    found = {}
    for saved in ("keep", "recompute"):
        load = batch_load(
            config,
            (frames, settings["height"], settings["width"]),
            settings["batch"],
            {"fp32": 4, "bf16": 2}[settings["precision"]],
            saved=saved,  # type: ignore[arg-type]
        )
        found[saved] = [estimate_traffic(load, dims, rank) for rank in range(dims.sp)]
    return {
        "forward": max(sent.forward for sent in found["keep"]),
        "backward": max(sent.backward for sent in found["keep"]),
        "checkpointing": max(sent.backward for sent in found["recompute"]),
        "exact": True,
    }


def table(result: dict[str, Any], settings: dict[str, Any]) -> str:
    """Format the figures of one number of ranks as a table, with a line for each method and length."""
    rate = (
        f", {result['mbit_per_s']:.0f} Mbit/s and {result['latency_us']:.0f} us measured"
        if result["mbit_per_s"]
        else ""
    )
    pairs, timed = settings["model"]["depth"], "on" if settings["checkpointing"] else "off"
    lines = [
        f"\n{result['ranks']} rank(s), {result['link']}{rate}; {pairs} pair(s) of blocks; checkpointing {timed} in "
        "times and memory\nMB that a rank sends per step, measured | formula, and calls, forward + backward",
        f"{'':<12}{'':>7}{'forward':>18}{'backward':>18}{'.. checkpointing':>18}{'calls':>9}{'step':>11}"
        f"{'compute':>11}{'peak':>9}",
    ]
    for row in result["rows"]:
        plain, repeated = row["plain"], row["checkpointing"]
        cells = [
            _measured_and_formula(plain["forward"]["bytes"], row, "forward"),
            _measured_and_formula(plain["backward"]["bytes"], row, "backward"),
            _measured_and_formula(repeated["backward"]["bytes"], row, "checkpointing"),
        ]
        calls = f"{plain['forward']['calls']}+{plain['backward']['calls']}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f} MB"
        lines.append(
            f"{row['method']:<12}{'T ' + str(row['frames']):>7}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{calls:>9}{1e3 * row['seconds']:>8.1f} ms{1e3 * row['compute_seconds']:>8.1f} ms{peak:>9}"
        )
    lines += [
        f"share of the wait that overlap hides at T {frames}: {share:.0%}"
        for frames, share in hidden_shares(result).items()
    ]
    if "overhead" in result:
        lines.append(f"overhead of DSP's path on one rank: {result['overhead'] - 1:+.2%}")
    return "\n".join(lines)


def _measured_and_formula(measured: int, row: dict[str, Any], name: str) -> str:
    """Format measured and expected MB."""
    about = "" if row["formula"]["exact"] else "~"
    return f"{measured / 1e6:.3f} | {about}{row['formula'][name] / 1e6:.3f}"


def hidden_shares(result: dict[str, Any]) -> dict[int, float]:
    """Return, by number of frames, the share of DSP's wait for exchanges that overlap hides.

    Left out if the wait is less than a twentieth of the step, where the figure would be noise.
    """
    at = {(row["method"], row["frames"]): row for row in result["rows"]}
    shares = {}
    for (method, frames), row in at.items():
        waited = row["seconds"] - row["compute_seconds"]
        if method == "dsp" and ("dsp-overlap", frames) in at and waited > 0.05 * row["seconds"]:
            shares[frames] = (row["seconds"] - at["dsp-overlap", frames]["seconds"]) / waited
    return shares


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot bytes and times of a step: against ranks and frames, or if links were limited, for each of these."""
    if (figure := empty_figure(10, 8)) is None:
        return
    if results[0]["link"] == LOOPBACK.name:
        plot_sizes(results, figure)
    else:
        plot_links(results, figure)
    figure.savefig(path)


def plot_links(results: list[dict[str, Any]], figure: Any) -> None:
    """Plot bytes and times of each method as bars, for the longest videos on most ranks; times for each link."""
    ranks, frames = results[-1]["ranks"], results[-1]["rows"][-1]["frames"]
    links = {
        result["link"]: {row["method"]: row for row in result["rows"] if row["frames"] == frames}
        for result in results
        if result["ranks"] == ranks
    }
    methods = list(next(iter(links.values())))
    sent, times = figure.subplots(2, 1, sharex=True)
    for method, row in next(iter(links.values())).items():
        megabytes = sum(part["bytes"] for part in row["plain"].values()) / 1e6
        sent.bar(method, megabytes, color="tab:gray")
    for index, (link, rows) in enumerate(links.items()):
        places = [place + (index - (len(links) - 1) / 2) * 0.8 / len(links) for place in range(len(methods))]
        seconds = [1e3 * rows[method]["seconds"] for method in methods]
        times.bar(places, seconds, 0.8 / len(links), label=link)
    sent.set(ylabel="MB sent by a rank per step", yscale="log", title=f"{ranks} ranks, {frames} frames")
    times.set(ylabel="ms per step", yscale="log")
    times.legend()
    times.tick_params(axis="x", rotation=45)


def plot_sizes(results: list[dict[str, Any]], figure: Any) -> None:
    """Plot bytes and times against the number of ranks, and against the number of frames."""
    panels = figure.subplots(2, 2)
    points = [
        {"ranks": result["ranks"], **row, "mb": sum(p["bytes"] for p in row["plain"].values()) / 1e6}
        for result in results
        for row in result["rows"]
    ]
    most_ranks, most_frames = (max(point[axis] for point in points) for axis in ("ranks", "frames"))
    for column, (axis, fixed) in enumerate(
        (("ranks", ("frames", most_frames)), ("frames", ("ranks", most_ranks)))
    ):
        for row, (value, label) in enumerate(
            (("mb", "MB sent by a rank per step"), ("seconds", "seconds per step"))
        ):
            panel = panels[row][column]
            for method in dict.fromkeys(point["method"] for point in points):
                chosen = [p for p in points if p["method"] == method and p[fixed[0]] == fixed[1]]
                if chosen:
                    panel.plot([p[axis] for p in chosen], [p[value] for p in chosen], "o-", label=method)
            panel.set(xlabel=axis, ylabel=label, title=f"{fixed[1]} {fixed[0]}")
            panel.set_ylim(bottom=0)
    panels[0][0].legend()


if __name__ == "__main__":
    run(main)
