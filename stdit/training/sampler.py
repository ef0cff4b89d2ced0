"""Sample from the averaged weights of a run: validation videos, and the exported pipeline."""

from pathlib import Path
from typing import Any

from torch import Tensor

from stdit.checkpoint_files import verify_if_sealed
from stdit.errors import UserError
from stdit.lora.adapters import adapter_settings, adapter_weights
from stdit.lora.files import write_adapter
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import full_tensor, gather_full_tensors
from stdit.pipelines.finished import difference
from stdit.pipelines.weights import FrozenModel
from stdit.training.build import RunComponents
from stdit.training.disk import replace_folder
from stdit.training.ema import EMA
from stdit.training.tracking import Tracker
from stdit.training.validation import (
    BASE_SAMPLES,
    label,
    make_samples,
    sample_files,
    validation_requests,
    write_samples,
)


class Sampler:
    """Validation videos and the exported pipeline; every rank has one and must make the same calls.

    Args:
        folder: of the run.
        components: of the run.
        ema: the averaged weights.
        pipeline_settings: settings of the pipeline.
        tracker: shows the videos.
    """

    def __init__(
        self,
        folder: Path,
        components: RunComponents,
        ema: EMA,
        mesh: Mesh,
        pipeline_settings: dict[str, Any],
        tracker: Tracker,
    ) -> None:
        self.folder, self.components, self.ema, self.mesh = folder, components, ema, mesh
        self.pipeline_settings, self.tracker = pipeline_settings, tracker
        self.config = components.config

    def is_due(self, step: int, is_over: bool) -> bool:
        """Return whether to make validation videos after ``step`` steps, of which the last is one if ``is_over``."""
        validation = self.config.validation
        return bool(validation.prompts) and (is_over or self.config.trainer.is_due(step, validation.every))

    def catch_up(self, start_step: int, is_over: bool) -> None:
        """Make the validation videos of the resumed step, if the run ended between saving it and making them."""
        if start_step and self.is_due(start_step, is_over):
            if not self.mesh.on_main(self._samples(start_step).exists):
                self.validate(start_step)

    def validate(self, step: int) -> None:
        """Write videos of the validation prompts, sampled by all ranks with the averages after ``step`` steps."""
        pipe = self._pipeline(step, {name: full_tensor(t) for name, t in self._averaged().items()})
        base = self._base_videos(pipe)
        videos = self._sample(pipe)
        self.mesh.on_main(lambda: self._write_samples(videos, pipe.config, step, base))

    @property
    def _requests(self) -> list[Any]:
        return validation_requests(self.config.validation, self.pipeline_settings["trained_steps"])

    def _sample(self, pipe: Any) -> list[Any]:
        return make_samples(pipe, self._requests, self.mesh)

    def _base_videos(self, pipe: Any) -> Path | None:
        """Return the folder of the videos that the model makes without the adapter; None: they are not compared.

        They do not change, so they are made at the first validation only.
        """
        if self.components.base is None or not self.config.validation.compare_base:
            return None
        folder = self.folder / "samples" / BASE_SAMPLES
        files = self._files(pipe.config, {"base_hash": self.components.base.hash})
        if self.mesh.on_main(lambda: any(difference(folder / name, facts) for name, facts in files.items())):
            pipe.disable_lora()
            videos = self._sample(pipe)
            pipe.enable_lora()
            self.mesh.on_main(lambda: self._write_base(videos, files, folder))
        return folder

    def _files(self, settings: dict[str, Any], origin: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return sample_files(settings, self._requests, origin)

    def _write_base(self, videos: list[Any], files: dict[str, dict[str, Any]], folder: Path) -> None:
        with replace_folder(f"samples {folder}", folder) as aside:
            write_samples(videos, files, aside)

    def _write_samples(
        self, videos: list[Any], settings: dict[str, Any], step: int, base: Path | None
    ) -> None:
        folder = self._samples(step)
        files = self._files(settings, {"checkpoint_step": step, "lineage": settings["lineage"] or []})
        with replace_folder(f"samples {folder}", folder) as aside:
            write_samples(videos, files, aside, base)
        shown = {folder / name: label(name, facts) for name, facts in files.items()}
        if base is not None:
            shown |= {base / name: f"{label(name, facts)} (base)" for name, facts in files.items()}
        self.tracker.log_videos(list(shown), list(shown.values()), folder / "sheet.png", step)

    def _samples(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:08d}"

    def export(self, step: int) -> Path:
        """Write ``pipeline/`` with the averages after ``step`` steps, unless an earlier part of the run did.

        The run of an adapter writes its file to ``lora/`` instead. An older one is replaced only when the new one is
        whole. Return the folder.
        """
        if (base := self.components.base) is not None:
            adapter = gather_full_tensors(self.ema.weights(), self.mesh)
            return self.mesh.on_main(lambda: self._write_adapter(adapter, base))
        if self.mesh.on_main(self._exported_step) != step:
            average = gather_full_tensors(self._averaged(), self.mesh)
            self.mesh.on_main(lambda: self._write_pipeline(step, average))
        return self.folder / "pipeline"

    def _averaged(self) -> dict[str, Tensor]:
        """Return all weights, those that are trained averaged."""
        return {**self.components.model.state_dict(), **self.ema.weights()}

    def _write_adapter(self, trained: dict[str, Tensor], base: FrozenModel) -> Path:
        target, model = self.folder / "lora", self.components.model
        weights = adapter_weights(model, state=trained)
        with replace_folder(f"adapter {target}", target) as aside:
            write_adapter(aside, weights, adapter_settings(model), base.hash, self.config.data.trigger)
        return target

    def _write_pipeline(self, step: int, weights: dict[str, Tensor]) -> None:
        target, parts = self.folder / "pipeline", self.components
        pipe = self._pipeline(step, weights, parts.codec.whole(), parts.text_encoder.whole())
        with replace_folder(f"pipeline {target}", target) as aside:
            pipe.save_pretrained(aside)

    def _exported_step(self) -> int | None:
        """Return the step of the pipeline in the run folder; None if there is none."""
        from stdit.pipelines.sources import MODEL_INDEX, pipeline_step

        folder = self.folder / "pipeline"
        try:
            verify_if_sealed(folder)
            return pipeline_step(folder) if (folder / MODEL_INDEX).is_file() else None
        except UserError as error:
            print(f"{error} It is exported again.")
            return None

    def _pipeline(
        self, step: int, weights: dict[str, Tensor], codec: Any = None, text_encoder: Any = None
    ) -> Any:
        """Return a pipeline; with these parts instead of those that training uses, which may not be whole."""
        from stdit.diffusion.scheduler import RectifiedFlow
        from stdit.pipelines.pipeline import STDiTPipeline

        parts, model = self.components, self.components.model.with_weights(weights).to(self.mesh.device)
        return STDiTPipeline(
            model,
            codec or parts.codec,
            text_encoder or parts.text_encoder,
            None,
            RectifiedFlow(),
            flow=parts.flow.config,
            **self.pipeline_settings,
            step=step,
            lineage=parts.lineage,
        )
