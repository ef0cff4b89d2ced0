"""Command line arguments that several scripts have."""

import argparse
from pathlib import Path

from stdit.errors import UserError


def positive_int(text: str) -> int:
    """Read an integer of at least 1, for ``add_argument(type=...)``."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def output_file(text: str) -> Path:
    """Read the path of a file to write, whose folder must exist."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text}: must be a file in a folder that exists: make {path.parent} first"
        )
    return path


def preset_file(model: str) -> Path:
    """Return the config of ``--model``, a preset of configs/models. Raises UserError if there is none."""
    path = Path(__file__).resolve().parents[1] / "configs" / "models" / f"{model}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in path.parent.glob("*.yaml")))
        raise UserError(f"--model {model}: there is no such preset: choose one of {names}")
    return path
