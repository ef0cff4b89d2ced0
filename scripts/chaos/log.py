"""Log of scripts/chaos/chaos.py: a line for each attempt (start of a run), and a verdict for each trial (run)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.chaos.faults import FAULTS
from scripts.chaos.jobs import parse_split
from stdit.errors import UserError

COLUMNS = ("fault", "struck", "1 rank", "2", "more", "saving", "seconds", "broken")


@dataclass
class Attempt:
    """One start of a run, the fault that struck it, and how it ended."""

    trial: int
    split: str
    fault: str = "none"
    action: str = ""
    saving: bool = False
    """Whether a checkpoint was being written when the fault struck."""
    missed: bool = False
    """Whether the job ended, as it should, before the fault struck."""
    resumed_at: int = 0
    """Step of the newest checkpoint that was not damaged when it started."""
    steps: int = 0
    """Steps done when it had ended."""
    code: int | None = None
    forced: bool = False
    """Whether ranks had to be killed after they were asked to end."""
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    """Promises that were broken, in words."""

    @property
    def struck(self) -> bool:
        return self.fault != "none" and not self.missed


@dataclass
class Verdict:
    """How the run of a trial compares with an undisturbed one."""

    trial: int
    splits: list[str]
    """Splits that it ran on; if it was only one, the result must be bit for bit that of an undisturbed run."""
    loss_difference: float | None = None
    weights_difference: float | None = None
    violations: list[str] = field(default_factory=list)


def read_log(file: Path, head: dict[str, Any]) -> tuple[list[Attempt], list[Verdict]]:
    """Read the attempts and verdicts of complete trials; create the log, or cut it after the last of these.

    Args:
        head: settings of the trials; a log can be continued only with the same.

    Raises:
        UserError: if the log has other settings.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines and json.loads(lines[0]) != head:
        raise UserError(f"{file} is the log of other settings: choose another --output, or move it away")
    found = [json.loads(line) for line in lines[1:]]
    verdicts = [Verdict(**values) for values in found if "fault" not in values]
    attempts = [
        Attempt(**values) for values in found if "fault" in values and values["trial"] < len(verdicts)
    ]
    kept = [head, *(values for values in found if values["trial"] < len(verdicts))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    return attempts, verdicts


def add_to_log(file: Path, line: Attempt | Verdict) -> None:
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(asdict(line)) + "\n")


def describe(line: Attempt | Verdict) -> str:
    """Format an attempt or a verdict as a line of text."""
    wrong = "".join(f"\n    BROKEN PROMISE: {one}" for one in line.violations)
    if isinstance(line, Verdict):
        run = f"trial {line.trial} on {', '.join(line.splits)}"
        if line.loss_difference is None:
            return f"{run}: NOT as undisturbed{wrong}"
        return f"{run}: losses differ by {line.loss_difference:.1e}, weights by {line.weights_difference:.1e}"
    what = f"{line.fault}: {line.action or 'missed'}" if line.fault != "none" else "undisturbed to the end"
    saving = ", while a checkpoint was written" if line.saving else ""
    return f"  {line.split:<12} steps {line.resumed_at:>4} to {line.steps:>4}  {what}{saving}{wrong}"


def table(attempts: Sequence[Attempt], verdicts: Sequence[Verdict]) -> str:
    """Format counts of faults by kind and number of ranks, and the differences of the runs."""
    rows: list[Sequence[object]] = [COLUMNS]
    for name in (*FAULTS, "none"):
        if some := [attempt for attempt in attempts if attempt.fault == name and not attempt.missed]:
            rows.append(_row(name, some))
    rows.append(_row("all", [attempt for attempt in attempts if attempt.struck]))
    lines = [f"{row[0]:<12}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    for kind, some_verdicts in (
        ("one split", [verdict for verdict in verdicts if len(verdict.splits) == 1]),
        ("several splits", [verdict for verdict in verdicts if len(verdict.splits) > 1]),
    ):
        right = [verdict for verdict in some_verdicts if verdict.loss_difference is not None]
        losses = max((verdict.loss_difference or 0.0 for verdict in right), default=0.0)
        weights = max((verdict.weights_difference or 0.0 for verdict in right), default=0.0)
        lines.append(
            f"runs on {kind}: {len(some_verdicts)}, as undisturbed {len(right)}; largest relative difference of "
            f"losses {losses:.1e}, of weights {weights:.1e}"
        )
    return "\n".join(lines)


def _row(name: str, attempts: Sequence[Attempt]) -> Sequence[object]:
    ranks = [parse_split(attempt.split).ranks for attempt in attempts]
    seconds = sum(attempt.seconds for attempt in attempts) / max(len(attempts), 1)
    counts = [len(attempts), ranks.count(1), ranks.count(2), sum(n > 2 for n in ranks)]
    saving, broken = (
        sum(attempt.saving for attempt in attempts),
        sum(bool(attempt.violations) for attempt in attempts),
    )
    return [name, *counts, saving, f"{seconds:.1f}", broken]
