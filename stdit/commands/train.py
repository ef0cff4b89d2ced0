"""Train a text-to-video ST-DiT on a CPU or a GPU.

examples:
    python train.py --config train/quickstart                 # runs on a CPU
    python train.py --config train/own-clips --data.manifest clips/manifest.csv --name clips
    python train.py --config train/quickstart --dry_run true  # print clips, batches and memory
    python train.py --config train/quickstart --dry_run steps # the same, and the time that it takes

The run is kept in outputs/<name>. Run the same command again to resume from the newest complete checkpoint. Ctrl-C
(exit code 130), SIGTERM and SIGUSR1 (0), to any process of the run, finish the step and save; before the first step,
and at a second signal a second later, the run stops at once. Exit code 2 is an error that you can correct, 1 any
other: try again. More in stdit/training/README.md.
"""

import time
from typing import TYPE_CHECKING, NoReturn

from stdit.cli import run

if TYPE_CHECKING:
    from stdit.training.config import TrainConfig
    from stdit.training.session import Session

# Imports are in the functions, so that --help is quick, and Ctrl-C in the first second prints no traceback.


def train_command() -> NoReturn:
    """Run the command stdit-train."""
    run(main)


def main() -> int:
    """Read the flags, and train or do a dry run; return the exit code."""
    from stdit.training.config import parse_train
    from stdit.training.dry_run import dry_run

    config = parse_train(doc=__doc__)
    return dry_run(config) if config.dry_run else train(config)


def train(config: "TrainConfig") -> int:
    """Train until the last step, or until a signal; return the exit code."""
    from stdit.training.stop_signals import stop_signals

    with stop_signals() as signals:
        from stdit.training.session import start  # imports torch, while signals are handled already

        with start(config, signals) as session:
            return loop(session)
    print(f"{signals}: stopped at once; run the same command again to resume from the last checkpoint")
    return signals.exit_code


def loop(session: "Session") -> int:
    """Do the remaining steps, with what is due between them, and export the pipeline; return the exit code."""
    from stdit.training.report import end_lines
    from stdit.training.system import progress_bar

    steps, phase = session.config.trainer.steps, session.watchdog.phase
    signals, saver, early = session.signals, session.saver, session.saver.early_stopping
    done = saver.start_step
    session.sampler.catch_up(done, early.is_over)
    signals.finish_step = True
    with progress_bar(saver.start_step, steps, session.mesh.is_main) as bar:
        for batch in session.remaining_batches():
            began, step, done = time.perf_counter(), batch.step, batch.step + 1
            phase(f"step {step}, computing")
            values = session.trainer.step(batch)
            seconds = time.perf_counter() - began
            values |= session.validation_loss(done)
            bar.show(session.recorder.record(batch, values | saver.take_seconds(), seconds))
            if session.rollback.after_spike(values, step):
                bar.n = session.rollback.step or 0
                continue
            if saver.is_due(done, signals):
                phase(f"step {done}, saving")
                saved = saver.save(
                    done, at_once=signals.stop_signal is not None or early.is_over or done == steps
                )
            if signals.stop_signal:
                bar.write(f"{signals}: {saved} is saved; run the same command again to resume")
                return signals.exit_code
            if session.sampler.is_due(done, early.is_over):
                phase(f"step {done}, validation")
                session.sampler.validate(done)
    phase(f"step {done}, export")
    exported = session.sampler.export(done)
    print(end_lines(exported, saver.start_step, done, session.config, early))
    return signals.exit_code
