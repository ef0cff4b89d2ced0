"""Trials of scripts/chaos.py: one run each, which faults interrupt, and which is held to its promises all the way."""

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.bench_sp import LOOPBACK, Place
from scripts.chaos_faults import FAULTS, Fault, MissedError, Scene, StuckError, damage_newest
from scripts.chaos_jobs import Job, Launcher, Split, leftovers, send
from scripts.chaos_runs import (
    Result,
    check_checkpoints,
    check_metrics,
    checkpoint,
    compare,
    curve_difference,
    is_saving,
    read_lines,
    read_result,
    steps_done,
    visible,
    weights_difference,
)
from stdit.checkpoint_files import verify
from stdit.errors import UserError

FAULTS_A_TRIAL = 8
SETTLE_SECONDS = 5.0
"""How long processes may take to be gone once their job has ended."""
IDLE_TRIALS = 3
"""So many trials one after the other that no fault struck, and there is no use in going on."""


@dataclass
class Part:
    """One start of a run, and its end: a line of the log."""

    trial: int
    split: str
    fault: str = "none"
    did: str = ""
    saving: bool = False
    """Whether a checkpoint was being written when the fault struck."""
    missed: bool = False
    """The job ended, as it should, before the fault struck."""
    resumed_at: int = 0
    steps: int = 0
    """Steps done when it had ended."""
    code: int | None = None
    forced: bool = False
    """Whether ranks had to be killed after they were asked to end."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """Promises that were broken."""


@dataclass
class Verdict:
    """What became of the run of a trial: a line of the log."""

    trial: int
    splits: list[str]
    """Those that it ran on; of one alone, the result must be the undisturbed one bit for bit."""
    loss_difference: float | None = None
    weights_difference: float | None = None
    wrong: list[str] = field(default_factory=list)


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


def campaign(bench: Bench, seed: int, wanted: int) -> tuple[list[Part], list[Verdict]]:
    """Do trials until so many faults have struck, after those that the log has already; their parts and verdicts."""
    file = bench.output / "chaos.jsonl"
    parts, verdicts = read_log(file, log_head(bench, seed))
    idle = 0
    while (left := wanted - sum(struck(part) for part in parts)) > 0:
        number, begin = len(verdicts), len(parts)
        for line in trial(bench, number, random.Random(f"{seed}/{number}"), min(left, FAULTS_A_TRIAL)):
            with file.open("a", encoding="utf-8") as log:
                log.write(json.dumps(asdict(line)) + "\n")
            print(describe(line), flush=True)
            parts += [line] if isinstance(line, Part) else []
            verdicts += [line] if isinstance(line, Verdict) else []
        idle = 0 if any(struck(part) for part in parts[begin:]) else idle + 1
        if idle == IDLE_TRIALS:
            raise UserError("runs end before any fault can strike: give them more steps (--trainer.steps)")
    return parts, verdicts


def struck(part: Part) -> bool:
    return part.fault != "none" and not part.missed


def log_head(bench: Bench, seed: int) -> dict[str, Any]:
    """What must be the same for a log to be gone on with."""
    return {
        "seed": seed,
        "argv": bench.argv,
        "splits": [str(split) for split in bench.splits],
        "faults": bench.faults,
    }


def read_log(file: Path, head: dict[str, Any]) -> tuple[list[Part], list[Verdict]]:
    """Parts and verdicts of the trials that have ended; the log is made, or cut after the last of them."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if lines and json.loads(lines[0]) != head:
        raise UserError(f"{file} is the log of other settings: choose another --output, or move it away")
    parts: list[Part] = []
    verdicts: list[Verdict] = []
    pending: list[Part] = []
    kept = [json.dumps(head)]
    for line in lines[1:]:
        values = json.loads(line)
        if "fault" in values:
            pending.append(Part(**values))
            continue
        verdicts.append(Verdict(**values))
        kept += [json.dumps(asdict(part)) for part in pending] + [line]
        parts, pending = [*parts, *pending], []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return parts, verdicts


def trial(bench: Bench, number: int, rng: random.Random, count: int) -> Iterator[Part | Verdict]:
    """One run with up to so many faults: its parts, and then what became of it.

    A run that broke a promise is not gone on with, and its folder stays.
    """
    moves = len(bench.splits) > 1 and rng.random() < 0.5
    splits = bench.splits if moves else [rng.choice(bench.splits)]
    expected = bench.reference(splits[0])
    name = f"trial-{number:03d}"
    shutil.rmtree(bench.run_folder(name), ignore_errors=True)
    damaged: set[int] = set()
    done: list[Part] = []
    while not done or (done[-1].fault != "none" and not done[-1].missed and not done[-1].wrong):
        split = rng.choice(splits)
        fault = draw_fault(bench, split, rng) if len(done) < count else "none"
        begin = max(set(visible(bench.run_folder(name))) - damaged, default=0)
        each = (bench.steps - begin) // (count - len(done) + 1)
        target = begin + rng.randint(1, max(1, 2 * each - 1))
        done.append(play(bench, Part(number, str(split), fault), split, name, rng, target, damaged))
        yield done[-1]
    verdict = Verdict(number, sorted({part.split for part in done}))
    if not done[-1].wrong:
        found = read_result(bench.run_folder(name))
        tolerance = bench.tolerance if len(verdict.splits) > 1 else 0.0
        verdict.wrong = list(compare(found, expected, tolerance))
        if not verdict.wrong:
            verdict.loss_difference = curve_difference(found, expected)
            verdict.weights_difference = weights_difference(found, expected)
            shutil.rmtree(bench.run_folder(name))
    yield verdict


def draw_fault(bench: Bench, split: Split, rng: random.Random) -> str:
    fitting = [name for name in bench.faults if FAULTS[name].least_ranks <= split.ranks]
    if not fitting:
        return "none"
    return rng.choices(fitting, [FAULTS[name].weight for name in fitting])[0]


def play(
    bench: Bench, part: Part, split: Split, name: str, rng: random.Random, target: int, damaged: set[int]
) -> Part:
    """Start the run, let the fault strike, wait for the end, and look at what is left; fills in and returns the part.

    Args:
        target: steps of the run after which to strike.
        damaged: steps of the checkpoints that faults damaged; added to.
    """
    run, log, fault = bench.run_folder(name), bench.log(name), FAULTS.get(part.fault)
    place = bench.place if fault is not None and fault.over_link else None
    before, said = read_lines(run), log.stat().st_size if log.exists() else 0
    part.resumed_at = max(set(visible(run)) - damaged, default=0)
    broken = {step for step in damaged & set(visible(run)) if step > part.resumed_at}
    job = bench.start(name, split, place or LOOPBACK)
    scene = Scene(job, run, rng, target, bench.startup, bench.limit, damaged, place)
    try:
        if fault is not None:
            part.did = fault.strike(scene)
            part.saving = is_saving(run)
        wait_for_end(job, bench.limit)
    except MissedError:
        part.missed = True
    except StuckError as error:
        part.wrong.append(str(error))
    finally:
        end(job)
        if place is not None:
            subprocess.run(["ip", "-n", place.prefixes[-1][-1], "link", "set", "link0", "up"], check=True)
    part.code, part.forced, part.steps = job.poll(), job.forced, steps_done(run)
    part.seconds = round(time.time() - scene.launched, 2)
    finished = part.code == 0 and part.steps == bench.steps
    part.missed = part.missed or (finished and fault is not None and not fault.codes(0))
    part.wrong += check_end(part, fault, finished)
    part.wrong += check_metrics(run, before, part.resumed_at)
    damaged -= {step for step in damaged if is_whole(run, step)}  # written anew
    part.wrong += check_checkpoints(run, damaged, part.resumed_at)
    if (
        fault is not None
        and fault.loses_nothing
        and not part.missed
        and max(visible(run), default=0) != part.steps
    ):
        part.wrong.append(f"{part.steps} steps were done, but the newest checkpoint is {visible(run)[-1:]}")
    if broken and part.steps > part.resumed_at and b"passed over" not in log.read_bytes()[said:]:
        part.wrong.append(
            f"a damaged checkpoint was passed over without a word, or not at all: {sorted(broken)}"
        )
    if fault is not None and fault.damage is not None and not part.missed and not part.wrong:
        part.did += f"; {damage_newest(scene, fault.damage)}"
    return part


def check_end(part: Part, fault: Fault | None, finished: bool) -> Iterator[str]:
    """Exit code, processes, and what an ended run may not leave."""
    if part.missed or fault is None:
        if not finished:
            yield f"ended with code {part.code} after {part.steps} steps, though nothing had happened to it"
    elif part.code is not None and not fault.codes(part.code):
        yield f"ended with code {part.code}"
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


def is_whole(run: Path, step: int) -> bool:
    try:
        verify(checkpoint(run, step))
    except UserError:
        return False
    return True


def describe(line: Part | Verdict) -> str:
    """A line for people."""
    wrong = "".join(f"\n    BROKEN PROMISE: {one}" for one in line.wrong)
    if isinstance(line, Verdict):
        splits = f"trial {line.trial} on {', '.join(line.splits)}"
        if line.loss_difference is None:
            return f"{splits}: NOT as undisturbed{wrong}"
        return (
            f"{splits}: losses differ by {line.loss_difference:.1e}, weights by {line.weights_difference:.1e}"
        )
    what = f"{line.fault}: {line.did or 'missed'}" if line.fault != "none" else "undisturbed to the end"
    saving = ", while a checkpoint was written" if line.saving else ""
    return f"  {line.split:<12} steps {line.resumed_at:>4} to {line.steps:>4}  {what}{saving}{wrong}"


def table(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> str:
    """Faults by kind, and what became of the runs."""
    rows = [["fault", "struck", "1 rank", "2", "more", "saving", "seconds", "broken"]]
    for name in [*FAULTS, "none"]:
        some = [part for part in parts if part.fault == name and not part.missed]
        if some:
            ranks = [_ranks(part.split) for part in some]
            counts = [len(some), ranks.count(1), ranks.count(2), sum(n > 2 for n in ranks)]
            seconds = sum(part.seconds for part in some) / len(some)
            last = [
                sum(part.saving for part in some),
                f"{seconds:.1f}",
                sum(bool(part.wrong) for part in some),
            ]
            rows.append([name, *map(str, counts), *map(str, last)])
    lines = [f"{row[0]:<12}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    for kind, some_verdicts in (
        ("one split", [v for v in verdicts if len(v.splits) == 1]),
        ("several splits", [v for v in verdicts if len(v.splits) > 1]),
    ):
        right = [v for v in some_verdicts if not v.wrong and v.loss_difference is not None]
        if some_verdicts:
            losses = max((v.loss_difference or 0.0 for v in right), default=0.0)
            weights = max((v.weights_difference or 0.0 for v in right), default=0.0)
            lines.append(
                f"runs on {kind}: {len(some_verdicts)}, as undisturbed {len(right)}; largest relative difference of "
                f"losses {losses:.1e}, of weights {weights:.1e}"
            )
    return "\n".join(lines)


def _ranks(split: str) -> int:
    dp, sp = split.partition(":")[0].split("x")
    return int(dp) * int(sp)
