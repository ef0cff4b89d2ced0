"""What scripts/chaos/chaos.py reads of a run, and the promises that it holds it to.

Only what a run promises to users is looked at: ``metrics.jsonl``, the folders ``checkpoints/step-*`` and their
``meta.json``, the exported ``pipeline/``, and what is printed. Checks return what is wrong, in words.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stdit.checkpoint_files import newest_whole, step_of, verify
from stdit.errors import UserError

CURVE = ("loss", "lr", "grad_norm")
"""What is compared of a line of metrics.jsonl; the other values are times."""
GRADIENT_NORM_SLACK = 10
"""A gradient's norm may differ by so many times what a loss may: it is the less stable of the two."""
Line = dict[str, Any]


def read_lines(run: Path) -> list[bytes]:
    """Whole lines of metrics.jsonl."""
    try:
        return [
            line
            for line in (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            if line[-1:] == b"\n"
        ]
    except FileNotFoundError:
        return []


def steps_done(run: Path) -> int:
    """Steps of which there is a line."""
    lines = read_lines(run)
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def visible(run: Path) -> list[int]:
    """Steps of the checkpoints that have their final name, in order."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(step for folder in folders if (step := step_of(folder)) is not None)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def is_whole(run: Path, step: int) -> bool:
    """Whether a checkpoint is there, and as it was written."""
    try:
        verify(checkpoint(run, step))
    except UserError:
        return False
    return True


def is_saving(run: Path, since: float) -> bool:
    """Whether a checkpoint is being written, or an old one removed: its folder has another name meanwhile.

    Args:
        since: when the run was started, as `time.time` says; what one before it has left does not count.
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
    """What is left of a run that has ended."""

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
    """What differs in the loss curve and the weights.

    Args:
        tolerance: relative; 0: bit for bit. Of the weights, the norm of the difference counts.
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
    """The largest relative difference of a loss."""
    pairs = zip(found.curve, expected.curve, strict=True)
    return max((_difference(one["loss"], other["loss"]) for one, other in pairs), default=0.0)


def weights_difference(found: Result, expected: Result) -> float:
    """Norm of the difference of all weights, relative to their norm; 0 only if they are equal bit for bit."""
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
    """Lines are those of the steps 0, 1, ... once each, and those before the resumed step are as they were.

    Args:
        before: the lines before this part of the run began.
        resumed_at: the step of the checkpoint that it had to go on from.
    """
    lines = read_lines(run)
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(len(steps))):
        yield f"metrics.jsonl has lines of the steps {_ranges(steps)}"
    redone = next(
        (i for i, pair in enumerate(zip(before, lines, strict=False)) if pair[0] != pair[1]), resumed_at
    )
    if redone < resumed_at or len(lines) < resumed_at:
        went_on = min(redone, len(lines))
        yield f"lost more than what followed the checkpoint of step {resumed_at}: went on from {went_on}"


def check_checkpoints(run: Path, damaged: Collection[int], expected: int) -> Iterator[str]:
    """Every checkpoint with its final name is whole, but for those that were damaged, and the newest whole one is
    that of the step ``expected`` (0: none), or a newer one."""
    for step in set(visible(run)) - set(damaged):
        if not is_whole(run, step):
            yield f"{checkpoint(run, step)} is broken, but has its final name"
    newest, _ = newest_whole(run / "checkpoints")
    step = step_of(newest) or 0 if newest else 0
    if step < expected:
        yield f"the newest whole checkpoint is that of step {step}, but there was one of step {expected}"


def _difference(one: Any, other: Any) -> float:
    """Relative; 0 only for equal values (None: a step that was skipped)."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(other), 1e-12)


def _ranges(steps: list[int]) -> str:
    """Such as ``0-3, 5-9``."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] + 1 == step:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(f"{low}-{high}" for low, high in ranges) or "none"
