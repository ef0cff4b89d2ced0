"""One rank of sequence.py, which starts it: measures each method; rank 0 writes the figures as JSON.

    python scripts/bench/sequence_rank.py '{"methods": ["dsp"], ...}'

A step is forward, loss and backward of one batch on a rank's frames; averaging gradients and the optimizer step are
the same for all methods, and excluded. Takes RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment.
"""

import ctypes
import ctypes.util
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # where scripts.* is found

from scripts.bench.baselines import BASELINES, apply_baseline
from stdit.cli import run
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective, frame_weights
from stdit.models.stdit import STDiT
from stdit.parallel.sequence import collectives
from stdit.parallel.sequence.group import Group, Traffic
from stdit.parallel.sequence.layouts import Grid, Layout
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.parallel.sequence.stages import Speeds, Stage

CAPTION = {"caption_channels": 64, "model_max_length": 16}


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"], rank if settings["device"] == "cuda" else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = Group.of(dist.group.WORLD) if ranks > 1 else Group()  # type: ignore[arg-type]
    rows = [row for frames in settings["frames"] for row in measure(settings, frames, group, device)]
    figures: dict[str, Any] = {
        "rows": rows,
        **(exchange_speed(device) if ranks > 1 else {"mbit_per_s": None}),
    }
    if ranks == 1:
        figures["overhead"] = overhead(Step("dsp", settings, settings["frames"][0], group, device), settings)
    if rank == 0:
        Path(settings["figures"]).write_text(json.dumps(figures), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


class Step:
    """One training step of one method, on this rank's frames of a random batch."""

    def __init__(
        self, method: str, settings: dict[str, Any], frames: int, group: Group, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["precision"]]
        blocks = "S T T S" if method == "dsp-paired" else settings["blocks"]
        model = STDiT(**settings["model"], **CAPTION, blocks=blocks, pred_sigma=False)
        self.model = model.to(device, dtype)
        chunks = settings["overlap_chunks"] if method == "dsp-overlap" else 1
        self.group = replace(
            group,
            chunks=chunks,
            grid=grid_of(method, group.size),
            speeds=Speeds(*settings["speeds"]),
            traffic=Traffic(),
        )
        size = (frames, settings["height"], settings["width"])
        self.sharding = self.model.token_sharding(self.group, *size, settings["batch"])
        if method in BASELINES:
            self.sharding = apply_baseline(self.model, method, self.sharding)

        batch, self.flow = settings["batch"], FlowObjective(FlowConfig())
        x, noise = torch.randn(2, batch, 4, *size, device=device, dtype=dtype)
        self.t = torch.full((batch, 1), 0.5, device=device, dtype=dtype)
        x_t = self.flow.add_noise(x, noise, self.t)
        self.x, self.noise, self.x_t = (self.sharding.split(whole, dim=2) for whole in (x, noise, x_t))
        self.parts = self.sharding.grid.space  # ranks that compute the same loss
        weight = frame_weights(torch.zeros(batch, frames, dtype=torch.bool, device=device))
        self.weight = self.sharding.split(weight, dim=1)
        ones = torch.ones(batch, device=device, dtype=dtype)
        self.condition = {
            "timestep": 1000 * self.t,
            "encoder_hidden_states": torch.randn(
                batch, CAPTION["model_max_length"], CAPTION["caption_channels"], device=device, dtype=dtype
            ),
            "fps": 24 * ones,
            "height": 8 * settings["height"] * ones,
            "width": 8 * settings["width"] * ones,
        }

    def checkpointing(self, on: bool) -> None:
        """Turn activation checkpointing on or off."""
        (self.model.enable_gradient_checkpointing if on else self.model.disable_gradient_checkpointing)()

    def forward(self, sharding: TokenSharding | None = None) -> Tensor:
        """Return the loss of this rank's frames."""
        self.model.zero_grad()
        output = self.model(self.x_t, **self.condition, sharding=sharding or self.sharding).sample
        return self.flow.loss(output, self.x - self.noise, self.x_t, self.t, self.weight).mean() / self.parts

    def __call__(self, sharding: TokenSharding | None = None) -> None:
        self.forward(sharding).backward()


def grid_of(method: str, ranks: int) -> Grid | None:
    """Return the grid of ``grid 2x2``, that of DSP for other methods, and None for ``grid auto``."""
    name, _, sizes = method.partition(" ")
    if name != "grid":
        return Grid(ranks, 1)
    return None if sizes == "auto" else Grid(*map(int, sizes.split("x")))


def measure(
    settings: dict[str, Any], frames: int, group: Group, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each method at one length; the methods take turns, so that other load slows all alike."""
    steps = {name: Step(name, settings, frames, group, device) for name in settings["methods"]}
    rows = {name: {"method": name, "frames": frames, **count(step)} for name, step in steps.items()}
    for name, step in steps.items():
        step.checkpointing(settings["checkpointing"])
        rows[name]["peak_bytes"] = largest(peak_memory(step, device))
    times: dict[tuple[str, bool], list[float]] = {
        (name, local): [] for name in steps for local in (False, True)
    }
    order = list(times.items())
    for _ in range(settings["warmup"] + settings["steps"]):
        order = [*order[1:], order[0]]  # so that none always begins
        for (name, local), taken in order:
            with without_exchange() if local else nullcontext():
                taken.append(timed(steps[name], device))
    for name, row in rows.items():
        for key, local in (("seconds", False), ("compute_seconds", True)):
            row[key] = slowest_median(times[name, local][settings["warmup"] :])
        yield row


def count(step: Step) -> dict[str, Any]:
    """Return calls and bytes of the busiest rank, forward and backward, with and without activation checkpointing."""
    figures: dict[str, Any] = {}
    for key, checkpointing in (("plain", False), ("checkpointing", True)):
        step.checkpointing(checkpointing)
        traffic, passes = step.group.traffic, {}
        traffic.clear()
        loss = step.forward()
        for name in ("forward", "backward"):
            if name == "backward":
                loss.backward()
            passes[name] = {
                "calls": largest(traffic.calls.total()),
                "bytes": largest(traffic.bytes.total()),
                "bytes_by_kind": dict(traffic.bytes),
            }
            traffic.clear()
        figures[key] = passes
    return figures


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a step that all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def without_exchange() -> Iterator[None]:
    """Replace exchanges by ones that pack and unpack but move nothing: each rank receives its own data."""

    def keep(flat: Tensor, out_sizes: list[int], in_sizes: list[int], name: str) -> Tensor:
        size = sum(out_sizes)
        return flat[:size] if size <= len(flat) else torch.nn.functional.pad(flat, (0, size - len(flat)))

    with (
        patch.object(collectives, "all_to_all_single", keep),
        patch.object(collectives, "wait_tensor", lambda x: x),
    ):
        yield


class DirectSharding(TokenSharding):
    """Calls the stages of the model one after the other, and does nothing else."""

    def switch(self, x: Tensor, source: Layout, target: Layout) -> Tensor:
        return x

    def run_then_switch(
        self, run: Any, x: Tensor, values: Tensor, stage: Stage, following: Stage | None = None
    ) -> Tensor:
        return run(x, values)

    run_last = run_then_switch


def overhead(step: Step, settings: dict[str, Any]) -> float:
    """Return the time of a step on one rank, relative to the same step without the code of `TokenSharding`.

    Both variants take turns, each first every other time; the result is the median of their ratios.
    """
    direct = DirectSharding(step.group, step.sharding.frames, step.sharding.patches)
    ratios = []
    for index in range(settings["warmup"] + 5 * settings["steps"]):
        taken = {}
        for sharding in (step.sharding, direct) if index % 2 else (direct, step.sharding):
            taken[sharding] = timed(lambda sharding=sharding: step(sharding), step.x.device)  # type: ignore[misc]
        ratios.append(taken[step.sharding] / taken[direct])
    return median(ratios[settings["warmup"] :])


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Return the bytes that a step needs above those held before; on CPUs, resident memory as Linux reports it."""
    step.model.zero_grad()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
        before = resident("VmRSS")
        step()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def exchange_speed(device: torch.device) -> dict[str, float]:
    """Return the microseconds of an empty exchange, and the Mbit/s that a rank sends in one of 1 MB to each other."""
    others, medians = dist.get_world_size() - 1, []
    for count in (1, 250_000):
        x = torch.ones(count * (others + 1), device=device)
        taken = [timed(lambda x=x: dist.all_to_all_single(torch.empty_like(x), x), device) for _ in range(8)]  # type: ignore[misc]
        medians.append(slowest_median(taken[1:]))
    return {"latency_us": 1e6 * medians[0], "mbit_per_s": 8 * others / (medians[1] - medians[0])}


def slowest_median(seconds: list[float]) -> float:
    """Return the median over steps of the time of the slowest rank."""
    return median(max(of_step) for of_step in zip(*from_all(seconds), strict=True))


def largest(value: Any) -> Any:
    """Return the maximum over all ranks; None if a rank has none."""
    values = from_all(value)
    return None if None in values else max(values)


def from_all(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    run(main)
