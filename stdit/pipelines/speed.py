"""Arithmetic of sampling: which instructions a CPU has for bf16, and what torch.compile costs and gives."""

import time
from dataclasses import asdict
from typing import Any

import torch

from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.requests import Request


def describe_dtype(dtype: str, device: torch.device) -> str:
    """Return a line about the speed of a dtype on a CPU; empty where there is nothing to say."""
    if device.type != "cpu" or dtype != "bf16" or (instructions := _bf16_instructions()) is None:
        return ""
    found = [name for name, has_it in instructions.items() if has_it]
    if found:
        return f"dtype = bf16: this CPU has {' and '.join(found)} for it, faster than fp32 with large models"
    return "dtype = bf16: this CPU has no instructions for it: fp32 is faster"


def _bf16_instructions() -> dict[str, bool] | None:
    """Return which instructions for bf16 the CPU has; None if PyTorch is too old to tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return None
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm's BF16"}
    capabilities = torch.cpu.get_capabilities()
    return {label: bool(capabilities.get(name)) for name, label in names.items()}


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
