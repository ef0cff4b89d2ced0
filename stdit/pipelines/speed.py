"""Arithmetic of sampling: how fast a dtype is on a CPU, and what torch.compile costs and gives."""

import time
from dataclasses import asdict
from typing import Any

import torch

from stdit.models.matmul_rate import matmul_rate
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.requests import Request


def describe_dtype(dtype: str, device: torch.device) -> str:
    """Return a line about the speed of a dtype on a CPU, measured; empty for fp32 and on other devices.

    Instructions for a dtype do not make it faster everywhere: some CPUs have half as many units for them.
    """
    if device.type != "cpu" or dtype == "fp32":
        return ""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    ratio = matmul_rate(device, torch.float32) / matmul_rate(device, kinds[dtype])
    found = _instructions(dtype)
    has = f" ({' and '.join(found)})" if found else f" (no instructions for {dtype})"
    line = f"dtype = {dtype}: products of matrices take {ratio:.2f} of the time of fp32 on this CPU{has}"
    return line if ratio < 1 else f"{line}: fp32 is faster, and takes twice the memory"


def _instructions(dtype: str) -> list[str]:
    """Return the instructions of the CPU for a dtype, as far as PyTorch tells."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return []
    names = {
        "bf16": {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm's BF16"},
        "fp16": {"amx_fp16": "AMX-FP16", "avx512_fp16": "AVX-512 FP16", "fp16": "Arm's FP16"},
    }
    capabilities = torch.cpu.get_capabilities()
    return [label for name, label in names[dtype].items() if capabilities.get(name)]


def compile_model(pipe: STDiTPipeline, request: Request, videos: int) -> str:
    """Compile the blocks of a pipeline's model for batches like one of a request; return a line about its cost.

    Args:
        videos: of a batch.
    """
    before = min(_seconds_of_step(pipe, request, videos) for _ in range(2))
    pipe.transformer.compile_blocks()
    sizes = [videos]
    if request.settings.resolved(pipe.config)["cache"] != "off" and videos > 1:
        sizes.append(videos - 1)  # videos that skip steps leave smaller batches, compiled once for all sizes
    first = sum(_seconds_of_step(pipe, request, size) for size in sizes)
    after = _seconds_of_step(pipe, request, videos)
    saved, start = before - after, first - len(sizes) * after
    line = f"torch.compile: {start:.1f} s to start; a step takes {after:.3g} s instead of {before:.3g} s"
    if saved <= 0:
        return f"{line}: leave compile out here"
    return f"{line}: it pays from {start / saved:,.0f} steps on"


def _seconds_of_step(pipe: STDiTPipeline, request: Request, videos: int) -> float:
    """Return the seconds of a step on a batch of videos, with guidance if their scale asks for it."""
    settings: dict[str, Any] = {**asdict(request.settings), "num_inference_steps": 1, "cache": "off"}
    settings |= {"refine_pairs": 0, "pab": [], "guidance_schedule": "constant"}
    names = ("refine_level", "refine_guidance_scale", "pab_timesteps", "guidance_interval")
    settings |= dict.fromkeys(names)
    states, mask, *_ = pipe.encode_prompt([request.prompt] * videos, None, False)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    begin = time.perf_counter()
    pipe(
        prompt_embeds=states,
        prompt_attention_mask=mask,
        generator=torch.Generator(),
        output_type="latent",
        **settings,
    )
    if pipe.mesh.device.type == "cuda":
        torch.cuda.synchronize()
    pipe.set_progress_bar_config(**bar)
    return time.perf_counter() - begin
