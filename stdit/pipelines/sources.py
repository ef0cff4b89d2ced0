"""Find the files of a pipeline: in a run, one of its checkpoints, or an exported pipeline. Imports no torch."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import (
    META,
    newest_whole,
    read_json,
    step_folders,
    step_of,
    verify,
    verify_if_sealed,
)
from stdit.errors import UserError
from stdit.lora.config import ADAPTER_FILE
from stdit.pipelines.bundled import bundled_folder

MODEL_INDEX = "model_index.json"
WEIGHTS = ".safetensors"


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSource:
    """Location of the weights: an exported pipeline, or a checkpoint of a run."""

    path: Path
    run: Path | None
    """The run folder that contains it, if any."""
    is_pipeline: bool


def find_checkpoint_source(
    checkpoint: str | Path | None, ema: bool = True, verified: bool = True
) -> CheckpointSource:
    """Find out what ``checkpoint`` names, and verify that it is complete. Loads no weights and imports no torch.

    A run folder stands for its newest complete checkpoint, or its pipeline if that is at least as new and ``ema`` is
    true: a pipeline has averaged weights alone. Of a pipeline only the small files are verified here, if it has a
    manifest: components verify themselves when they are loaded. None stands for the model that comes with stdit.

    Args:
        verified: read the files, and pass over checkpoints that are damaged; False: finished ones count as complete,
            for lists of what there is.

    Raises:
        UserError: if there is nothing to sample from, or it is damaged.
    """
    if checkpoint is None:
        return _exported_source(bundled_folder(), None, ema)
    if not str(checkpoint):
        raise UserError(
            "no checkpoint: give --checkpoint a run folder (outputs/NAME) or a pipeline folder, or leave it out for "
            "the model that comes with stdit."
        )
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(
            f"checkpoint {path}: there is no such folder. Give a run (outputs/NAME), a checkpoint, or a "
            "pipeline folder."
        )
    if (path / ADAPTER_FILE).is_file() or (path.is_file() and path.suffix == WEIGHTS):
        raise UserError(
            f"checkpoint {path}: is an adapter: give it by --lora, beside the checkpoint of its model, or give its "
            "run (outputs/NAME)."
        )
    if (path / MODEL_INDEX).is_file():
        if verified:
            verify_if_sealed(path, _is_small)
        run = path.parent if (path.parent / "config.yaml").is_file() else None
        return _exported_source(path, run, ema)
    if step_of(path) is not None or is_checkpoint(path):
        if verified:
            verify(path, needed=_weights(ema))
        return CheckpointSource(path, path.parent.parent, False)
    if verified:
        newest, passed_over = newest_whole(path / "checkpoints", needed=_weights(ema))
    else:
        newest, passed_over = next(iter(finished_checkpoints(path)), None), []
    for reason in passed_over:
        logger.warning("skipped checkpoint: %s", reason)
    exported = path / "pipeline"
    if (has_pipeline := (exported / MODEL_INDEX).is_file()) and verified:
        verify_if_sealed(exported, _is_small)
    if has_pipeline and (
        newest is None or (ema and (pipeline_step(exported) or 0) >= (step_of(newest) or 0))
    ):
        return _exported_source(exported, path, ema)
    if newest is None:
        raise UserError(
            f"checkpoint {path} holds neither a complete checkpoint (checkpoints/step-...) nor a pipeline: "
            + (f"{passed_over[0]}" if passed_over else "train first, or give another folder.")
        )
    return CheckpointSource(newest, path, False)


def _exported_source(folder: Path, run: Path | None, ema: bool) -> CheckpointSource:
    """Return the source of a pipeline folder. Raises UserError if other weights than its only ones are asked for."""
    if not ema:
        raise UserError(
            f"checkpoint {folder} is an exported pipeline, whose only weights are the averaged ones, but ema = false "
            "asks for others: give a checkpoint of the run, or leave ema out."
        )
    return CheckpointSource(folder, run, True)


def find_initial_weights(init_from: str) -> Path:
    """Return the model folder or checkpoint with the weights of ``init_from``. Raises UserError if there is none."""
    folder = Path(init_from)
    weights = "diffusion_pytorch_model.safetensors"
    if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
        return folder
    try:
        source = find_checkpoint_source(folder)
    except UserError as error:
        raise UserError(f"init_from = {init_from}: {error}") from None
    return source.path / "transformer" if source.is_pipeline else source.path


def finished_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, newest first; their files are not read."""
    return [folder for folder in step_folders(run / "checkpoints").values() if (folder / META).is_file()]


def pipeline_step(folder: Path) -> int | None:
    """Return the training step that an exported pipeline records."""
    return read_json(folder / MODEL_INDEX, "a pipeline").get("step")


def _weights(ema: bool) -> Any:
    """Return a filter for the files that sampling reads; the optimizer's need not be complete."""
    return lambda name: name.startswith("model/") or (ema and name.startswith("ema/"))


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of a run: the components of pipelines have manifests, too."""
    return (folder / META).is_file() and (folder / "model").is_dir()


def _is_small(name: str) -> bool:
    return not name.endswith(WEIGHTS)
