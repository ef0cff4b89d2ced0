"""Write measurements to ``metrics.jsonl``, and to TensorBoard or Weights & Biases if set."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.hashing import read_sealed, sealed_json
from stdit.training.config import TrackerConfig
from stdit.training.disk import disk_advice


class Metrics:
    """Metrics that are not written, for all ranks but the main one."""

    def write(self, values: dict[str, Any]) -> None:
        """Write the line of a step."""

    def close(self) -> None:
        """Close the file."""


class MetricsFile(Metrics):
    """A file with one JSON object per line and step, flushed after each."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Open the file for appending; cut off lines of steps from ``first_step`` on, which will be done again.

        Nothing else is made of what the lines say. Those that cannot be read are cut off, too, with a warning unless
        it is the last, which a killed process leaves incomplete.
        """
        if path.exists():
            lines = path.read_bytes().splitlines()
            steps = [_step(line) for line in lines]
            if damaged := sum(step is None for step in steps[:-1]):
                print(f"warning: {path}: {damaged} lines are damaged and were removed")
            earlier = [
                line + b"\n"
                for line, step in zip(lines, steps, strict=True)
                if step is not None and step < first_step
            ]
            aside = path.with_name(f"{path.name}.tmp")
            aside.write_bytes(b"".join(earlier))
            os.replace(aside, path)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append a line. Raises UserError if the disk is full or read-only, or the file was removed."""
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
            if not self._exists():
                raise FileNotFoundError(errno.ENOENT, "it was removed or moved during the run")
        except OSError as error:
            raise UserError(
                f"{self.file.name} could not be written ({error.strerror}): {disk_advice(error)} and run the same "
                "command again."
            ) from error

    def _exists(self) -> bool:
        """Return whether the open file still has its name: writing to a removed or moved file gives no error."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.file.name))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that is not on the disk: `write` has reported it
            self.file.close()


def _step(line: bytes) -> float | None:
    """Return the step of a line; None for a damaged one, or the incomplete one of a killed process."""
    try:
        step = json.loads(line.decode("utf-8"))["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int | float) else None


class Tracker:
    """Tracker that does nothing, and the interface of the others."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log numbers of a step, by name."""

    def log_videos(self, videos: Sequence[Path], prompts: Sequence[str], sheet: Path, step: int) -> None:
        """Log validation videos (mp4), and the contact sheet that shows them all."""

    def finish(self) -> None:
        """Send what is left, and close the tracker."""


class FailSafeTracker(Tracker):
    """Another tracker whose errors do not stop the run: the first is printed, and later calls are still made."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name, self.failed = tracker, name, False

    def log(self, values: dict[str, Any], step: int) -> None:
        self._try(lambda: self.tracker.log(values, step))

    def log_videos(self, videos: Sequence[Path], prompts: Sequence[str], sheet: Path, step: int) -> None:
        self._try(lambda: self.tracker.log_videos(videos, prompts, sheet, step))

    def finish(self) -> None:
        self._try(self.tracker.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever its library raises
            if not self.failed:
                print(
                    f"warning: {self.name} cannot log measurements ({error}); training continues, and metrics.jsonl "
                    "has them all. This is not printed again."
                )
            self.failed = True


class TensorBoard(Tracker):
    """Log to ``tensorboard/`` in the run folder, through accelerate's tracker; of videos their contact sheet."""

    def __init__(self, config: TrackerConfig, run: Path, settings: dict[str, Any]) -> None:
        from accelerate.tracking import TensorBoardTracker

        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(f"tracker.name = tensorboard: {error}: pip install tensorboard") from None
        self.tracker = TensorBoardTracker("tensorboard", logging_dir=run)
        self.tracker.start()
        self.tracker.writer.add_text("config", f"```\n{json.dumps(settings, indent=1)}\n```")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.tracker.log(values, step=step)

    def log_videos(self, videos: Sequence[Path], prompts: Sequence[str], sheet: Path, step: int) -> None:
        import numpy as np
        import PIL.Image

        with PIL.Image.open(sheet) as picture:
            self.tracker.log_images({"samples": np.array(picture)[None]}, step=step, dataformats="NHWC")
        self.tracker.writer.flush()

    def finish(self) -> None:
        self.tracker.finish()


class WandB(Tracker):
    """Log to wandb, through accelerate's tracker. Print a message and log offline without key or network."""

    def __init__(self, config: TrackerConfig, run: Path, settings: dict[str, Any]) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        mode = config.mode
        if mode == "online" and not wandb.api.api_key:
            print("wandb has no key (WANDB_API_KEY or `wandb login`): writing offline, for `wandb sync`.")
            mode = "offline"
        identity = _wandb_id(run / "wandb_id.json")
        options = dict(
            name=run.name,
            id=identity,
            resume="allow",
            dir=run,
            config=settings,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=config.timeout,
                finish_timeout=config.timeout,
                finish_timeout_raises=True,
            ),
        )
        self.tracker = WandBTracker(config.project, mode=mode, **options)
        try:
            self.tracker.start()
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            print(f"wandb cannot be reached ({reason}): writing offline, for `wandb sync`.")
            wandb.teardown()  # otherwise it keeps trying, and the run's id counts as taken
            self.tracker = WandBTracker(config.project, mode="offline", **options)
            self.tracker.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        self.tracker.log(values, step=step)

    def log_videos(self, videos: Sequence[Path], prompts: Sequence[str], sheet: Path, step: int) -> None:
        import wandb

        clips = [wandb.Video(str(v), caption=p, format="mp4") for v, p in zip(videos, prompts, strict=True)]
        self.tracker.log({"samples": clips, "sheet": wandb.Image(str(sheet))}, step=step)

    def finish(self) -> None:
        self.tracker.finish()


def _wandb_id(file: Path) -> str:
    """Return the id under which wandb knows this run; choose it when the run begins."""
    if not file.exists():
        file.write_text(sealed_json({"id": secrets.token_hex(4)}), encoding="utf-8")
    try:
        return str(read_sealed(file)["id"])
    except (ValueError, RecursionError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({error}): delete it, and the run continues as another run of wandb."
        ) from None


def build_tracker(config: TrackerConfig, run: Path, settings: dict[str, Any]) -> Tracker:
    """Return the tracker that a config names. Raises UserError if its library is missing."""
    return FailSafeTracker(TRACKERS[config.name](config, run, settings), config.name)


TRACKERS: dict[str, Callable[[TrackerConfig, Path, dict[str, Any]], Tracker]] = {
    "none": lambda config, run, settings: Tracker(),
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
