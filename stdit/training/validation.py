"""Videos for fixed prompts while training goes on, and the settings with which the run samples by default."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import UserError
from stdit.pipelines.config import SETTINGS, VideoSettings, check_seed

if TYPE_CHECKING:
    import numpy as np

    from stdit.data.buckets import Assignment
    from stdit.parallel.processes.mesh import Mesh
    from stdit.pipelines.pipeline import STDiTPipeline


@dataclass
class ValidationConfig:
    """Which videos to make while training, and how. The settings are those of the exported pipeline, too."""

    prompts: list[str] = field(default_factory=list)
    """A video of each is written to samples/ in the run folder; none: no validation."""
    every: int = 1000
    """Steps between validations; there is one at the end, too."""
    seed: int = 0
    """Seed of every video."""
    num_inference_steps: int = 30
    """Euler steps."""
    guidance_scale: float = 1.5
    """1 follows the prompt as trained; more follows it harder, at twice the cost."""
    num_frames: int | None = None
    """Length in frames; none: as the bucket with the most clips. Likewise height, width and fps."""
    height: int | None = None
    """Height in pixels."""
    width: int | None = None
    """Width in pixels."""
    fps: float | None = None
    """Frames per second."""
    loss_every: int | None = None
    """Steps between measurements of the validation loss: at fixed noise levels, with fixed noise, of fixed clips."""
    loss_manifest: str | None = None
    """Manifest of clips that do not train, for the validation loss; none: the first of those that do."""
    loss_clips: int = 16
    """Clips of each bucket in the validation loss, at most."""
    loss_levels: int = 4
    """Noise levels of each clip in the validation loss: quantiles of those that are trained."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"validation.every = {self.every}: must be at least 1; for none, give no prompts")
        if any(not prompt.strip() for prompt in self.prompts):
            raise UserError("validation.prompts has an empty one: write it, or delete it")
        for name in ("loss_every", "loss_clips", "loss_levels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"validation.{name} = {value}: must be at least 1")
        check_seed(self.seed, "validation.")
        self.settings().check("validation.")

    def settings(self) -> VideoSettings:
        names = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
        return VideoSettings(**{name: getattr(self, name) for name in names})


def default_settings(config: ValidationConfig, assignment: "Assignment") -> dict[str, Any]:
    """Settings of the pipeline: those given, the rest as the bucket with the most clips."""
    sizes = [len(members) for members in assignment.members]
    bucket = assignment.buckets[sizes.index(max(sizes))]
    trained = {name: getattr(bucket, name) for name in ("num_frames", "height", "width", "fps")}
    given = {name: value for name, value in asdict(config.settings()).items() if value is not None}
    return {**trained, **given}


def make_samples(
    pipe: "STDiTPipeline", prompts: Sequence[str], seed: int, mesh: "Mesh"
) -> list["np.ndarray"]:
    """A video of each prompt, uint8 ``[T H W 3]``, made by all ranks with the pipeline's settings; on the first."""
    from stdit.pipelines.sampling import Request, sample_videos

    pipe.set_progress_bar_config(disable=True)
    requests = [Request(text, seed) for text in prompts]
    return [frames for _, frames in sample_videos(pipe, requests, mesh=mesh)]


def write_samples(
    videos: Sequence["np.ndarray"], config: Mapping[str, Any], prompts: Sequence[str], seed: int, folder: Path
) -> list[str]:
    """Write what `make_samples` made, and a contact sheet, into an empty folder.

    Args:
        config: of the pipeline.

    Returns:
        the names of the mp4 files, in the order of the prompts, and of the sheet.
    """
    from stdit.pipelines.sampling import slug
    from stdit.pipelines.video_io import write_mp4, write_sheet

    names = []
    for index, (frames, prompt) in enumerate(zip(videos, prompts, strict=True)):
        settings = {name: config[name] for name in SETTINGS}
        metadata = {"prompt": prompt, "seed": seed, **settings, "checkpoint_step": config["step"]}
        names.append(f"{index:02d}-{slug(prompt)}.mp4")
        write_mp4(folder / names[-1], frames, config["fps"], metadata)
    write_sheet(folder / "sheet.png", videos, prompts)
    return [*names, "sheet.png"]
