"""Record the steps of a run: a line of ``metrics.jsonl`` for each, and what the tracker shows of them."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from stdit.data.batch import EncodedBatch
from stdit.models.config import token_grid
from stdit.settings import plain
from stdit.training.config import TrainConfig
from stdit.training.tracking import Metrics, MetricsFile, Tracker, build_tracker
from stdit.training.trainer import Trainer
from stdit.training.utilisation import Utilisation


class Recorder:
    """Writer of ``metrics.jsonl`` and of the tracker; all ranks call it, the main one writes.

    Args:
        folder: of the run.
        config: with the resolved sizes of the model.
        start_step: later lines of ``metrics.jsonl`` are cut off.
        trainer: of the run.
    """

    def __init__(self, folder: Path, config: TrainConfig, start_step: int, trainer: Trainer) -> None:
        self.folder, self.config, self.trainer, self.is_main = folder, config, trainer, trainer.mesh.is_main
        self.utilisation = Utilisation(config.model, bool(config.flow.conditioning), trainer.mesh.world_size)
        self.metrics, self.tracker = Metrics(), Tracker()
        if self.is_main:
            self.metrics = MetricsFile(folder / "metrics.jsonl", start_step)
            self.tracker = build_tracker(config.tracker, folder, plain(config))

    def record(self, batch: EncodedBatch, values: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Write the line of a step and return it.

        Args:
            batch: of the step.
            values: measurements of the step, by name.
            seconds: that the step took once its batch was there.
        """
        clips, wait = batch.batch_size, batch.timings.waiting
        tokens = prod(token_grid(batch.latents.shape[2:], self.config.model.patch_size))
        rate = clips / (seconds + wait)
        line = {
            "step": batch.step,
            **values,
            "clips": clips,
            "seconds": round(seconds, 4),
            "data_seconds": round(wait, 4),
            "data_share": round(wait / (seconds + wait), 4),
            "clips_per_second": round(rate, 3),
            "tokens_per_second": round(rate * tokens, 1),
            "replaced": batch.replaced,
            "matmul_precision": self.trainer.matmul_precision,
        }
        if self.is_main and self.trainer.matmul_rate is not None and not values.get("excluded"):
            line["mfu"] = round(self.utilisation.mfu(batch, seconds, self.trainer.matmul_rate), 4)
        self.metrics.write(line)
        if batch.step % self.config.tracker.every == 0 or "validation_loss" in values:
            self.tracker.log({f"train/{key}": value for key, value in _flat(line)}, batch.step)
        return line

    def rewind(self, step: int) -> None:
        """Cut off the lines of ``metrics.jsonl`` from ``step`` on, which the run will do again."""
        if self.is_main:
            self.metrics.close()
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", step)

    def close(self) -> None:
        """Close ``metrics.jsonl``, and send the tracker what is left."""
        self.metrics.close()
        self.tracker.finish()


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers of a nested line of ``metrics.jsonl``, their keys joined with slashes."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif value is not None and not isinstance(value, str):
            yield f"{prefix}{key}", value
