"""A run in its folder: what it writes there, how it goes on and how it ends."""

import platform
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stdit
from stdit.checkpoint_files import apply_umask, is_whole, step_of
from stdit.cli import plain, to_yaml
from stdit.data.batch import EncodedBatch
from stdit.models.config import token_grid
from stdit.parallel.processes.parameters import full_tensor, gather_full_tensors
from stdit.parallel.processes.watchdog import Watchdog
from stdit.pipelines.video_io import atomic_write
from stdit.training.batches import Batches
from stdit.training.build import Parts
from stdit.training.checkpoint import check_same_experiment, replaced, written
from stdit.training.requests import Requests, RunRequests
from stdit.training.saving import Checkpoints
from stdit.training.system import Interrupts, ProgressBar
from stdit.training.tracking import Metrics, MetricsFile, Tracker, build_tracker
from stdit.training.trainer import Trainer
from stdit.training.validation import default_settings, make_samples, write_samples
from stdit.training.validation_loss import ValidationLoss

LONG_WAIT = 1.0
"""Seconds for which a save may wait for the one before without a word."""


class Run:
    """A run in its folder: writes what it is, goes on from a checkpoint, records steps, saves, ends.

    Every rank has one and calls it alike; the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        parts: Parts,
        trainer: Trainer,
        checkpoint: Path | None,
        held_out: ValidationLoss | None,
    ) -> None:
        """Write settings, schedule and fitted codec, and load the checkpoint.

        Raises:
            UserError: if the checkpoint is of another experiment.
        """
        self.folder, self.parts, self.trainer, self.mesh = folder, parts, trainer, trainer.mesh
        self.config, self.held_out = parts.config, held_out
        self.experiment = parts.experiment
        self.settings = default_settings(self.config.validation, parts.plan.assignment)
        self.checkpoints = Checkpoints(
            folder / "checkpoints", self.config.checkpoint, self.mesh, self.config.parallel.timeout
        )
        self.start = 0
        if checkpoint is not None:
            meta = check_same_experiment(checkpoint, self.experiment)
            trainer.read(checkpoint, meta)
            self.start = meta["step"]
            if trainer.parts > self.mesh.dp and self.config.trainer.micro_batch_size is None:
                print(
                    f"each batch was split into {trainer.parts} parts, and is into {self.mesh.dp} now: to stay the "
                    f"same, it takes up to {-(-trainer.parts // self.mesh.dp)} passes a step"
                )
        self.metrics, self.tracker, self.requests = Metrics(), Tracker(), Requests()
        if self.mesh.is_main:
            self.requests = RunRequests(folder, self.config.checkpoint.minutes)
            self._write_what_it_is(new=checkpoint is None)
            self.metrics = MetricsFile(folder / "metrics.jsonl", self.start)
            self.tracker = build_tracker(self.config.tracker, folder, plain(self.config))

    def _write_what_it_is(self, new: bool) -> None:
        """Write settings, schedule and fitted codec; a new run replaces what one without a checkpoint left."""
        aside = self.folder / "part.tmp"
        parts: dict[str, Any] = {"scheduler": self.parts.flow, "codec": self.parts.codec}
        with written(f"run {self.folder}", aside):
            for name, part in parts.items():
                target = self.folder / name
                for old in (aside, target) if new else (aside,):
                    shutil.rmtree(old, ignore_errors=True)
                if not target.is_dir() and (name == "scheduler" or hasattr(part, "fitted")):
                    part.save_pretrained(aside)
                    apply_umask(aside)
                    aside.rename(target)
            if self.config.validation.prompts:
                (self.folder / "samples").mkdir(exist_ok=True)
            with atomic_write(self.folder / "config.yaml") as file:
                Path(file).write_text(to_yaml(self.config), encoding="utf-8")

    def record(self, batch: EncodedBatch, values: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write and return the line of a step that took ``seconds`` once its batch was there."""
        clips, wait = batch.batch_size, batch.timings.waiting
        each = prod(token_grid(batch.latents.shape[2:], self.config.model.patch_size))
        rate = clips / (seconds + wait)
        line = {
            "step": batch.step,
            **values,
            "clips": clips,
            "seconds": round(seconds, 4),
            "data_seconds": round(wait, 4),
            "data_share": round(wait / (seconds + wait), 4),
            "clips_per_second": round(rate, 3),
            "tokens_per_second": round(rate * each, 1),
            "replaced": batch.replaced,
            **self.checkpoints.seconds,
        }
        self.checkpoints.seconds = {}
        self.metrics.write(line)
        if batch.step % self.config.tracker.every == 0 or "validation_loss" in values:
            self.tracker.log({f"train/{key}": value for key, value in numbers(line)}, batch.step)
        return line

    def save(self, step: int, at_once: bool) -> Path:
        """Save the state after ``step`` steps; if not ``at_once``, it may be on the disk only later.

        Raises:
            UserError: if the disk refuses, this save or the one before.
        """
        meta = {
            "experiment": self.experiment,
            "config": plain(self.config),
            "pipeline": self.settings,
            "nonfinite_in_a_row": self.trainer.nonfinite_in_a_row,
            "spikes": self.trainer.spikes.state(),
            "parts": self.trainer.parts,
            "validation_loss": self.checkpoints.losses.get(step),
            "versions": {
                "stdit": stdit.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        folder = self.checkpoints.save(
            step,
            self.trainer.state(),
            meta,
            describe=lambda folder: self.trainer.model.save_config(folder / "model"),  # type: ignore[operator]
            at_once=at_once,
        )
        self.requests.obeyed()
        if (waited := self.checkpoints.seconds.get("checkpoint_wait_seconds", 0)) > LONG_WAIT:
            ProgressBar.write(
                f"checkpoint of step {step}: waited {waited:.0f} s for the one before to be written; raise "
                "checkpoint.every if this goes on"
            )
        return folder

    def pipeline(self, step: int, weights: dict[str, Tensor]) -> Any:
        """A pipeline with these weights."""
        from stdit.pipelines.pipeline import STDiTPipeline

        parts, model = self.parts, self.parts.model.with_weights(weights).to(self.mesh.device)
        return STDiTPipeline(model, parts.codec, parts.text_encoder, parts.flow, **self.settings, step=step)

    def make_up_validation(self) -> None:
        """Write the validation videos of the step to go on from, if the run ended between saving it and them."""
        if self.start and self.validation_is_due(self.start):
            if not self.mesh.on_main(self._samples(self.start).exists):
                self.validate(self.start)

    def validate(self, step: int) -> None:
        """Write videos of the fixed prompts, made by all ranks with the averaged weights after ``step`` steps."""
        pipe = self.pipeline(
            step, {name: full_tensor(t) for name, t in self.trainer.ema.state_dict().items()}
        )
        videos = make_samples(pipe, self.config.validation.prompts, self.config.validation.seed, self.mesh)
        self.mesh.on_main(lambda: self._write_samples(videos, pipe.config, step))

    def _write_samples(self, videos: list[Any], settings: dict[str, Any], step: int) -> None:
        config, folder = self.config.validation, self._samples(step)
        with replaced(f"samples {folder}", folder) as aside:
            names = write_samples(videos, settings, config.prompts, config.seed, aside)
        *videos, sheet = (folder / name for name in names)
        self.tracker.log_videos(videos, config.prompts, sheet, step)

    def export(self, step: int) -> None:
        """Write ``pipeline/`` with the averaged weights, replacing an earlier one only when it is whole."""
        average = gather_full_tensors(self.trainer.ema.state_dict(), self.mesh)
        self.mesh.on_main(lambda: self._export(self.pipeline(step, average)))

    def _export(self, pipe: Any) -> None:
        target = self.folder / "pipeline"
        with replaced(f"pipeline {target}", target) as aside:
            pipe.save_pretrained(aside)

    def finish(self) -> str:
        """Export the pipeline, unless an earlier part of the run did; says where it is and how to use it."""
        step = max(self.start, self.config.trainer.steps)
        target = self.folder / "pipeline"
        if self.mesh.on_main(self._exported_step) != step:
            self.export(step)
        return f'{target} is written. Sample: python sample.py --checkpoint {self.folder} --prompt "..."'

    def _exported_step(self) -> int | None:
        """The step of the pipeline that an earlier part of the run exported; None if there is none."""
        from stdit.pipelines.loading import MODEL_INDEX, pipeline_step

        folder = self.folder / "pipeline"
        return pipeline_step(folder) if (folder / MODEL_INDEX).is_file() else None

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, is to happen after ``step``."""
        return step % every == 0 or step == self.config.trainer.steps

    def validation_is_due(self, step: int) -> bool:
        """Whether there are to be validation videos after ``step``."""
        return bool(self.config.validation.prompts) and self.is_due(step, self.config.validation.every)

    def _samples(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:08d}"

    def measure(self, step: int) -> dict[str, Any]:
        """The validation loss after ``step`` steps, when it is due."""
        if self.held_out is None or not self.is_due(step, self.config.validation.loss_every or 1):
            return {}
        found = self.held_out.measure(self.trainer)
        self.checkpoints.validated(step, found["validation_loss"])
        return found

    def goes_back(self, values: dict[str, Any], step: int) -> bool:
        """Go back to a checkpoint if batches that were trained on are to be left out; every rank must call this.

        Where there is none so early, they stay, and only the batch of ``step``, that was not trained on, is left out.
        """
        skip = self.config.trainer.spike.exclude_batches
        if "spike" not in values or skip == 1:
            return False
        self.checkpoints.wait()
        checkpoint = self.mesh.on_main(lambda: self._set_back(step - skip + 1))
        if checkpoint is None:
            return False
        meta = self.mesh.on_all_ranks(lambda: check_same_experiment(checkpoint, self.experiment))
        self.trainer.read(checkpoint, meta)
        self.start, self.went_back = meta["step"], True
        if self.mesh.is_main:
            self.metrics.close()
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.start)
            print(f"step {step}: the loss jumped to {values['spike']:.4g}; back to {checkpoint}")
        return True

    def _set_back(self, first: int) -> Path | None:
        """The newest whole checkpoint before batch ``first``; later ones, that know what is left out now, go."""
        folders = {
            path: at for path in self.checkpoints.folder.glob("step-*") if (at := step_of(path)) is not None
        }
        early = [path for path, at in folders.items() if at <= first]
        for path in sorted(early, reverse=True):
            if is_whole(path):
                for late in folders.keys() - set(early):
                    shutil.rmtree(late.rename(late.with_name(f"{late.name}.tmp")))
                return path
        return None

    def from_start(self, batches: Batches, watchdog: Watchdog) -> Iterator[EncodedBatch]:
        """Batches from where the run goes on, and once more each time that it goes back."""
        self.went_back = True
        while self.went_back:
            self.went_back = False
            iterator = iter(batches(self.start, self.config.trainer.steps))
            for step in range(self.start, self.config.trainer.steps):
                watchdog.phase(f"step {step}, waiting for data")
                yield next(iterator)
                if self.went_back:
                    break

    def is_asked_to_save(self, signals: Interrupts) -> bool:
        """Agree with the other ranks on signals and requests, after a step; whether a checkpoint is due by them.

        Raises:
            UserError: on every rank, if the checkpoint that is being written cannot be.
        """
        asked = self.requests.look()
        save, failed = signals.agree(self.mesh, asked.stop, [asked.save, self.checkpoints.failed])
        if failed:
            self.checkpoints.wait()
        return bool(save) or signals.agreed is not None

    def close(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """End; after an error, but not after a signal, give a checkpoint that is being written some time."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.checkpoints.leave()
        self.metrics.close()
        self.tracker.finish()


def numbers(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers of a line of ``metrics.jsonl``, and of what is in it, by their names joined with slashes."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}/")
        elif value is not None:
            yield f"{prefix}{key}", value
