"""What scripts/chaos/chaos.py writes down: a line for each start of a run, and one for what became of the run."""

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
class Part:
    """One start of a run, and its end."""

    trial: int
    split: str
    fault: str = "none"
    did: str = ""
    saving: bool = False
    """Whether a checkpoint was being written when the fault struck."""
    missed: bool = False
    """The job ended, as it should, before the fault struck."""
    resumed_at: int = 0
    """Step of the newest checkpoint that was not damaged when it started."""
    steps: int = 0
    """Steps done when it had ended."""
    code: int | None = None
    forced: bool = False
    """Whether ranks had to be killed after they were asked to end."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """Promises that were broken."""

    @property
    def struck(self) -> bool:
        return self.fault != "none" and not self.missed


@dataclass
class Verdict:
    """What became of the run of a trial."""

    trial: int
    splits: list[str]
    """Those that it ran on; of one alone, the result must be the undisturbed one bit for bit."""
    loss_difference: float | None = None
    weights_difference: float | None = None
    wrong: list[str] = field(default_factory=list)


def read_log(file: Path, head: dict[str, Any]) -> tuple[list[Part], list[Verdict]]:
    """Parts and verdicts of the trials that have ended; the log is made, or cut after the last of them.

    Args:
        head: what must be the same for a log to be gone on with.

    Raises:
        UserError: if it is of other settings.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines and json.loads(lines[0]) != head:
        raise UserError(f"{file} is the log of other settings: choose another --output, or move it away")
    found = [json.loads(line) for line in lines[1:]]
    verdicts = [Verdict(**values) for values in found if "fault" not in values]
    parts = [Part(**values) for values in found if "fault" in values and values["trial"] < len(verdicts)]
    kept = [head, *(values for values in found if values["trial"] < len(verdicts))]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    return parts, verdicts


def add_to_log(file: Path, line: Part | Verdict) -> None:
    with file.open("a", encoding="utf-8") as log:
        log.write(json.dumps(asdict(line)) + "\n")


def describe(line: Part | Verdict) -> str:
    """A line for people."""
    wrong = "".join(f"\n    BROKEN PROMISE: {one}" for one in line.wrong)
    if isinstance(line, Verdict):
        run = f"trial {line.trial} on {', '.join(line.splits)}"
        if line.loss_difference is None:
            return f"{run}: NOT as undisturbed{wrong}"
        return f"{run}: losses differ by {line.loss_difference:.1e}, weights by {line.weights_difference:.1e}"
    what = f"{line.fault}: {line.did or 'missed'}" if line.fault != "none" else "undisturbed to the end"
    saving = ", while a checkpoint was written" if line.saving else ""
    return f"  {line.split:<12} steps {line.resumed_at:>4} to {line.steps:>4}  {what}{saving}{wrong}"


def table(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> str:
    """Faults by kind and number of ranks, and what became of the runs."""
    rows: list[Sequence[object]] = [COLUMNS]
    for name in (*FAULTS, "none"):
        if some := [part for part in parts if part.fault == name and not part.missed]:
            rows.append(_row(name, some))
    rows.append(_row("all", [part for part in parts if part.struck]))
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


def _row(name: str, parts: Sequence[Part]) -> Sequence[object]:
    ranks = [parse_split(part.split).ranks for part in parts]
    seconds = sum(part.seconds for part in parts) / max(len(parts), 1)
    counts = [len(parts), ranks.count(1), ranks.count(2), sum(n > 2 for n in ranks)]
    saving, broken = sum(part.saving for part in parts), sum(bool(part.wrong) for part in parts)
    return [name, *counts, saving, f"{seconds:.1f}", broken]
