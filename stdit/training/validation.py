"""Make and write validation videos, and choose the settings with which a run samples by default."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.pipelines.config import VIDEO_SETTINGS, VideoSettings
from stdit.training.config import ValidationConfig

if TYPE_CHECKING:
    import numpy as np

    from stdit.data.assignment import Assignment
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline
    from stdit.pipelines.requests import Request

BASE_SAMPLES = "base"
"""Folder of the validation videos of an adapter's base, beside those of the steps."""


def pipeline_settings_of(
    config: ValidationConfig,
    assignment: "Assignment",
    trigger: str | None = None,
    trained_steps: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the pipeline's settings: those of the config, the rest from the bucket with the most clips.

    ``trained_sizes`` lists all buckets that have clips. A few-step student samples in the most of its steps.
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
    steps = {"num_inference_steps": max(trained_steps)} if trained_steps else {}
    return {
        **sizes[members.index(max(members))],
        **steps,
        **given,
        "trained_sizes": trained,
        "trained_steps": list(trained_steps) or None,
        "trigger": trigger,
    }


def validation_requests(config: ValidationConfig, trained_steps: Sequence[int] | None) -> list["Request"]:
    """Return the validation videos to make: of each prompt one, or one in each number of steps that was trained."""
    from stdit.pipelines.requests import Request

    numbers: Sequence[int | None] = trained_steps or [None]
    return [
        Request(prompt, config.seed, VideoSettings(num_inference_steps=steps), index=index)
        for index, prompt in enumerate(config.prompts)
        for steps in numbers
    ]


def make_samples(pipe: "STDiTPipeline", requests: Sequence["Request"], mesh: "Mesh") -> list["np.ndarray"]:
    """Sample videos on all ranks; return them on the main one, as uint8 ``[T H W 3]``."""
    from stdit.pipelines.runner import sample_videos

    pipe.set_progress_bar_config(disable=True)
    return [video.frames for video in sample_videos(pipe, requests, mesh=mesh)]


def sample_files(
    config: Mapping[str, Any], requests: Sequence["Request"], origin: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the names of the mp4 files of `make_samples`, each with the metadata inside it.

    Args:
        config: settings of the pipeline.
        origin: facts about the weights.
    """
    from stdit.pipelines.writer import slug

    files = {}
    for request in requests:
        steps = request.settings.num_inference_steps
        name = f"{request.index:02d}-{slug(request.prompt)}" + ("" if steps is None else f"-{steps}-steps")
        settings = request.settings.resolved(config)
        files[f"{name}.mp4"] = {"prompt": request.prompt, "seed": request.seed, **settings, **origin}
    return files


def label(name: str, metadata: Mapping[str, Any]) -> str:
    """Return the caption of a file of `sample_files`: its prompt, and its steps if each number has a file."""
    steps = metadata["num_inference_steps"]
    of_steps = f"  ({steps} step{'' if steps == 1 else 's'})" if name.endswith("-steps.mp4") else ""
    return f"{metadata['prompt']}{of_steps}"


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
        shown = label(name, metadata)
        if base is None:
            rows.append(sheet_row(frames, shown))
        else:
            without = sheet_row(read_frames(base / name), f"{shown}  (base)")
            adapted = sheet_row(frames, f"{shown}  (step {metadata['checkpoint_step']})")
            rows.append(side_by_side([without, adapted]))
    write_rows(folder / "sheet.png", rows)
