"""Contact sheet across training: a row for each validation prompt, a column for each step, and one for the base."""

from pathlib import Path
from typing import Any

from stdit.checkpoint_files import step_of
from stdit.errors import UserError
from stdit.training.validation import BASE_SAMPLES


def write_step_sheet(run: Path, output: Path | None = None, columns: int = 8, frames: int = 1) -> Path:
    """Write a sheet of the validation videos of a run as a PNG; return its path.

    Args:
        run: its folder.
        output: the PNG; None: ``samples/steps.png`` in the run folder. An older sheet is replaced.
        columns: largest number of steps, spread evenly over those that have videos.
        frames: frames of a video in each column; 1: the one in the middle.

    Raises:
        UserError: if the run has no validation videos, a video cannot be read, or ``output`` is another file.
    """
    from stdit.pipelines.contact_sheet import check_replaceable, picture_row, write_rows
    from stdit.pipelines.video_io import spread
    from stdit.pipelines.writer import check_writable, created_folder

    output = output or run / "samples" / "steps.png"
    check_replaceable(output)
    check_writable(output.absolute().parent)
    folders = _folders_of_steps(run)
    steps = [sorted(folders)[index] for index in spread(len(folders), columns)]
    base = run / "samples" / BASE_SAMPLES
    shown = {"base": base} if base.is_dir() else {}
    shown |= {f"step {step}": folders[step] for step in steps}
    videos = {label: _videos(folder) for label, folder in shown.items()}
    # The prompts of the last step come first, in their order; older ones of a resumed run follow.
    names = dict.fromkeys(name for label in reversed(videos) for name in videos[label])
    rows = []
    for prompt, seed in names:
        files = [videos[label].get((prompt, seed)) for label in videos]
        pictures = [None if file is None else _picture(file, frames) for file in files]
        rows.append(picture_row(pictures, f"{prompt}  (seed {seed})", len(videos), list(videos)))
    contents = [{"prompt": prompt, "seed": seed, "steps": steps} for prompt, seed in names]
    with created_folder(output.absolute().parent):
        write_rows(output, rows, contents)
    return output


def _folders_of_steps(run: Path) -> dict[int, Path]:
    """Return the folders of validation videos by step."""
    found = {
        step: path
        for path in run.glob("samples/step-*")
        if (step := step_of(path)) is not None and any(path.glob("*.mp4"))
    }
    if not found:
        what = "there is no such folder" if not run.is_dir() else "it has no samples/step-..."
        raise UserError(
            f"{run}: {what}: give the folder of a run that made validation videos (validation.prompts, "
            "validation.every)."
        )
    return found


def _videos(folder: Path) -> dict[tuple[str, int], Path]:
    """Return the videos of one step by prompt and seed, in the order of the prompts."""
    from stdit.pipelines.video_io import read_metadata

    found = {}
    for path in sorted(folder.glob("*.mp4")):
        metadata = read_metadata(path)
        found[str(metadata.get("prompt", path.stem)), int(metadata.get("seed", 0))] = path
    return found


def _picture(file: Path, frames: int) -> Any:
    """Return frames of a video next to each other."""
    import numpy as np
    import PIL.Image

    from stdit.pipelines.contact_sheet import scaled
    from stdit.pipelines.video_io import read_frames

    shown = read_frames(file, 3 if frames == 1 else frames)
    shown = shown[len(shown) // 2][None] if frames == 1 else shown
    return PIL.Image.fromarray(np.concatenate([np.array(scaled(frame)) for frame in shown], axis=1))
