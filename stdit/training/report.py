"""Report what a run will train on, and the memory it needs, before it starts; and what it did, at its end."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stdit.cli import as_started
from stdit.data.plan import BatchPlan
from stdit.data.preparation.placement import write_placements
from stdit.errors import UserError
from stdit.parallel.processes.memory import memory_of_process
from stdit.parallel.processes.mesh import runs_on_cpu
from stdit.parallel.sequence.planner import (
    MIB,
    ParallelDims,
    Workload,
    balance,
    divisors,
    format_gib,
)
from stdit.parallel.sequence.stages import grids
from stdit.parallel.sequence.traffic import estimate_traffic
from stdit.training.build import RunComponents, RunInputs, build_inputs, compare_with_checkpoint
from stdit.training.config import TrainConfig
from stdit.training.early_stopping import EarlyStopping
from stdit.training.fit import choice_lines, fitted
from stdit.training.memory_config import check_processes
from stdit.training.memory_estimate import MemoryEstimate
from stdit.training.run_folder import find_start

_WORLD_SIZES = (1, 2, 4, 8)
"""Numbers of processes to compare if a single one was started."""
_COLUMNS = ("processes", "sp", "dp", "grid", "frames", "patches", "balance", "sent MB", "memory GiB")


def report_of(config: TrainConfig, processes: int) -> str:
    """Return the report of a run on a number of processes, without starting it; write the table of its clips."""
    accelerator = None if runs_on_cpu(config.trainer.device) else torch.accelerator.current_accelerator()
    memory = memory_of_process(accelerator or torch.device("cpu"), config.memory_gib)
    check_processes(config.memory, processes)
    inputs = build_inputs(config, dry_run=True)
    if config.dry_run == "memory":  # also if none of them fits
        print(*choice_lines(inputs, processes), "", sep="\n")
    inputs = fitted(inputs, processes)
    table = config.run_folder.with_name(f"{config.run_folder.name}.clips.csv")
    write_placements(inputs.plan.assignment, table)
    shown = report(inputs, processes, memory, compare_sp=config.dry_run == "sp" or processes > 1)
    return "\n".join([shown, *_resumed_lines(config, inputs.plan), f"bucket of each clip, and why: {table}"])


def _resumed_lines(config: TrainConfig, plan: BatchPlan) -> list[str]:
    """Return what the run would resume from and what has changed since, or why it would not start."""
    try:
        checkpoint = find_start(config)
        return (
            []
            if checkpoint is None
            else [f"the run would be {compare_with_checkpoint(checkpoint, config, plan)}"]
        )
    except UserError as error:
        return [f"the run would not start: {error}"]


def report(inputs: RunInputs, processes: int, memory: int, compare_sp: bool = True) -> str:
    """Return the report: model, batches, clips, values of ``parallel.sp``, and memory.

    Args:
        processes: number of processes that were started.
        memory: bytes that each may use.
        compare_sp: show tables of values of ``parallel.sp``; for a single process as if 1, 2, 4 or 8 were started.

    Raises:
        UserError: if ``parallel.sp`` does not divide the processes.
    """
    config, estimate = inputs.config, MemoryEstimate(inputs)
    split = _asked_split(estimate, processes, memory)
    worlds = _WORLD_SIZES if processes == 1 else (processes,)
    lines = [
        f"model: {estimate.counts.weights:,} parameters ({config.model.depth} x 2 blocks, "
        f"{config.model.blocks}, width {config.model.hidden_size})",
        f"data: {inputs.plan.assignment.kept} clips",
        inputs.plan.report(),
        "",
        *_batch_lines(estimate, split),
        f"steps: {config.trainer.steps}, {config.trainer.steps / inputs.plan.steps_per_epoch:.1f} epochs of "
        f"{inputs.plan.steps_per_epoch}",
        "",
        *(_sharing_lines(estimate, worlds, memory) if compare_sp else ()),
        *estimate.warnings(split),
        *([""] if compare_sp else []),
        _memory_line(estimate.memory(split), split, memory),
        f"run folder: {config.run_folder}",
    ]
    return "\n".join(lines)


def _asked_split(estimate: MemoryEstimate, processes: int, memory: int) -> ParallelDims:
    """Return how the settings share the work, with ``parallel.sp = auto`` as it would be chosen."""
    if estimate.inputs.config.parallel.sp == "auto":
        return estimate.split(processes, estimate.choose_sp(processes, memory).sp)
    return estimate.splits(processes)[0]


def _batch_lines(estimate: MemoryEstimate, split: ParallelDims) -> Iterator[str]:
    for bucket, load in estimate.loads.items():
        part = max(split.clips(load))
        micro = min(load.micro_batch_size or part, part)
        each = load.frames * load.patches
        latents = "x".join(map(str, (estimate.inputs.codec.channels, *estimate.latent_shape(bucket))))
        parts = f"{split.dp} parts of " if split.dp > 1 else ""
        yield (
            f"batch of {bucket}: {load.clips} clips ({parts}{math.ceil(part / micro)} x {micro}), "
            f"latents {latents}, {each:,} tokens a clip, {each * load.clips:,} a step"
        )


def _sharing_lines(estimate: MemoryEstimate, worlds: Sequence[int], memory: int) -> Iterator[str]:
    """Yield a table for each bucket, and what ``parallel.sp = auto`` would choose."""
    for bucket, load in estimate.loads.items():
        yield (
            f"sharing of {bucket}: {load.frames} frames of {load.patches:,} tokens, batches of {load.clips}, "
            "and what a rank has and sends in a step"
        )
        yield "".join(f" {name:>10}" for name in _COLUMNS)
        for processes in worlds:
            for sp in divisors(processes):
                split = estimate.split(processes, sp)
                chosen = split.grid_of(load)
                for grid in [split.grid] if split.grid else grids(sp):
                    mark = " *" if sp > 1 and grid == chosen else ""
                    yield _row(estimate, load, replace(split, grid=grid)) + mark
        yield "  * the fastest grid of these ranks, by what parallel.link_gbit, latency_us and tflops say"
    for processes in worlds:
        yield f"parallel.sp = auto, {processes} processes: {estimate.choose_sp(processes, memory)}"


def _row(estimate: MemoryEstimate, load: Workload, split: ParallelDims) -> str:
    cells: list[object] = [split.processes, split.sp, split.dp, str(split.grid_of(load))]
    if split.dp > load.clips:
        return "".join(f" {cell:>10}" for cell in cells) + f"   cannot split a batch of {load.clips}"
    traffic = max(sum(estimate_traffic(load, split, rank)[:2]) for rank in range(split.processes))
    memory = estimate.total(split, load)
    tokens = split.tokens(load, "grid")
    cells += [_range([each.frames.size for each in tokens]), _range([each.patches.size for each in tokens])]
    cells.append(f"{balance(load, split):.2f}")
    return "".join(f" {cell:>10}" for cell in [*cells, f"{traffic / 1e6:,.1f}", format_gib(memory)])


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least}-{most}"


def _memory_line(held: dict[str, int], split: ParallelDims, memory: int) -> str:
    total = sum(held.values())
    parts = ", ".join(f"{name} {math.ceil(size / MIB):,}" for name, size in held.items())
    where = f" a process, of {split.processes}" if split.processes > 1 else ""
    too_much = f"; more than the available {memory // MIB:,}" if total > memory else ""
    return f"memory: about {math.ceil(total / MIB):,} MiB{where} (an estimate): {parts}{too_much}"


def start_line(components: RunComponents) -> str:
    """Return the first line of a run: its folder, parameters and clips."""
    count = sum(p.numel() for p in components.model.parameters())
    return f"{components.config.run_folder}: {count:,} parameters, {components.plan.assignment.kept} clips"


def end_lines(exported: Path, start_step: int, done: int, config: TrainConfig, early: EarlyStopping) -> str:
    """Return the last lines of a run: what was trained, and how to sample from it.

    Args:
        exported: the folder of the pipeline or adapter.
        start_step: at which it began; ``done``: at which it ended.
    """
    run, steps = exported.parent, config.trainer.steps
    lines = [f"trained for {done} steps: {exported} is written"]
    if start_step > steps:
        lines = [
            f"{run} has {start_step} steps already, and trainer.steps = {steps}: nothing to train. For a run of "
            f"{steps} steps choose another --name"
        ]
    elif early.is_over and done < steps:
        lines = [f"stopped at step {done} of {steps}: {early}", *lines]
    sample = f"{as_started('python sample.py')} --checkpoint {run}"
    prompt = "..." if config.data.trigger is None else f"{config.data.trigger} ..."
    lines.append(f'Sample: {sample} --prompt "{prompt}"')
    if early.best_step not in (None, done):
        lines.append(
            f'From the best step: {sample}/checkpoints/step-{early.best_step:08d} --prompt "{prompt}"'
        )
    return "\n".join(lines)
