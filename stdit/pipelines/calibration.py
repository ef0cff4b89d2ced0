"""Try thresholds of ``cache`` on some videos: what each saves, and how much the videos change."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.parallel.processes.mesh import Mesh
from stdit.pipelines.model_calls import ModelCalls
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import SampledVideo, sample_rounds
from stdit.pipelines.similarity import psnr

TRIED = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24)
QUALITIES = {"hardly any difference": 45.0, "small differences": 36.0}
"""Mean PSNR in dB for which a threshold is named."""


class Trial(NamedTuple):
    """What a threshold gives."""

    cache: float | str
    calls: ModelCalls
    """Of all videos."""
    psnr: Tensor
    """Of each video, against the one without a cache."""


def calibrate(pipe: STDiTPipeline, requests: Sequence[Request], batch_size: int, mesh: Mesh) -> list[str]:
    """Return the lines of a table of thresholds, and which to use; all ranks must call this.

    The lines are those of the first rank; the others get none.
    """
    trials: list[Trial] = []
    whole: list[SampledVideo] = []
    for cache in ("off", *TRIED):
        asked = [replace(one, settings=replace(one.settings, cache=cache)) for one in requests]
        videos = [video for of_round in sample_rounds(pipe, asked, batch_size, mesh) for video in of_round]
        whole = whole or videos
        if mesh.is_main:
            alike = torch.cat([_psnr(*pair) for pair in zip(videos, whole, strict=True)])
            trials.append(Trial(cache, sum((video.calls for video in videos), ModelCalls()), alike))
    return describe(trials, len(requests)) if mesh.is_main else []


def _psnr(video: SampledVideo, other: SampledVideo) -> Tensor:
    one, two = (torch.from_numpy(each.frames).movedim(-1, 0)[None] / 255 for each in (video, other))
    return psnr(one, two)


def describe(trials: Sequence[Trial], videos: int) -> list[str]:
    """Return the lines of a table of thresholds, and the largest one for each of `QUALITIES`."""
    lines = [f"{'cache':>7} {'model calls':>12} {'saved':>7} {'PSNR':>9} {'lowest':>9}"]
    for cache, calls, alike in trials:
        quality = [] if cache == "off" else [f"{value:6.1f} dB" for value in (alike.mean(), alike.min())]
        lines.append(
            " ".join([f"{cache!s:>7}", f"{calls.run / videos:12.1f}", f"{calls.saved_share:7.0%}", *quality])
        )
    for name, target in QUALITIES.items():
        good = [trial for trial in trials[1:] if trial.psnr.mean() >= target and trial.calls.skipped]
        found = f"--cache {max(trial.cache for trial in good)}" if good else "none of these"  # type: ignore[type-var]
        lines.append(f"{name} ({target:g} dB): {found}")
    return lines
