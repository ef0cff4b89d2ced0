"""Train a text-to-video ST-DiT.

    python train.py --config configs/train/quickstart.yaml                 # runs on a CPU
    python train.py --config configs/train/finetune.yaml --data.manifest clips/manifest.csv --name clips
    python train.py --config configs/train/quickstart.yaml --dry_run true  # what it would train on, and take
    python train.py --help                                                 # every setting

The run is kept in outputs/<name>. The same command again goes on from the newest whole checkpoint. Ctrl-C (exit code
130), SIGTERM and SIGUSR1 (0), to any process of the run, finish the step and save; before the first step, and at a
second signal a second later, the run stops where it is. Exit code 2 is an error to put right, 1 any other: try again.
"""

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from stdit.cli import run
from stdit.training.config import TrainConfig, parse_train
from stdit.training.run_folder import claimed
from stdit.training.system import Interrupts, interrupts, prepare_process, progress_bar, started

if TYPE_CHECKING:
    from stdit.parallel.processes.watchdog import Watchdog
    from stdit.training.batches import Batches
    from stdit.training.run import Run


def main() -> int:
    config = parse_train()
    return dry_run(config) if config.dry_run else train(config)


def dry_run(config: TrainConfig) -> int:
    """Say, on the first process, what the run would train on and take."""
    rank, processes = started()
    if rank == 0:
        from stdit.training.report import report_of

        print(report_of(config, processes))
    return 0


def train(config: TrainConfig) -> int:
    """Train until the last step, or until a signal; returns the exit code."""
    with interrupts() as signals, ExitStack() as stack:
        from stdit.parallel.processes.memory import memory_of_process
        from stdit.parallel.processes.mesh import build_mesh, resolve_sp
        from stdit.parallel.processes.watchdog import build_watchdog, watching
        from stdit.parallel.sequence.planner import ParallelDims

        accelerator = prepare_process(config.trainer, config.parallel.timeout)
        mesh = build_mesh(config.parallel, accelerator.device)
        with watching(
            build_watchdog(mesh, config.parallel)
        ) as watchdog:  # it speaks before what an error closes
            mesh.check_same("the configuration", str(config))
            if config.parallel.sp != "auto":
                mesh.check_batch_sizes(config.data.largest_batch_size())
            folder, checkpoint = mesh.on_main(lambda: stack.enter_context(claimed(config)))
            from stdit.training.batches import build_batches
            from stdit.training.build import build_parts
            from stdit.training.memory_estimate import Needs
            from stdit.training.report import start_line
            from stdit.training.run import Run
            from stdit.training.trainer import Trainer
            from stdit.training.validation_loss import validation_loss_of

            memory = memory_of_process(accelerator.device, config.parallel.memory_gib)
            parts = mesh.on_all_ranks(lambda: build_parts(config, checkpoint, mesh.world_size, memory))
            mesh.check_same("the experiment", str(parts.experiment))
            needs = Needs(parts)
            mesh = resolve_sp(mesh, config.parallel, lambda: needs.choice(mesh.world_size, memory))
            mesh.check_batch_sizes(bucket.batch_size for bucket in parts.plan.assignment.used_buckets)
            parts.to(accelerator.device)
            held_out = validation_loss_of(parts, mesh)
            notes = [*parts.plan.assignment.exclusions(), *parts.plan.notes]
            notes += needs.warnings(ParallelDims(mesh.world_size, mesh.sp.size))
            notes += [str(held_out)] if held_out else []
            print(start_line(parts), *notes, sep="\n", flush=True)
            trainer = Trainer(
                parts.model,
                parts.flow,
                accelerator,
                mesh,
                config.trainer,
                config.optimizer,
                config.ema,
                config.seed,
                config.parallel.shard_parameters,
            )
            work = mesh.main_first(lambda: Run(folder, parts, trainer, checkpoint, held_out))
            stack.push(work.close)
            return loop(work, build_batches(parts, folder, mesh), signals, watchdog)
    print(f"{signals}: stopped at once, and the same command goes on from what was saved before")
    return signals.exit_code


def loop(work: "Run", batches: "Batches", signals: Interrupts, watchdog: "Watchdog") -> int:
    """Do the steps that are left, and what is due between them and at the end; returns the exit code."""
    config = work.config
    work.make_up_validation()
    signals.patient = True
    with progress_bar(work.start, config.trainer.steps, work.mesh.is_main) as bar:
        for batch in work.from_start(batches, watchdog):
            begin, step, done = time.perf_counter(), batch.step, batch.step + 1
            watchdog.phase(f"step {step}, computing")
            values = work.trainer.step(batch)
            seconds = time.perf_counter() - begin
            bar.show(work.record(batch, {**values, **work.measure(done)}, seconds))
            if work.goes_back(values, step):
                bar.n = work.start
                continue
            if work.is_asked_to_save(signals) or work.is_due(done, config.checkpoint.every):
                watchdog.phase(f"step {done}, saving")
                saved = work.save(done, at_once=signals.agreed is not None or done == config.trainer.steps)
            if signals.agreed:
                bar.write(f"{signals}: {saved} is saved, and the same command goes on from there")
                return signals.exit_code
            if work.validation_is_due(done):
                watchdog.phase(f"step {done}, validation")
                work.validate(done)
    watchdog.phase(f"step {config.trainer.steps}, export")
    print(f"trained for {config.trainer.steps} steps: {work.finish()}")
    return signals.exit_code


if __name__ == "__main__":
    run(main)
