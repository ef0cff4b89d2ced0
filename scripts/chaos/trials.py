"""Trials of chaos.py: one run each, which faults interrupt, and which is held to its promises all the way."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench.sequence import LOOPBACK, Place
from scripts.chaos.faults import FAULTS, Fault, MissedError, Scene, StuckError, damage_newest
from scripts.chaos.jobs import Job, Launcher, Split, leftovers, parse_split, send
from scripts.chaos.log import Part, Verdict, add_to_log, describe, read_log
from scripts.chaos.runs import (
    Result,
    check_checkpoints,
    check_metrics,
    compare,
    curve_difference,
    is_saving,
    is_whole,
    read_lines,
    read_result,
    steps_done,
    visible,
    weights_difference,
)
from stdit.errors import UserError

FAULTS_A_TRIAL = 8
SETTLE_SECONDS = 5.0
"""How long processes may take to be gone once their job has ended."""
IDLE_TRIALS = 3
"""So many trials one after the other that no fault struck, and there is no use in going on."""


@dataclass
class Bench:
    """What is disturbed, how it is started, and what it gives undisturbed."""

    launcher: Launcher
    argv: list[str]
    """Arguments of train.py."""
    steps: int
    """That a run has."""
    output: Path
    splits: list[Split]
    faults: list[str]
    limit: float
    """Seconds for a job to go on, and to end."""
    tolerance: float
    """Relative difference allowed from split to split."""
    place: Place | None = None
    """Two networks of our own, where there can be such."""
    startup: float = 1.0
    """Seconds to the first step, as measured last."""
    references: dict[Split, Result] = field(default_factory=dict)

    def run_folder(self, name: str) -> Path:
        return self.output / "runs" / name

    def log(self, name: str) -> Path:
        """Everything that the processes of a run say."""
        return self.output / f"{name}.log"

    def start(self, name: str, split: Split, place: Place = LOOPBACK) -> Job:
        self.run_folder(name).parent.mkdir(parents=True, exist_ok=True)
        where = ["--output_dir", str(self.output / "runs"), "--name", name]
        return self.launcher.start(split, [*self.argv, *where], self.log(name), place)

    def reference(self, split: Split) -> Result:
        """What an undisturbed run on a split gives. Raises UserError if it does not end as it should."""
        if split not in self.references:
            name = f"undisturbed-{split}".replace(":", "-")
            shutil.rmtree(self.run_folder(name), ignore_errors=True)
            job = self.start(name, split)
            scene = Scene(job, self.run_folder(name), random.Random(), target=1, startup=0, limit=self.limit)
            try:
                scene.reach_target()
                self.startup = time.time() - scene.launched
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
        """What decides the trials."""
        return {"seed": seed, "argv": self.argv, "splits": [*map(str, self.splits)], "faults": self.faults}


def campaign(bench: Bench, seed: int, wanted: int) -> tuple[list[Part], list[Verdict]]:
    """Do trials until so many faults have struck, after those that the log has already; their parts and verdicts."""
    file = bench.output / "chaos.jsonl"
    parts, verdicts = read_log(file, bench.head(seed))
    idle = 0
    while (left := wanted - sum(part.struck for part in parts)) > 0:
        number = len(verdicts)
        trial = Trial(bench, number, random.Random(f"{seed}/{number}"))
        new = []
        for part in trial.parts(min(left, FAULTS_A_TRIAL)):
            new.append(part)
            add_to_log(file, part)
            print(describe(part), flush=True)
        verdict = trial.verdict(new)
        add_to_log(file, verdict)
        print(describe(verdict), flush=True)
        parts, verdicts = [*parts, *new], [*verdicts, verdict]
        idle = 0 if any(part.struck for part in new) else idle + 1
        if idle == IDLE_TRIALS:
            raise UserError("runs end before any fault can strike: give them more steps (--trainer.steps)")
    return parts, verdicts


class Trial:
    """One run, disturbed until it is done or has broken a promise, in which case its folder stays."""

    def __init__(self, bench: Bench, number: int, rng: random.Random) -> None:
        self.bench, self.number, self.rng = bench, number, rng
        self.name = f"trial-{number:03d}"
        self.run, self.log = bench.run_folder(self.name), bench.log(self.name)
        moves = len(bench.splits) > 1 and rng.random() < 0.5
        self.splits = bench.splits if moves else [rng.choice(bench.splits)]
        self.expected = bench.reference(self.splits[0])
        self.damaged: set[int] = set()
        """Steps of the checkpoints that were damaged, and are not written anew yet."""

    def parts(self, count: int) -> Iterator[Part]:
        """Start the run again and again, with up to so many faults, and once without."""
        shutil.rmtree(self.run, ignore_errors=True)
        for left in range(count, -1, -1):
            split = self.rng.choice(self.splits)
            name = draw_fault(self.bench.faults, split, self.rng) if left else "none"
            part = self._play(Part(self.number, str(split), name, resumed_at=self._newest()), split, left)
            yield part
            if part.wrong or not part.struck:
                return

    def verdict(self, parts: Sequence[Part]) -> Verdict:
        """Compare the run with an undisturbed one."""
        verdict = Verdict(self.number, sorted({part.split for part in parts}))
        if parts[-1].wrong:
            return verdict
        alone = len(verdict.splits) == 1
        expected = self.bench.reference(parse_split(verdict.splits[0])) if alone else self.expected
        found = read_result(self.run)
        verdict.wrong = list(compare(found, expected, 0.0 if alone else self.bench.tolerance))
        if not verdict.wrong:
            verdict.loss_difference = curve_difference(found, expected)
            verdict.weights_difference = weights_difference(found, expected)
            shutil.rmtree(self.run)
        return verdict

    def _newest(self) -> int:
        """Step of the newest checkpoint that was not damaged; 0: there is none."""
        return max(set(visible(self.run)) - self.damaged, default=0)

    def _play(self, part: Part, split: Split, left: int) -> Part:
        """Start the run, let the fault strike, wait for the end, and look at what is left; fills in the part.

        Args:
            left: faults that the rest of the run is to have, this one included.
        """
        bench, fault = self.bench, FAULTS.get(part.fault)
        each = (bench.steps - part.resumed_at) // (left + 1)
        target = part.resumed_at + self.rng.randint(1, max(1, 2 * each - 1))
        before, said = read_lines(self.run), self.log.stat().st_size if self.log.exists() else 0
        passed_over = sorted(step for step in self.damaged & set(visible(self.run)) if step > part.resumed_at)
        place = bench.place if fault is not None and fault.over_link else None
        job = bench.start(self.name, split, place or LOOPBACK)
        scene = Scene(job, self.run, self.rng, target, bench.startup, bench.limit, self.damaged, place)
        disturb(scene, fault, part)
        part.missed = part.missed or (fault is not None and self._finished(part) and not fault.codes(0))
        part.wrong += self._broken_promises(part, fault, before)
        if (
            passed_over
            and read_lines(self.run) != before  # it got as far as to look for a checkpoint
            and b"checkpoint skipped: " not in self.log.read_bytes()[said:]
        ):
            part.wrong.append(f"checkpoints {passed_over} were damaged, but not reported as skipped")
        if fault is not None and fault.damage is not None and part.struck and not part.wrong:
            part.did += f"; {damage_newest(scene, fault.damage)}"
        return part

    def _finished(self, part: Part) -> bool:
        return part.code == 0 and part.steps == self.bench.steps

    def _broken_promises(self, part: Part, fault: Fault | None, before: list[bytes]) -> Iterator[str]:
        """What is wrong with the end of a part.

        Args:
            before: the lines of metrics.jsonl when it began.
        """
        if fault is None or part.missed:
            if not self._finished(part):
                yield f"ended with code {part.code} after {part.steps} steps, though nothing had happened to it"
        elif part.code is not None and not fault.codes(part.code):
            yield f"ended with code {part.code}"
        elif fault.loses_nothing and visible(self.run)[-1:] != [part.steps]:
            yield f"{part.steps} steps were done, but the newest checkpoint is of step {visible(self.run)[-1:]}"
        yield from check_processes()
        yield from check_metrics(self.run, before, part.resumed_at)
        self.damaged -= {step for step in self.damaged if is_whole(self.run, step)}  # written anew
        yield from check_checkpoints(self.run, self.damaged, part.resumed_at)


def draw_fault(faults: Sequence[str], split: Split, rng: random.Random) -> str:
    """One of those that so many ranks can have."""
    fitting = [name for name in faults if FAULTS[name].least_ranks <= split.ranks]
    return rng.choices(fitting, [FAULTS[name].weight for name in fitting])[0] if fitting else "none"


def disturb(scene: Scene, fault: Fault | None, part: Part) -> None:
    """Let a fault strike and wait until the job has ended; fills in what happened."""
    try:
        if fault is not None:
            part.did = fault.strike(scene)
            part.saving = is_saving(scene.run, scene.launched)
        wait_for_end(scene.job, scene.limit)
    except MissedError:
        part.missed = True
    except StuckError as error:
        part.wrong.append(str(error))
    finally:
        end(scene.job)
        if scene.place is not None:
            space = scene.place.prefixes[-1][-1]
            subprocess.run(["ip", "-n", space, "link", "set", "link0", "up"], check=True)
    part.code, part.forced, part.steps = scene.job.poll(), scene.job.forced, steps_done(scene.run)
    part.seconds = round(time.time() - scene.launched, 2)


def check_processes() -> Iterator[str]:
    """No process is left below this one, soon after a job has ended."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        send(signal.SIGKILL, left)
        yield f"processes were left behind: {left}"


def wait_for_end(job: Job, limit: float) -> None:
    """Return when a job has ended. Raises StuckError if it does not."""
    deadline = time.monotonic() + limit
    while job.poll() is None:
        if time.monotonic() > deadline:
            raise StuckError(f"had not ended after {limit:g} s")
        time.sleep(0.01)


def end(job: Job) -> None:
    """Kill what is left of a job."""
    while job.poll() is None:
        send(signal.SIGKILL, job.everyone())
        time.sleep(0.01)
