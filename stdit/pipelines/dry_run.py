"""``sample.py --dry_run``: the model calls, bytes and memory that videos take, without making them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil

import torch

from stdit.codecs.config import DecodingConfig
from stdit.errors import UserError
from stdit.lora.config import LoRASpec
from stdit.models.size import parameter_count
from stdit.parallel.processes.device import find_device
from stdit.parallel.processes.memory import memory_of_process
from stdit.parallel.processes.mesh import Mesh, check_divides
from stdit.parallel.sequence.planner import MIB, ParallelDims, format_gib
from stdit.pipelines.conditions import warn_once
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.loading import (
    check_text_states,
    load_skeleton,
    model_settings,
    pipeline_settings,
    text_encoder_bytes,
)
from stdit.pipelines.loras import check_loras
from stdit.pipelines.precision import cast
from stdit.pipelines.requests import check_requests, plan_requests
from stdit.pipelines.sizes import size_multiple
from stdit.pipelines.sources import CheckpointSource, find_checkpoint_source
from stdit.pipelines.untrained import warn_of_steps
from stdit.pipelines.workload import SamplingWorkload, Videos

_MORE_RANKS = (2, 4, 8, 16, 32, 64)
"""Values of ``parallel.sp`` that are tried if the videos do not fit in memory."""


def print_plan(config: SampleConfig) -> None:
    """Print what the videos take, on the main process. Raises UserError for input that cannot be used."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(sampling_plan(config), flush=True)


def sampling_plan(config: SampleConfig) -> str:
    """Return what the videos that a config asks for take, as lines of text; no weights are read but the codec's."""
    source = find_checkpoint_source(config.checkpoint, config.ema)
    workload = read_workload(config, source)
    processes = _processes(config)
    sizes = {"cfg": config.parallel.cfg, "sp": 1 if config.parallel.sp == "auto" else config.parallel.sp}
    check_divides(config.parallel, sizes, processes)
    memory = workload.memory_of_process = _memory(workload, processes)
    pipe, sp = workload.pipe, config.parallel.sp
    lines = [
        f"{source.path}: {parameter_count(pipe.transformer):,} parameters in {config.dtype}, codec {pipe.codec.name}"
    ]
    if sp == "auto":
        choice = workload.choose_sp(processes, memory)
        lines.append(f"parallel.sp = auto: {choice}")
        sp = choice.sp
    split = workload.split(processes, sp)
    lines.append(
        f"{_counted(processes, 'process')} (dp {split.dp} x cfg {config.parallel.cfg} x sp {sp}), each with "
        f"{format_gib(memory)} GiB"
    )
    lines += workload.grid_lines(sp, processes)
    for videos in workload.videos:
        warn_of_steps(videos.settings, pipe.config)
        lines += ["", *_lines(workload, videos, split)]
    lines += ["", *_memory_lines(workload, split, memory)]
    return "\n".join(lines)


def read_workload(config: SampleConfig, source: CheckpointSource) -> SamplingWorkload:
    """Return the videos that a config asks for, with a pipeline without weights. Raises UserError for bad input."""
    requests = plan_requests(config)
    pipe = load_skeleton(source)
    if config.resolution is not None:  # named sizes depend on the codec and the patch size
        requests = plan_requests(config, size_multiple(pipe.codec, pipe.transformer.config.patch_size))
    settings = model_settings(source)
    recorded = pipeline_settings(source)
    for warning in check_requests(requests, recorded, pipe.codec, settings.get("guidance_range")):
        warn_once(warning)
    others = {"text encoder": text_encoder_bytes(source)}
    if config.text_states is not None:
        prompted = requests if config.prompt or config.prompts else []
        check_text_states(config.text_states, [text for one in prompted for text in one.texts()], source)
        others = {}
    loras = list(dict.fromkeys(lora for request in requests for lora in request.loras))
    if loras:
        check_loras(loras, settings)
        others["adapters"] = _file_bytes(loras)
    cast(pipe.transformer, config.dtype)
    pipe.share(Mesh(device=_device(config)))
    return SamplingWorkload(pipe, requests, config, others)


def _device(config: SampleConfig) -> torch.device:
    """Return the device to plan for, which another machine may have; raises UserError if its memory is not known."""
    try:
        return find_device(config.device)
    except UserError as error:
        if config.device.partition(":")[0] != "cuda":
            raise
        if config.parallel.memory_gib is None:
            raise UserError(
                f"{error} To plan for another machine, add parallel.memory_gib, such as 80."
            ) from None
    return torch.device(config.device)


def _file_bytes(loras: list[LoRASpec]) -> int:
    return sum(file.stat().st_size for file in {lora.file for lora in loras})


def _processes(config: SampleConfig) -> int:
    """Return for how many processes to plan; one that was started alone stands for those of a video."""
    if type(config.dry_run) is int:
        return config.dry_run
    started = int(os.environ.get("WORLD_SIZE", 1))
    sp = 1 if config.parallel.sp == "auto" else config.parallel.sp
    return sp * config.parallel.cfg if started == 1 else started


def _memory(workload: SamplingWorkload, processes: int) -> int:
    """Return the bytes that each of the processes may use; on CPUs those that were not started share this machine."""
    gib = workload.config.parallel.memory_gib
    memory = memory_of_process(workload.pipe.mesh.device, gib)
    shared = workload.on_cpu and gib is None and "LOCAL_WORLD_SIZE" not in os.environ
    return memory // processes if shared else memory


def _lines(workload: SamplingWorkload, videos: Videos, split: ParallelDims) -> Iterator[str]:
    """Yield what some equal videos are, the model calls of each, and the bytes that a rank sends for it."""
    settings, load = videos.settings, workload.load(videos, split)
    batches = [len(batch) for batch in workload.batches(videos, split)]
    each = load.frames * load.patches
    latents = "x".join(map(str, (workload.pipe.codec.channels, *workload.latent_shape(videos))))
    length = int(settings["num_frames"])
    segments = ""
    if videos.segments.count > 1:
        total = videos.segments.total_frames(length)
        segments = f", {videos.segments.count} segments ({total} frames in all)"
    yield (
        f"{_counted(len(videos.requests), 'video')} of {length} frames, {settings['height']} x {settings['width']} "
        f"pixels (height x width){segments}, in {_counted(len(batches), 'batch')} of at most {max(batches)}; latents "
        f"{latents}, {load.frames:,} frames of {load.patches:,} tokens, {each:,} a segment"
    )
    yield _calls_line(workload, videos)
    if settings["pab"]:
        reused = [any(parts.values()) for parts in workload.reused(videos)]
        yield f"pab = {settings['pab']}: {sum(reused)} of {len(reused)} steps use attention of earlier ones again"
    if split.sp * workload.config.parallel.cfg > 1:
        yield from _sent_lines(workload, videos, split)


def _calls_line(workload: SamplingWorkload, videos: Videos) -> str:
    schedule, count = workload.schedule(videos), videos.segments.count
    least, most = schedule.calls()
    refinement = sum(map(schedule.halves, schedule.refinement))
    solver = videos.settings["solver"] or type(schedule.scheduler).__name__
    parts = [f"{videos.settings['num_inference_steps']} steps of {solver}: {most.run - refinement}"]
    if refinement:
        parts.append(f"refinement: {refinement}")
    number = f"{count * most.run}"
    if schedule.caches:
        number = f"at most {number}, at least {count * least.run} with cache = {videos.settings['cache']}"
    of_segment = " of each segment" if count > 1 else ""
    halves = ", one half of guidance on each of two ranks" if workload.config.parallel.cfg == 2 else ""
    return f"model calls of a video: {number} ({', '.join(parts)}{of_segment}){halves}"


def _sent_lines(workload: SamplingWorkload, videos: Videos, split: ParallelDims) -> Iterator[str]:
    """Yield the bytes that the rank of a video sends for it that sends most."""
    sent = max((workload.sent(videos, split, rank) for rank in range(split.sp)), key=lambda one: one.total)
    least, most = min(sent.steps), max(sent.steps)
    step = _megabytes(most) if least == most else f"{_megabytes(least)} to {_megabytes(most)}"
    upper = "at most " if workload.schedule(videos).caches else ""
    yield (
        f"a rank sends for a video: {upper}{_megabytes(sent.total)} ({step} in a computed step, "
        f"{_megabytes(sent.refinement)} in the refinement, {_megabytes(sent.decoding)} to decode)"
    )
    if videos.settings["pab"]:
        without = replace(videos, settings=videos.settings | {"pab": []})
        of_all = max(workload.sent(without, split, rank).total for rank in range(split.sp))
        yield f"  pab saves {1 - sent.total / of_all:.0%} of {_megabytes(of_all)}"


def _memory_lines(workload: SamplingWorkload, split: ParallelDims, memory: int) -> Iterator[str]:
    """Yield the memory of a process, by what it holds, whether it fits, and what else would fit."""
    weights, total = workload.weights(), workload.total(split)
    yield f"memory of a process, an estimate in MiB: {_held(weights)}"
    for videos in workload.videos:
        in_steps = workload.in_steps(videos, split)
        yield f"  and in the steps of {videos.size}, {_mib(sum(in_steps.values()))}: {_held(in_steps)}"
        in_decoding = workload.in_decoding(videos, split)
        plan = workload.tiles(videos, split)
        way = "whole" if plan.whole else f"in {plan}"
        yield f"  or decoding them {way}, {_mib(sum(in_decoding.values()))}: {_held(in_decoding)}"
    if total <= memory:
        yield f"it fits: about {_mib(total)} of {_mib(memory)} MiB"
        return
    yield f"it does not fit: about {_mib(total)} of {_mib(memory)} MiB: {_way_out(workload, split, memory)}"


def _way_out(workload: SamplingWorkload, split: ParallelDims, memory: int) -> str:
    """Return settings with which the videos fit in memory."""
    config, cfg, weights = workload.config, workload.config.parallel.cfg, sum(workload.weights().values())
    if weights > memory:
        lighter = "use --dtype bf16, or " if config.dtype == "fp32" else ""
        return f"weights and libraries take {_mib(weights)} MiB: {lighter}use processes with more memory"
    automatic = replace(workload, config=replace(config, codec=DecodingConfig()))
    if config.codec.tile != "auto" and automatic.total(split) <= memory:
        tiles = {str(automatic.tiles(videos, split)) for videos in automatic.videos}
        return f"use --codec.tile auto: {', '.join(sorted(tiles))}"
    batch = max(workload.batch_size(videos, split) for videos in workload.videos)
    for size in range(batch - 1, 0, -1):
        if replace(workload, config=replace(config, batch_size=size)).total(split) <= memory:
            return f"use --batch_size {size}"
    alone = replace(workload, config=replace(config, batch_size=1))
    for sp in _MORE_RANKS:
        if sp > split.sp and alone.total(alone.split(max(split.processes, sp) * cfg, sp)) <= memory:
            return f"use --parallel.sp {sp}" + (" --batch_size 1" if batch > 1 else "")
    decoding = max(alone.decoding(videos, split) for videos in workload.videos)
    if weights + decoding > memory:
        return f"decoding one video takes {_mib(decoding)} MiB: use fewer frames or a smaller size"
    return "use fewer frames or a smaller size"


def _held(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_mib(size)}" for name, size in sizes.items())


def _mib(size: int) -> str:
    return f"{ceil(size / MIB):,}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.3f} MB"


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith(("s", "h")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
