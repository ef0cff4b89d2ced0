"""What ``sample.py`` does after parsing: plan requests, load the pipeline, run it on all ranks, write files.

The steps lie in `requests`, `loading`, `runner` and `writer`, each of which can be called alone from Python.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from stdit.lora.header import read_header
from stdit.pipelines.bundled import describe_origin
from stdit.pipelines.conditions import warn_once
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.finished import describe_finished, describe_others
from stdit.pipelines.loading import (
    check_text_states,
    load_codec,
    load_pipeline,
    model_settings,
    pipeline_settings,
)
from stdit.pipelines.model_calls import ModelCalls, describe_calls
from stdit.pipelines.requests import Request, check_requests, plan_requests
from stdit.pipelines.sizes import size_multiple
from stdit.pipelines.sources import CheckpointSource, find_checkpoint_source
from stdit.pipelines.untrained import warn_of_missing_trigger, warn_of_untrained
from stdit.pipelines.video_metadata import provenance
from stdit.pipelines.writer import VideoWriter, check_writable

if TYPE_CHECKING:
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline

logger = logging.getLogger(__name__)


def sample_to_files(config: SampleConfig) -> list[Path]:
    """Generate the videos that a config asks for, but for those that are finished; return the files written.

    Input is checked before a model is loaded. With several processes, all of them must call this; the first one
    writes the files.

    Raises:
        UserError: for input that cannot be used, and for a disk or memory that is full.
    """
    requests = plan_requests(config)
    source = find_checkpoint_source(config.checkpoint, config.ema)
    codec = load_codec(source) if any(request.segments.count > 1 for request in requests) else None
    recorded = pipeline_settings(source)
    for warning in check_requests(requests, recorded, codec, model_settings(source).get("guidance_range")):
        warn_once(warning)
    texts = [text for request in requests for text in request.texts()]
    if config.text_states is not None:
        check_text_states(config.text_states, texts, source)

    # torch is imported from here on.
    from stdit.parallel.processes.device import join_processes
    from stdit.parallel.processes.mesh import build_mesh
    from stdit.pipelines.calibration import calibrate
    from stdit.pipelines.loras import check_loras, use_loras
    from stdit.pipelines.precision import cast
    from stdit.pipelines.runner import sample_rounds
    from stdit.pipelines.speed import describe_dtype

    device = join_processes(config.device, config.parallel.timeout)
    mesh = build_mesh(config.parallel, device)
    mesh.check_same("the configuration or the prompts", f"{config} {requests}")
    folder = _output_folder(config, source)
    mesh.on_main(lambda: check_writable(folder))

    loras = list(dict.fromkeys(lora for request in requests for lora in request.loras))
    if loras:
        mesh.on_all_ranks(lambda: check_loras(loras, model_settings(source)))
    pipe, weights = mesh.on_all_ranks(lambda: load_pipeline(source, config.ema, config.text_states))
    mesh.on_all_ranks(lambda: pipe.prompt_encoder.check(texts))
    mesh.check_same("the model", weights)
    mesh.on_all_ranks(lambda: use_loras(pipe, loras, config.lora_other_base))  # before anything is made
    cast(pipe.to(device).transformer, config.dtype)
    if config.resolution is not None:  # named sizes depend on the codec and the patch size
        requests = plan_requests(config, size_multiple(pipe.codec, pipe.transformer.config.patch_size))
    mesh = _share(pipe, requests, config, mesh)
    for line in mesh.on_all_ranks(partial(_plan_decoding, pipe, requests, config, mesh)):
        if mesh.is_main:
            print(line, flush=True)
    if mesh.is_main:
        print(f"sampling from {source.path} (weights {weights})", flush=True)
        if line := describe_dtype(config.dtype, device):
            print(line, flush=True)
        if origin := describe_origin(source.path):
            print(origin, flush=True)
        warn_of_untrained(requests, pipe.config, pipe.flow.config.conditioning)
        warn_of_missing_trigger([r.prompt for r in requests], pipe.config["trigger"], str(source.path))
        for lora in loras:
            prompts = [r.prompt for r in requests if lora in r.loras and lora.weight]
            warn_of_missing_trigger(prompts, read_header(lora.file).trigger, str(lora.file))
        if "mp4" in config.formats():
            _warn_if_padded(pipe, requests)

    if config.calibrate:
        _compile(pipe, requests, config, mesh)
        for line in calibrate(pipe, requests, config.batch_size, mesh):
            print(line, flush=True)
        return []

    facts = provenance(config, source.path, weights, pipe.config)
    writer = VideoWriter(folder, config.formats(), pipe.config, facts)
    pending, others = mesh.on_main(lambda: writer.skip_finished(requests))
    if mesh.is_main:
        _report_finished(folder, len(requests) - len(pending), len(requests), others)
    pending_requests = [requests[position] for position in pending]
    _compile(pipe, pending_requests, config, mesh)
    calls: list[ModelCalls] = []
    for videos in sample_rounds(pipe, pending_requests, config.batch_size, mesh):
        mesh.on_main(partial(writer.write, videos))
        calls += [video.calls for video in videos]
    files = mesh.on_main(writer.finish)
    if any(of_video.skipped for of_video in calls):
        print(describe_calls(calls), flush=True)
    return files


def _compile(pipe: "STDiTPipeline", requests: Sequence[Request], config: SampleConfig, mesh: "Mesh") -> None:
    """Compile the model if the config asks for it and there is a video to make; print what it costs and gives."""
    from stdit.pipelines.speed import compile_model

    if config.compile and requests:
        videos = min(config.batch_size, ceil(len(requests) / mesh.dp))
        line = mesh.on_all_ranks(lambda: compile_model(pipe, requests[0], videos))
        if mesh.is_main:
            print(line, flush=True)


def _report_finished(folder: Path, finished: int, total: int, others: Mapping[str, str]) -> None:
    """Print how many videos exist already, and which files of other settings have their names."""
    if finished:
        print(describe_finished(finished, total), flush=True)
    if others:
        print(describe_others(folder, others), flush=True)


def _output_folder(config: SampleConfig, source: CheckpointSource) -> Path:
    if config.output is not None:
        return Path(config.output)
    return source.run / "samples" / "prompts" if source.run is not None else Path("outputs/samples")


def _share(pipe: "STDiTPipeline", requests: list[Request], config: SampleConfig, mesh: "Mesh") -> "Mesh":
    """Share the pipeline with a mesh whose ``sp`` is resolved if it is ``auto``; return that mesh."""
    from stdit.parallel.processes.memory import memory_of_process
    from stdit.parallel.processes.mesh import resolve_sp
    from stdit.pipelines.workload import SamplingWorkload

    memory = memory_of_process(mesh.device, config.parallel.memory_gib)
    workload = SamplingWorkload(pipe, requests, config, memory_of_process=memory)
    mesh = resolve_sp(mesh, config.parallel, lambda: workload.choose_sp(mesh.world_size, memory))
    pipe.share(mesh)
    if mesh.is_main:
        for line in workload.grid_lines(mesh.sp.size, mesh.world_size):
            print(line)
    else:
        pipe.set_progress_bar_config(disable=True)
    return mesh


def _plan_decoding(
    pipe: "STDiTPipeline", requests: Sequence[Request], config: SampleConfig, mesh: "Mesh"
) -> list[str]:
    """Let the codec work in tiles, equal ones on all ranks; return a line for each size of video that needs some.

    Raises:
        UserError: if there is not enough memory for a tile.
    """
    from stdit.codecs.tiling import tiled_bytes
    from stdit.parallel.processes.memory import free_memory
    from stdit.parallel.sequence.planner import format_gib
    from stdit.pipelines.runner import batches_of

    free = mesh.all_gather_objects(free_memory(mesh.device, config.parallel.memory_gib))
    pipe.codec.enable_tiling(config.codec.tile, min(free))
    lines = dict[str, None]()
    for batch in batches_of(requests, config.batch_size, mesh.dp):
        settings = batch[0].settings.resolved(pipe.config)
        size = [int(settings[name]) for name in ("num_frames", "height", "width")]
        plan = pipe.decoding_plan(len(batch), pipe.codec.latent_shape(*size), *size)
        if not plan.whole:
            memory = format_gib(tiled_bytes(pipe.codec, plan))
            lines[f"decoding {'x'.join(map(str, size))}: {plan}, {memory} GiB"] = None
    return list(lines)


def _warn_if_padded(pipe: "STDiTPipeline", requests: Iterable[Request]) -> None:
    """Log a warning for each odd size, which H.264 cannot store."""
    settings = [request.settings.resolved(pipe.config) for request in requests]
    for height, width in sorted({(int(one["height"]), int(one["width"])) for one in settings}):
        if height % 2 or width % 2:
            logger.warning(
                "height = %d, width = %d: H.264 needs even sizes, so the mp4 has %d x %d (width x height), its last "
                "row or column repeated; its metadata says so",
                *(height, width, width + width % 2, height + height % 2),
            )
