"""The small model that comes with stdit: a pipeline in ``stdit/bundled/``. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import META, read_json, verify
from stdit.errors import UserError

BUNDLED = Path(__file__).parents[1] / "bundled"
ORIGIN = "origin.json"
"""File of a bundled pipeline that tells how it was trained: see `stdit.training.bundle`."""
_FACTS = ("parameters", "step", "training_hours", "commit", "loss", "validation_loss", "scores")
"""What `origin_line` names."""
HOW_TO_GET = (
    "install stdit again (in a clone: git checkout stdit/bundled), or make it in a clone of the repository (python "
    "scripts/make_shapes.py --world 64 --output data/shapes64; python train.py --config configs/train/shapes64.yaml; "
    "python scripts/bundle.py --checkpoint outputs/shapes64)"
)
"""What a user does who lacks the model."""


def bundled_folder() -> Path:
    """Return the folder of the model that comes with stdit, all of whose files have been verified.

    Raises:
        UserError: if it is missing or damaged; the message says how to make it.
    """
    if not (BUNDLED / META).is_file():
        raise UserError(
            f"no checkpoint, and no model comes with this stdit ({BUNDLED} has no {META}): add --checkpoint with a "
            f"run folder (outputs/NAME) or a pipeline folder, or {HOW_TO_GET}."
        )
    verify(BUNDLED, kind="the model that comes with stdit,", way_out=HOW_TO_GET)
    return BUNDLED


def describe_origin(folder: Path) -> str:
    """Return a line on how the model of a bundled pipeline was trained; empty for other pipelines.

    Raises:
        UserError: the file is not as ``scripts/bundle.py`` writes it.
    """
    if not (folder / ORIGIN).is_file():
        return ""
    origin = read_json(folder / ORIGIN, "a bundled pipeline")
    if missing := [name for name in _FACTS if name not in origin]:
        raise UserError(
            f"{folder / ORIGIN}: it has no {missing[0]!r}, so it is not what scripts/bundle.py writes: remove the "
            "file, or make the pipeline again."
        )
    return origin_line(origin)


def origin_line(origin: Mapping[str, Any]) -> str:
    """Return a line of the facts in `ORIGIN`."""
    parts = [f"{origin['parameters']:,} parameters, {origin['step']:,} steps"]
    if origin["training_hours"] is not None:
        parts[0] += f" in {origin['training_hours']:.1f} hours"
    if origin["commit"] is not None:
        parts.append(f"bundled at commit {origin['commit'][:12]}")
    parts += [
        f"{name} {origin[name]:.4g}" for name in ("loss", "validation_loss") if origin[name] is not None
    ]
    for name, scores in (origin["scores"] or {}).items():
        shares = [f"{key} {scores[key]:.0%}" for key in ("strict", "lenient") if key in scores]
        parts += [f"{name}: {', '.join(shares)}"] if shares else []
    return f"its training: {'; '.join(parts)}"
