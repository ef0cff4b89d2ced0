"""Trials of chaos.py: each is one run that faults interrupt, and whose promises are checked after each fault."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.chaos.faults import FAULTS, Fault, FaultContext, MissedError, StuckError, damage_newest
from scripts.chaos.jobs import Job, Launcher, Split, parse_split, remaining_processes, send_signal
from scripts.chaos.log import Attempt, Verdict, add_to_log, describe, read_log
from scripts.chaos.runs import (
    Result,
    check_checkpoints,
    check_metrics,
    compare,
    curve_difference,
    is_complete,
    is_saving,
    read_lines,
    read_result,
    steps_done,
    visible_steps,
    weights_difference,
)
from scripts.network import LOOPBACK, Network
from stdit.errors import UserError

FAULTS_PER_TRIAL = 8
SETTLE_SECONDS = 5.0
"""Seconds for processes to disappear after their job has ended."""
IDLE_TRIALS = 3
"""Number of trials in a row without a fault after which to give up."""


@dataclass
class Setup:
    """The run that is disturbed, how it is started, and the results of undisturbed runs."""

    launcher: Launcher
    argv: list[str]
    """Arguments of train.py."""
    steps: int
    """Steps of a run."""
    output: Path
    splits: list[Split]
    faults: list[str]
    limit: float
    """Seconds without progress, and for a job to end, after which it is stuck."""
    tolerance: float
    """Relative difference that is allowed between splits."""
    network: Network | None = None
    """A pair of network namespaces, if this machine can make one."""
    startup: float = 1.0
    """Seconds to the first step, as measured last."""
    references: dict[Split, Result] = field(default_factory=dict)

    def run_folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def log(self, name: str) -> Path:
        """Return the file for the output of the processes of a run."""
        return self.output / f"{name}.log"

    def start(self, name: str, split: Split, network: Network = LOOPBACK) -> Job:
        self.run_folder(name).parent.mkdir(parents=True, exist_ok=True)
        where = ["--output_dir", str(self.output / "runs"), "--name", name]
        return self.launcher.start(split, [*self.argv, *where], self.log(name), network)

    def reference(self, split: Split) -> Result:
        """Return the result of an undisturbed run on a split. Raises UserError if that run fails."""
        if split not in self.references:
            name = f"undisturbed-{split}".replace(":", "-")
            shutil.rmtree(self.run_folder(name), ignore_errors=True)
            job = self.start(name, split)
            context = FaultContext(
                job, self.run_folder(name), random.Random(), target=1, startup=0, limit=self.limit
            )
            try:
                context.reach_target()
                self.startup = time.time() - context.launched
                wait_for_end(job, self.limit)
            except MissedError:
                pass  # it ended early: its code says whether it should have
            except StuckError as error:
                raise UserError(f"the undisturbed run on {split}: {error}; see {self.log(name)}") from None
            finally:
                end(job)
            if job.poll() != 0:
                raise UserError(
                    f"the undisturbed run on {split} ended with {job.poll()}: see {self.log(name)}"
                )
            self.references[split] = read_result(self.run_folder(name))
        return self.references[split]

    def head(self, seed: int) -> dict[str, Any]:
        """Return the settings that determine the trials."""
        return {"seed": seed, "argv": self.argv, "splits": [*map(str, self.splits)], "faults": self.faults}


def run_trials(setup: Setup, seed: int, wanted: int) -> tuple[list[Attempt], list[Verdict]]:
    """Run trials until ``wanted`` faults have struck, with those in the log; return all attempts and verdicts."""
    file = setup.output / "chaos.jsonl"
    attempts, verdicts = read_log(file, setup.head(seed))
    idle = 0
    while (left := wanted - sum(attempt.struck for attempt in attempts)) > 0:
        number = len(verdicts)
        trial = Trial(setup, number, random.Random(f"{seed}/{number}"))
        new = []
        for attempt in trial.attempts(min(left, FAULTS_PER_TRIAL)):
            new.append(attempt)
            add_to_log(file, attempt)
            print(describe(attempt), flush=True)
        verdict = trial.verdict(new)
        add_to_log(file, verdict)
        print(describe(verdict), flush=True)
        attempts, verdicts = [*attempts, *new], [*verdicts, verdict]
        idle = 0 if any(attempt.struck for attempt in new) else idle + 1
        if idle == IDLE_TRIALS:
            raise UserError("runs end before any fault can strike: give them more steps (--trainer.steps)")
    return attempts, verdicts


class Trial:
    """One run, disturbed until it is done or breaks a promise; in the latter case its folder is kept."""

    def __init__(self, setup: Setup, number: int, rng: random.Random) -> None:
        self.setup, self.number, self.rng = setup, number, rng
        self.name = f"trial-{number:03d}"
        self.run, self.log = setup.run_folder(self.name), setup.log(self.name)
        moves = len(setup.splits) > 1 and rng.random() < 0.5
        self.splits = setup.splits if moves else [rng.choice(setup.splits)]
        self.expected = setup.reference(self.splits[0])
        self.damaged: set[int] = set()
        """Steps of checkpoints that were damaged and have not been written again."""

    def attempts(self, count: int) -> Iterator[Attempt]:
        """Start the run again and again, with up to ``count`` faults, and at last without one."""
        shutil.rmtree(self.run, ignore_errors=True)
        for left in range(count, -1, -1):
            split = self.rng.choice(self.splits)
            name = draw_fault(self.setup.faults, split, self.rng) if left else "none"
            attempt = self._play(
                Attempt(self.number, str(split), name, resumed_at=self._newest()), split, left
            )
            yield attempt
            if attempt.violations or not attempt.struck:
                return

    def verdict(self, attempts: Sequence[Attempt]) -> Verdict:
        """Compare the run with an undisturbed one."""
        verdict = Verdict(self.number, sorted({attempt.split for attempt in attempts}))
        if attempts[-1].violations:
            return verdict
        alone = len(verdict.splits) == 1
        expected = self.setup.reference(parse_split(verdict.splits[0])) if alone else self.expected
        found = read_result(self.run)
        verdict.violations = list(compare(found, expected, 0.0 if alone else self.setup.tolerance))
        if not verdict.violations:
            verdict.loss_difference = curve_difference(found, expected)
            verdict.weights_difference = weights_difference(found, expected)
            shutil.rmtree(self.run)
        return verdict

    def _newest(self) -> int:
        """Return the step of the newest checkpoint that was not damaged; 0 if there is none."""
        return max(set(visible_steps(self.run)) - self.damaged, default=0)

    def _play(self, attempt: Attempt, split: Split, left: int) -> Attempt:
        """Start the run, let the fault strike, wait for the end, and check what is left; fills in the attempt.

        Args:
            left: faults in the rest of the run, including this one.
        """
        setup, fault = self.setup, FAULTS.get(attempt.fault)
        each = (setup.steps - attempt.resumed_at) // (left + 1)
        target = attempt.resumed_at + self.rng.randint(1, max(1, 2 * each - 1))
        before, log_size = read_lines(self.run), self.log.stat().st_size if self.log.exists() else 0
        skipped = sorted(
            step for step in self.damaged & set(visible_steps(self.run)) if step > attempt.resumed_at
        )
        network = setup.network if fault is not None and fault.over_link else None
        job = setup.start(self.name, split, network or LOOPBACK)
        context = FaultContext(
            job, self.run, self.rng, target, setup.startup, setup.limit, self.damaged, network
        )
        disturb(context, fault, attempt)
        attempt.missed = attempt.missed or (
            fault is not None and self._finished(attempt) and not fault.codes(0)
        )
        attempt.violations += self._broken_promises(attempt, fault, before)
        if (
            skipped
            and read_lines(self.run) != before  # it got far enough to look for a checkpoint
            and b"checkpoint skipped: " not in self.log.read_bytes()[log_size:]
        ):
            attempt.violations.append(f"checkpoints {skipped} were damaged, but not reported as skipped")
        if fault is not None and fault.damage is not None and attempt.struck and not attempt.violations:
            attempt.action += f"; {damage_newest(context, fault.damage)}"
        return attempt

    def _finished(self, attempt: Attempt) -> bool:
        return attempt.code == 0 and attempt.steps == self.setup.steps

    def _broken_promises(self, attempt: Attempt, fault: Fault | None, before: list[bytes]) -> Iterator[str]:
        """Yield the promises that an attempt broke.

        Args:
            before: the lines of metrics.jsonl when it began.
        """
        if fault is None or attempt.missed:
            if not self._finished(attempt):
                yield f"ended with code {attempt.code} after {attempt.steps} steps, though no fault had struck"
        elif attempt.code is not None and not fault.codes(attempt.code):
            yield f"ended with code {attempt.code}"
        elif fault.loses_nothing and visible_steps(self.run)[-1:] != [attempt.steps]:
            newest = visible_steps(self.run)[-1:]
            yield f"{attempt.steps} steps were done, but the newest checkpoint is of step {newest}"
        yield from check_processes()
        yield from check_metrics(self.run, before, attempt.resumed_at)
        self.damaged -= {step for step in self.damaged if is_complete(self.run, step)}  # written again
        yield from check_checkpoints(self.run, self.damaged, attempt.resumed_at)


def draw_fault(faults: Sequence[str], split: Split, rng: random.Random) -> str:
    """Choose a fault at random that fits the number of ranks."""
    fitting = [name for name in faults if FAULTS[name].least_ranks <= split.ranks]
    return rng.choices(fitting, [FAULTS[name].weight for name in fitting])[0] if fitting else "none"


def disturb(context: FaultContext, fault: Fault | None, attempt: Attempt) -> None:
    """Let a fault strike, and wait until the job has ended; fills in the attempt."""
    try:
        if fault is not None:
            attempt.action = fault.strike(context)
            attempt.saving = is_saving(context.run, context.launched)
        wait_for_end(context.job, context.limit)
    except MissedError:
        attempt.missed = True
    except StuckError as error:
        attempt.violations.append(str(error))
    finally:
        end(context.job)
        if context.network is not None:
            space = context.network.prefixes[-1][-1]
            subprocess.run(["ip", "-n", space, "link", "set", "link0", "up"], check=True)
    attempt.code, attempt.forced, attempt.steps = (
        context.job.poll(),
        context.job.forced,
        steps_done(context.run),
    )
    attempt.seconds = round(time.time() - context.launched, 2)


def check_processes() -> Iterator[str]:
    """Check that no process is left soon after a job has ended; kill what is left."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := remaining_processes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        send_signal(signal.SIGKILL, left)
        yield f"processes were left behind: {left}"


def wait_for_end(job: Job, limit: float) -> None:
    """Wait until a job has ended. Raises StuckError after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while job.poll() is None:
        if time.monotonic() > deadline:
            raise StuckError(f"had not ended after {limit:g} s")
        time.sleep(0.01)


def end(job: Job) -> None:
    """Kill what is left of a job."""
    while job.poll() is None:
        send_signal(signal.SIGKILL, job.everyone())
        time.sleep(0.01)
