"""Start a training run: from its settings to a session that is ready for the first step.

`start` is the only place that knows the order in which the parts of a run are made. It reads from top to bottom, and
each part says what must be there before it. Training methods are made with the trainer, in ``methods.py``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from stdit.data.batch import EncodedBatch
from stdit.parallel.processes.memory import memory_of_process
from stdit.parallel.processes.mesh import Mesh, build_mesh, resolve_sp
from stdit.parallel.processes.watchdog import Watchdog, build_watchdog, watching
from stdit.training.batches import Batches, build_batches
from stdit.training.build import build_components
from stdit.training.config import TrainConfig
from stdit.training.fit import fitted
from stdit.training.lineage import unneeded
from stdit.training.memory_config import check_processes
from stdit.training.memory_estimate import MemoryEstimate
from stdit.training.methods import build_trainer
from stdit.training.recorder import Recorder
from stdit.training.report import start_line
from stdit.training.rollback import Rollback
from stdit.training.run_folder import lock_run_folder, write_run_files
from stdit.training.sampler import Sampler
from stdit.training.saver import Saver
from stdit.training.stop_signals import StopSignals
from stdit.training.system import keep_freed_memory, prepare_process
from stdit.training.trainer import Trainer
from stdit.training.validation import pipeline_settings_of
from stdit.training.validation_loss import ValidationLoss, validation_loss_of


@dataclass
class Session:
    """A training run that is ready for its first step. Every rank has one and must make the same calls."""

    config: TrainConfig
    mesh: Mesh
    watchdog: Watchdog
    signals: StopSignals
    trainer: Trainer
    batches: Batches
    recorder: Recorder
    saver: Saver
    sampler: Sampler
    rollback: Rollback
    held_out: ValidationLoss | None
    """The clips of the validation loss; None if it is off."""

    def remaining_batches(self) -> Iterator[EncodedBatch]:
        """Yield the batches from the first step to the last, or to an early stop; after a rollback, from its step."""
        early = self.saver.early_stopping
        first: int | None = self.saver.start_step
        while first is not None and not early.is_over:
            self.rollback.step = None
            iterator = iter(self.batches(first, self.config.trainer.steps))
            for step in range(first, self.config.trainer.steps):
                self.watchdog.phase(f"step {step}, waiting for data")
                yield next(iterator)
                if self.rollback.step is not None or early.is_over:
                    break
            first = self.rollback.step

    def validation_loss(self, step: int) -> dict[str, Any]:
        """Return the validation loss after ``step`` steps if it is due; every rank must call this."""
        every = self.config.validation.loss_every or 1
        if self.held_out is None or not self.config.trainer.is_due(step, every):
            return {}
        found = self.held_out.measure(self.trainer)
        self.saver.checkpoints.record_loss(step, found["validation_loss"])
        self.saver.early_stopping.record(step, found["validation_loss"])
        return found


@contextmanager
def start(config: TrainConfig, signals: StopSignals) -> Iterator[Session]:
    """Start a run, and close it at the end of the block.

    Args:
        config: settings of the run.
        signals: that stop it; already handled, so that a signal ends this function at any point.

    Raises:
        UserError: for settings, data, weights or a run folder that cannot be used.
    """
    with ExitStack() as stack:
        # Process group: first, since everything below talks to the other ranks.
        accelerator = prepare_process(config.trainer, config.parallel.timeout)
        device = accelerator.device

        # Mesh: the place of this rank. With parallel.sp = auto a second one replaces it below.
        mesh = build_mesh(config.parallel, device)

        # Watchdog: inside the stack, so that it reports an error before the stack closes anything.
        with watching(build_watchdog(mesh, config.parallel)) as watchdog:
            # Checks that need no data: before anything is written or loaded.
            mesh.check_same("the configuration", str(config))
            check_processes(config.memory, mesh.world_size)
            if config.parallel.sp != "auto":
                mesh.check_batch_sizes(config.data.largest_batch_size())

            # Run folder: locked by the main rank until the end of the run; names the checkpoint to resume from.
            folder, checkpoint = mesh.on_main(lambda: stack.enter_context(lock_run_folder(config)))

            # Components: batch plan, codec, text encoder, objective and model; on the CPU, each rank its own.
            # This also refuses a model whose weights do not fit in memory, before it is built.
            memory = memory_of_process(device, config.memory_gib)
            components = mesh.on_all_ranks(
                lambda: build_components(
                    config,
                    checkpoint,
                    mesh.world_size,
                    memory,
                    lambda inputs: fitted(inputs, mesh.world_size),
                )
            )
            mesh.check_same("the experiment", str(components.experiment))

            # Choice of sp: needs the sizes of the model and of the batches. From here on the mesh is final.
            estimate = MemoryEstimate(components)
            mesh = resolve_sp(mesh, config.parallel, lambda: estimate.choose_sp(mesh.world_size, memory))
            mesh.check_batch_sizes(bucket.batch_size for bucket in components.plan.assignment.used_buckets)

            # Codec and text encoder move to the device; clips of the validation loss are chosen.
            components.to(device)
            held_out = validation_loss_of(components, mesh)

            # What the user should know before the run takes hours.
            notes = [*components.plan.assignment.exclusions(), *components.plan.notes]
            notes += estimate.warnings(estimate.split(mesh.world_size, mesh.sp.size))
            notes += [str(held_out)] if held_out else []
            notes += unneeded(config.resume_changed, config.init_from, components.resumed)
            print(start_line(components), *notes, sep="\n", flush=True)

            # Trainer: moves the model to the device, and shards or replicates it over the mesh.
            trainer = build_trainer(components, accelerator, mesh)

            # Saver: loads the checkpoint into the trainer. From here on, closing gives a save in progress some time.
            pipeline_settings = pipeline_settings_of(
                config.validation, components.plan.assignment, config.data.trigger, config.distill.steps
            )
            saver = mesh.main_first(lambda: Saver(folder, components, trainer, pipeline_settings, checkpoint))
            saver.exchange_flags(signals)

            # Only now: what loading has freed is returned to the system, since weights would lie between it for good.
            if device.type == "cpu" and config.trainer.keep_freed_memory:
                keep_freed_memory()

            # Recorder: cuts off the metrics of steps after that checkpoint. The files that describe the run come
            # first: a run that was refused above has changed none of them.
            mesh.on_main(
                lambda: write_run_files(folder, components.config, components.codec, new=checkpoint is None)
            )
            recorder = mesh.main_first(lambda: Recorder(folder, components.config, saver.start_step, trainer))
            stack.callback(recorder.close)
            stack.push(saver.close)

            # Sampler and rollback: only use what is above.
            sampler = Sampler(folder, components, trainer.ema, mesh, pipeline_settings, recorder.tracker)
            rollback = Rollback(saver, recorder)

            # Batches: last, since data.cache = memory encodes the whole data set here, which may take long.
            batches = build_batches(components, folder, mesh, trainer.exchange)

            yield Session(
                components.config,
                mesh,
                watchdog,
                signals,
                trainer,
                batches,
                recorder,
                saver,
                sampler,
                rollback,
                held_out,
            )
