"""Measure traffic, time and memory of dynamic sequence parallelism (DSP) and the baselines; starts its own ranks.

    python scripts/bench/sequence.py --ranks 1 2 4
    python scripts/bench/sequence.py --preset S --frames 16 32 --output bench.json --plot bench.png
    sudo python scripts/bench/sequence.py --ranks 2 --methods dsp dsp-overlap --rate 200mbit 1gbit 4gbit

Bytes are counted where the collectives are called, on the rank that sends most, and printed beside the formula of
stdit/parallel/README.md (with a ~ if sizes do not divide evenly). "compute" is the time of the same step with
exchanges that move nothing. A single rank runs the code path of DSP; "overhead" is its time relative to the same step
without that path. With --rate, two ranks run in two network namespaces joined by a link of that rate, which needs
Linux, root, ip and tc; without it, any number of ranks run on this machine.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.arguments import positive_int
from scripts.network import LOOPBACK, Network, NoLinkError, limited_link, megabits
from stdit.cli import run, script_parser
from stdit.errors import UserError, install_command
from stdit.models.config import STDiTConfig

ROOT = Path(__file__).parents[2]
METHODS = ("dsp", "dsp-overlap", "dsp-paired", "ulysses", "ulysses-all", "ring", "megatron")
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
            with limited_link(rate) as link:
                results.append(measure(settings, 2, link))
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
        "--methods", choices=METHODS, nargs="+", default=list(METHODS), help="methods to measure (all)"
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
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--plot", type=Path, help="picture of bytes and times; needs matplotlib")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are sent to every rank. Raises UserError if the sizes make no model."""
    model: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "depth": 4}
    if args.preset:
        preset = yaml.safe_load((ROOT / "configs" / "models" / f"{args.preset}.yaml").read_text())["model"]
        model = {name: preset[name] for name in model}
    model |= {name: getattr(args, name) for name in model if getattr(args, name)}
    STDiTConfig(**model)
    own = {"ranks", "preset", "rate", "output", "plot", *model}
    return {"model": model, **{name: value for name, value in vars(args).items() if name not in own}}


def measure(settings: dict[str, Any], ranks: int, network: Network) -> dict[str, Any]:
    """Run the benchmark on ``ranks`` ranks, and return its figures with those of the formulas."""
    if ranks == 1:
        settings = {**settings, "methods": ["dsp"]}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        run_ranks({**settings, "figures": str(figures)}, ranks, network, Path(folder))
        result = json.loads(figures.read_text())
    for row in result["rows"]:
        row["formula"] = formula(row["method"], settings, row["frames"], ranks)
    return {"ranks": ranks, "link": network.name, **result}


def run_ranks(settings: dict[str, Any], ranks: int, network: Network, folder: Path) -> None:
    """Run sequence_rank.py on every rank; if one fails, end all, and raise UserError with its last lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | network.environment | {"MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    environment |= {"OMP_NUM_THREADS": str(settings["threads"])}
    script = [sys.executable, str(ROOT / "scripts" / "bench" / "sequence_rank.py"), json.dumps(settings)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            prefix = network.prefixes[rank] if network.prefixes else []
            with (folder / f"{rank}.err").open("wb") as errors:
                of_rank = environment | {"RANK": str(rank)}
                processes.append(subprocess.Popen([*prefix, *script], env=of_rank, stderr=errors))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        if code:
            lines = (folder / f"{rank}.err").read_text(errors="replace").strip().splitlines()
            raise UserError(f"rank {rank} of {ranks} ended with code {code}: " + "\n".join(lines[-5:]))


def formula(method: str, settings: dict[str, Any], frames: int, ranks: int) -> dict[str, Any]:
    """Return the bytes that a rank sends in forward, in backward, and in backward with activation checkpointing.

    M is the size of the tokens; see stdit/parallel/README.md. The last switch back to whole frames carries the output
    only: 4 channels of a patch of 2 x 2.
    """
    N, pairs, D = ranks, settings["model"]["depth"], settings["model"]["hidden_size"]
    S = -(-settings["height"] // 2) * -(-settings["width"] // 2)
    tokens = settings["batch"] * frames * S * {"fp32": 4, "bf16": 2}[settings["precision"]]
    M, output = tokens * D, tokens * 4 * 2 * 2
    if method == "dsp-paired":
        forward = (pairs * M + pairs % 2 * output) / N
    elif method.startswith("dsp"):
        forward = ((2 * pairs - 1) * M + output) / N
    else:
        forward = (
            pairs * {"ulysses": 4 * M / N, "ulysses-all": 8 * M / N, "ring": 2 * M, "megatron": 8 * M}[method]
        )
    forward *= (N - 1) / N
    backward = 2 * forward if method == "ring" else forward
    repeated = 0 if method.startswith("dsp") else forward
    even = not (frames % N or S % N or settings["model"]["num_heads"] % N)
    return {"forward": forward, "backward": backward, "checkpointing": backward + repeated, "exact": even}


def table(result: dict[str, Any], settings: dict[str, Any]) -> str:
    """Format the figures of one number of ranks as a table, with a line for each method and length."""
    rate = f", {result['mbit_per_s']:.0f} Mbit/s measured" if result["mbit_per_s"] else ""
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
    """Plot bytes and times of a step against the number of ranks, and against the number of frames."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"--plot: skipped: matplotlib is not installed: {install_command('plot')}")
        return
    figure = Figure(figsize=(10, 8), layout="constrained")
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
            for method in METHODS:
                chosen = [p for p in points if p["method"] == method and p[fixed[0]] == fixed[1]]
                if chosen:
                    panel.plot([p[axis] for p in chosen], [p[value] for p in chosen], "o-", label=method)
            panel.set(xlabel=axis, ylabel=label, title=f"{fixed[1]} {fixed[0]}")
            panel.set_ylim(bottom=0)
    panels[0][0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
