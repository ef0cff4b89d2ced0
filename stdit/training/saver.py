"""Save checkpoints of a run when they are due or asked for, and load the one that it resumes from."""

import platform
from pathlib import Path
from typing import Any

import torch

import stdit
from stdit.lora.adapters import adapter_settings
from stdit.settings import plain
from stdit.training.build import RunComponents
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.early_stopping import EarlyStopping
from stdit.training.lineage import CLIP_LIST, check_can_resume, same_batches
from stdit.training.requests import NoRequests, RequestFiles
from stdit.training.stop_signals import StopSignals
from stdit.training.system import ProgressBar
from stdit.training.trainer import Trainer

STOP_OR_SAVE = "stop or save"
"""Name of the saver's flags in the exchange of a step."""
LOSS_CLIPS = ("loss_manifest", "loss_clips", "loss_levels")
"""Settings of the validation that say what its loss is measured on."""
LONG_WAIT = 1.0
"""Print a message if a save waited longer than this many seconds for the one before."""


class Saver:
    """Checkpoints of a run; every rank has one and must make the same calls.

    Args:
        folder: of the run.
        components: of the run.
        trainer: whose state is saved.
        pipeline_settings: settings of the pipeline that is made of a checkpoint.
        checkpoint: to resume from; none: start at step 0.

    Raises:
        UserError: if the checkpoint is of another model, or cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        components: RunComponents,
        trainer: Trainer,
        pipeline_settings: dict[str, Any],
        checkpoint: Path | None,
    ) -> None:
        self.config, self.experiment = components.config, components.experiment
        self.components, self.lineage = components, components.lineage
        self.trainer, self.mesh, self.pipeline_settings = trainer, trainer.mesh, pipeline_settings
        self.checkpoints = CheckpointWriter(
            folder / "checkpoints", self.config.checkpoint, self.mesh, self.config.parallel.timeout
        )
        self.early_stopping = EarlyStopping(self.config.validation)
        self.start_step = 0 if checkpoint is None else self.load(checkpoint)
        if components.resumed is not None:
            print(components.resumed)
        if checkpoint is not None and self._needs_more_micro_batches():
            print(
                f"each batch was split into {trainer.batch_splits} parts, and now into {self.mesh.dp}: to compute "
                f"the same, a step has up to {-(-trainer.batch_splits // self.mesh.dp)} micro-batches"
            )
        self.requests = NoRequests()
        if self.mesh.is_main:
            self.requests = RequestFiles(folder, self.config.checkpoint.minutes)

    def load(self, checkpoint: Path) -> int:
        """Load the trainer's state and return its step. Raises UserError if it is of another model."""
        meta = check_can_resume(checkpoint, self.experiment)
        step: int = meta["step"]
        same = same_batches(meta["experiment"], self.experiment)
        before = meta.get("config", {}).get("validation", {})
        now = plain(self.config.validation)
        # The losses of other clips are not compared with those before.
        comparable = same and all(before.get(name) == now[name] for name in LOSS_CLIPS)
        self.early_stopping.load(meta.get("early_stopping", {}) if comparable else {})
        if not same:
            # Later steps have other batches than the spikes had.
            spikes = meta.get("spikes", {})
            excluded = [other for other in spikes.get("excluded_steps", []) if other < step]
            meta["spikes"] = {**spikes, "excluded_steps": excluded}
        self.trainer.read(checkpoint, meta)
        return step

    @property
    def changed_step(self) -> int:
        """The step before which the run was another experiment; 0 if it never was."""
        return self.lineage[-1]["step"] if self.lineage else 0

    def _needs_more_micro_batches(self) -> bool:
        return self.trainer.batch_splits > self.mesh.dp and self.config.trainer.micro_batch_size is None

    def exchange_flags(self, signals: StopSignals) -> None:
        """Register what `is_due` depends on with the exchange of steps: signals, requests, and failures to save."""

        def poll() -> list[int]:
            requested = self.requests.poll()
            return [*signals.flags(requested.stop), requested.save, self.checkpoints.failed]

        self.trainer.exchange.register(STOP_OR_SAVE, poll)

    def is_due(self, step: int, signals: StopSignals) -> bool:
        """Return whether to save after ``step`` steps, because of the settings, a signal or a request.

        Every rank must call this after each step: it also makes all ranks stop after the same one. On several ranks,
        what happens after the loss of a step was exchanged counts in the next step.

        Raises:
            UserError: on every rank, if the checkpoint that is being written has failed on one.
        """
        *received, save, failed = self.trainer.exchange.take(STOP_OR_SAVE)
        signals.agree(received)
        if failed:
            self.checkpoints.wait()
        stops = signals.stop_signal is not None
        early = self.early_stopping
        checkpoint, is_due = self.config.checkpoint, self.config.trainer.is_due
        kept = checkpoint.keep_every is not None and is_due(step, checkpoint.keep_every)
        kept |= early.is_over or early.best_step == step
        return bool(save) or stops or kept or is_due(step, checkpoint.every)

    def save(self, step: int, at_once: bool) -> Path:
        """Save the state after ``step`` steps.

        Args:
            at_once: return when it is on the disk; otherwise it may be written while the run continues.

        Raises:
            UserError: if it cannot be written, or the one before could not.
        """
        meta = {
            "experiment": self.experiment,
            "lineage": self.lineage,
            "config": plain(self.config),
            "pipeline": self.pipeline_settings,
            "nonfinite_in_a_row": self.trainer.nonfinite_in_a_row,
            "spikes": self.trainer.spikes.state(),
            "batch_splits": self.trainer.batch_splits,
            "matmul_precision": self.trainer.matmul_state(),
            "early_stopping": self.early_stopping.state(),
            "validation_loss": self.checkpoints.losses.get(step),
            **self._origin_meta(),
            "versions": {
                "stdit": stdit.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        self.checkpoints.best_step = self.early_stopping.best_step
        folder = self.checkpoints.save(
            step,
            self.trainer.state(),
            meta,
            write_more=self._write_more,
            at_once=at_once,
        )
        self.requests.fulfilled()
        if (waited := self.checkpoints.seconds.get("checkpoint_wait_seconds", 0)) > LONG_WAIT:
            ProgressBar.write(
                f"checkpoint of step {step}: waited {waited:.0f} s for the one before to be written; raise "
                "checkpoint.every if this happens again"
            )
        return folder

    def _origin_meta(self) -> dict[str, Any]:
        """Return the settings of an adapter and where its base was, or where a teacher was; else nothing."""
        base, teacher = self.components.base, self.components.teacher
        if teacher is not None:
            return {"teacher": teacher.source._asdict()}
        if base is None:
            return {}
        return {"adapter": adapter_settings(self.components.model), "base": base._asdict()}

    def _write_more(self, folder: Path) -> None:
        """Write what a checkpoint has beside tensors of the trainer, on the main rank."""
        self.trainer.model.save_config(folder / "model")  # type: ignore[operator]
        (folder / CLIP_LIST).write_bytes(self.components.clip_list)

    def take_seconds(self) -> dict[str, float]:
        """Return how long the last save took, by name; empty if that was returned before."""
        seconds, self.checkpoints.seconds = self.checkpoints.seconds, {}
        return seconds

    def close(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Wait some time for the checkpoint that is being written, unless a signal ended the run."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.checkpoints.wait_at_exit()
