"""Sampling: from prompts and conditioning frames to videos. Importing this package imports no torch."""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.pipelines.conditions import FrameCondition
    from stdit.pipelines.config import SampleConfig, VideoSettings
    from stdit.pipelines.loading import load_pipeline
    from stdit.pipelines.pipeline import STDiTPipeline, STDiTPipelineOutput
    from stdit.pipelines.requests import Request, plan_requests
    from stdit.pipelines.runner import sample_videos
    from stdit.pipelines.sampling import sample_to_files
    from stdit.pipelines.segments import Segments
    from stdit.pipelines.writer import VideoWriter

__all__ = [
    "FrameCondition",
    "Request",
    "STDiTPipeline",
    "STDiTPipelineOutput",
    "SampleConfig",
    "Segments",
    "VideoSettings",
    "VideoWriter",
    "load_pipeline",
    "plan_requests",
    "sample_to_files",
    "sample_videos",
]

__getattr__ = lazy_getattr(
    __name__,
    {
        "FrameCondition": "stdit.pipelines.conditions",
        "Request": "stdit.pipelines.requests",
        "STDiTPipeline": "stdit.pipelines.pipeline",
        "STDiTPipelineOutput": "stdit.pipelines.pipeline",
        "SampleConfig": "stdit.pipelines.config",
        "Segments": "stdit.pipelines.segments",
        "VideoSettings": "stdit.pipelines.config",
        "VideoWriter": "stdit.pipelines.writer",
        "load_pipeline": "stdit.pipelines.loading",
        "plan_requests": "stdit.pipelines.requests",
        "sample_to_files": "stdit.pipelines.sampling",
        "sample_videos": "stdit.pipelines.runner",
    },
)
