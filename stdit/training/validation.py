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

BASE_SAMPLES = "base"
"""Folder of the validation videos of an adapter's base, beside those of the steps."""


def pipeline_settings_of(
    config: ValidationConfig, assignment: "Assignment", trigger: str | None = None
) -> dict[str, Any]:
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
    return {**sizes[members.index(max(members))], **given, "trained_sizes": trained, "trigger": trigger}


def make_samples(
    pipe: "STDiTPipeline", prompts: Sequence[str], seed: int, mesh: "Mesh"
) -> list["np.ndarray"]:
    """Sample a video of each prompt on all ranks; return them on the main one, as uint8 ``[T H W 3]``."""
    from stdit.pipelines.requests import Request
    from stdit.pipelines.runner import sample_videos

    pipe.set_progress_bar_config(disable=True)
    requests = [Request(text, seed) for text in prompts]
    return [video.frames for video in sample_videos(pipe, requests, mesh=mesh)]


def sample_files(
    config: Mapping[str, Any], prompts: Sequence[str], seed: int, origin: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the names of the mp4 files of `make_samples`, each with the metadata inside it.

    Args:
        config: settings of the pipeline.
        origin: facts about the weights.
    """
    from stdit.pipelines.writer import slug

    settings = {name: config[name] for name in VIDEO_SETTINGS}
    return {
        f"{index:02d}-{slug(prompt)}.mp4": {"prompt": prompt, "seed": seed, **settings, **origin}
        for index, prompt in enumerate(prompts)
    }


def write_samples(
    videos: Sequence["np.ndarray"],
    files: Mapping[str, Mapping[str, Any]],
    folder: Path,
    base: Path | None = None,
) -> None:
    """Write the videos of `make_samples`, and a contact sheet ``sheet.png``, into an empty folder.

    Args:
        files: of `sample_files`.
        base: folder with the same files of the model without the adapter, which the sheet shows on the left.
    """
    from stdit.pipelines.contact_sheet import sheet_row, side_by_side, write_rows
    from stdit.pipelines.video_io import read_frames, write_mp4

    rows = []
    for frames, (name, metadata) in zip(videos, files.items(), strict=True):
        write_mp4(folder / name, frames, metadata["fps"], dict(metadata))
        prompt = metadata["prompt"]
        if base is None:
            rows.append(sheet_row(frames, prompt))
        else:
            without = sheet_row(read_frames(base / name), f"{prompt}  (base)")
            adapted = sheet_row(frames, f"{prompt}  (step {metadata['checkpoint_step']})")
            rows.append(side_by_side([without, adapted]))
    write_rows(folder / "sheet.png", rows)
