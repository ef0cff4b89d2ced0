"""Read the results of a run for scripts/chaos/chaos.py, and check the promises that training makes.

Only what a run promises to users is read: ``metrics.jsonl``, the folders ``checkpoints/step-*`` and their
``meta.json``, the exported ``pipeline/``, and what is printed. Checks yield violations, in words.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdit.checkpoint_files import newest_whole, step_folders, step_of, verify
from stdit.errors import UserError

CURVE = ("loss", "lr", "grad_norm")
"""Values of a line of metrics.jsonl that are compared; the others are times."""
GRADIENT_NORM_SLACK = 10
"""Allowed difference of a gradient's norm, as a multiple of that of a loss: it is less stable."""
Line = dict[str, Any]


def read_lines(run: Path) -> list[bytes]:
    """Return the complete lines of metrics.jsonl."""
    try:
        return [
            line
            for line in (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            if line[-1:] == b"\n"
        ]
    except FileNotFoundError:
        return []


def steps_done(run: Path) -> int:
    """Return the number of steps that metrics.jsonl has."""
    lines = read_lines(run)
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def visible_steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that have their final name, in order."""
    return sorted(step_folders(run / "checkpoints"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def is_complete(run: Path, step: int) -> bool:
    """Return whether a checkpoint exists and passes verification."""
    try:
        verify(checkpoint(run, step))
    except UserError:
        return False
    return True


def is_saving(run: Path, since: float) -> bool:
    """Return whether a checkpoint is being written or removed: its folder has a temporary name meanwhile.

    Args:
        since: start of the job (`time.time`); folders that an earlier job left do not count.
    """
    for folder in (run / "checkpoints").glob("step-*.tmp"):
        try:
            if folder.stat().st_ctime >= since:
                return True
        except FileNotFoundError:
            continue
    return False


@dataclass(frozen=True)
class Result:
    """Curve and weights of a run that has ended."""

    curve: list[Line]
    weights: dict[str, "np.ndarray[Any, Any]"]
    """Of the exported pipeline's transformer."""


def read_result(run: Path) -> Result:
    from safetensors.numpy import load_file

    weights: dict[str, Any] = {}
    for file in sorted((run / "pipeline" / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    return Result([json.loads(line) for line in read_lines(run)], weights)


def compare(found: Result, expected: Result, tolerance: float) -> Iterator[str]:
    """Yield what differs in the loss curve and the weights.

    Args:
        tolerance: relative; 0: bit for bit. Weights are compared by the norm of their difference.
    """
    steps = [[line["step"] for line in result.curve] for result in (found, expected)]
    if steps[0] != steps[1]:
        yield f"metrics.jsonl has {len(steps[0])} lines, of the steps {_ranges(steps[0])}, not {_ranges(steps[1])}"
        return
    for one, other in zip(found.curve, expected.curve, strict=True):
        for name in CURVE:
            allowed = tolerance * (GRADIENT_NORM_SLACK if name == "grad_norm" else 1)
            if _difference(one[name], other[name]) > allowed:
                yield f"{name} of step {one['step']} is {one[name]!r}, undisturbed {other[name]!r}"
                return
    if found.weights.keys() != expected.weights.keys() or not expected.weights:
        yield "pipeline/ has no weights, or weights of other names"
        return
    difference = weights_difference(found, expected)
    if difference > tolerance:
        yield f"final weights differ by {difference:.1e} of their norm"


def curve_difference(found: Result, expected: Result) -> float:
    """Return the largest relative difference of a loss."""
    pairs = zip(found.curve, expected.curve, strict=True)
    return max((_difference(one["loss"], other["loss"]) for one, other in pairs), default=0.0)


def weights_difference(found: Result, expected: Result) -> float:
    """Return the norm of the difference of all weights over their norm; 0 only if equal bit for bit."""
    squares = [0.0, 0.0]
    for name, tensor in expected.weights.items():
        other = found.weights[name]
        if tensor.shape != other.shape:
            return float("inf")
        if tensor.tobytes() != other.tobytes():
            squares[0] += float(np.square(other.astype(np.float64) - tensor.astype(np.float64)).sum())
        squares[1] += float(np.square(tensor.astype(np.float64)).sum())
    return float(np.sqrt(squares[0] / max(squares[1], 1e-300)))


def check_metrics(run: Path, before: list[bytes], resumed_at: int) -> Iterator[str]:
    """Check that metrics.jsonl has steps 0, 1, ... once each, and is unchanged before the resumed step.

    Args:
        before: the lines before this attempt of the run began.
        resumed_at: step of the checkpoint that it should resume from.
    """
    lines = read_lines(run)
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(len(steps))):
        yield f"metrics.jsonl has lines of the steps {_ranges(steps)}"
    redone = next(
        (i for i, pair in enumerate(zip(before, lines, strict=False)) if pair[0] != pair[1]), resumed_at
    )
    if redone < resumed_at or len(lines) < resumed_at:
        found = min(redone, len(lines))
        yield f"lost more than the steps after the checkpoint of step {resumed_at}: resumed from {found}"


def check_checkpoints(run: Path, damaged: Collection[int], expected: int) -> Iterator[str]:
    """Check that every checkpoint with its final name is complete, except damaged ones, and that the newest complete
    one is of step ``expected`` (0: none) or later."""
    for step in set(visible_steps(run)) - set(damaged):
        if not is_complete(run, step):
            yield f"{checkpoint(run, step)} is broken, but has its final name"
    newest, _ = newest_whole(run / "checkpoints")
    step = step_of(newest) or 0 if newest else 0
    if step < expected:
        yield f"the newest complete checkpoint is that of step {step}, but there was one of step {expected}"


def _difference(one: Any, other: Any) -> float:
    """Return the relative difference; 0 only for equal values (None: a step that was skipped)."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(other), 1e-12)


def _ranges(steps: list[int]) -> str:
    """Format steps such as ``0-3, 5-9``."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] + 1 == step:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(f"{low}-{high}" for low, high in ranges) or "none"
