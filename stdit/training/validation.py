"""Make and write validation videos, and choose the settings with which a run samples by default."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.pipelines.config import VIDEO_SETTINGS
from stdit.training.config import ValidationConfig

if TYPE_CHECKING:
    import numpy as np

    from stdit.data.assignment import Assignment
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline


def pipeline_settings_of(config: ValidationConfig, assignment: "Assignment") -> dict[str, Any]:
    """Return the pipeline's settings: those of the config, the rest from the bucket with the most clips.

    ``trained_sizes`` lists all buckets that have clips.
    """
    members = [len(of_bucket) for of_bucket in assignment.members]
    sizes = [
        {name: getattr(bucket, name) for name in ("num_frames", "height", "width", "fps")}
        for bucket in assignment.buckets
    ]
    given = {name: value for name in VIDEO_SETTINGS if (value := getattr(config, name)) is not None}
    trained = [
        size | {"clips": count} for size, count in zip(sizes, assignment.clip_counts, strict=True) if count
    ]
    return {**sizes[members.index(max(members))], **given, "trained_sizes": trained}


def make_samples(
    pipe: "STDiTPipeline", prompts: Sequence[str], seed: int, mesh: "Mesh"
) -> list["np.ndarray"]:
    """Sample a video of each prompt on all ranks; return them on the main one, as uint8 ``[T H W 3]``."""
    from stdit.pipelines.requests import Request
    from stdit.pipelines.runner import sample_videos

    pipe.set_progress_bar_config(disable=True)
    requests = [Request(text, seed) for text in prompts]
    return [frames for _, frames in sample_videos(pipe, requests, mesh=mesh)]


def write_samples(
    videos: Sequence["np.ndarray"], config: Mapping[str, Any], prompts: Sequence[str], seed: int, folder: Path
) -> list[str]:
    """Write the videos of `make_samples`, and a contact sheet, into an empty folder.

    Args:
        config: settings of the pipeline.

    Returns:
        names of the mp4 files, in the order of the prompts, and of the sheet.
    """
    from stdit.pipelines.contact_sheet import write_sheet
    from stdit.pipelines.video_io import write_mp4
    from stdit.pipelines.writer import slug

    names = []
    for index, (frames, prompt) in enumerate(zip(videos, prompts, strict=True)):
        settings = {name: config[name] for name in VIDEO_SETTINGS}
        origin = {"checkpoint_step": config["step"], "lineage": config["lineage"] or []}
        metadata = {"prompt": prompt, "seed": seed, **settings, **origin}
        names.append(f"{index:02d}-{slug(prompt)}.mp4")
        write_mp4(folder / names[-1], frames, config["fps"], metadata)
    write_sheet(folder / "sheet.png", videos, prompts)
    return [*names, "sheet.png"]
