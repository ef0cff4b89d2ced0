"""One training step: a pure function of (seed, step) and of the state."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

from stdit.data.batch import EncodedBatch
from stdit.diffusion.draws import TrainingDraws, dropped_channels
from stdit.errors import UserError
from stdit.lora.dropout import dropouts_of
from stdit.models.matmul_rate import matmul_precision, matmul_rate
from stdit.models.opensora import stdit_names
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import (
    full_tensor,
    replicate_model,
    shard_model,
    trained_parameters,
    trained_state,
)
from stdit.parallel.processes.step_exchange import StepExchange
from stdit.parallel.processes.storage import StoredTensors
from stdit.training.block_norms import BlockNorms
from stdit.training.config import EMAConfig, OptimizerConfig, TrainerConfig
from stdit.training.ema import EMA
from stdit.training.flow_matching import FlowMatching
from stdit.training.fused_backward import FusedBackward, GradientNorm
from stdit.training.matmul import MatmulChoice, choose_precision
from stdit.training.memory_config import MemoryConfig
from stdit.training.optim import build_optimizer, learning_rate_factor, rounding_seed
from stdit.training.spikes import SpikeGuard, mean_level
from stdit.training.system import ProgressBar

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainer:
    """The model with its optimizer and averaged weights, and the training step."""

    def __init__(
        self,
        model: nn.Module,
        method: FlowMatching,
        accelerator: "Accelerator",
        mesh: Mesh,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        ema: EMAConfig,
        seed: int,
        shard_parameters: bool = False,
        memory: MemoryConfig | None = None,
    ) -> None:
        self.method, self.flow = method, method.flow
        self.config, self.optimizer_config, self.seed = config, optimizer, seed
        memory = memory or MemoryConfig()
        self.chosen_matmul: MatmulChoice | None = None
        self.kept_matmul: dict[str, Any] | None = None
        """State of the choice in the checkpoint that the run resumed from."""
        self.matmul_rate: float | None = None
        """Floating-point operations per second of matrix products as the model's are computed; None before a step."""
        self.accelerator, self.mesh = accelerator, mesh
        if config.compile:
            model.compile_blocks()  # type: ignore[operator]
        if memory.weights != "fp32":
            for parameter in trained_parameters(model).values():
                parameter.data = parameter.data.to(torch.bfloat16)
        self.model, self.network = model, (shard_model if shard_parameters else replicate_model)(model, mesh)
        self.parameters = list(trained_parameters(model).values())
        self.dropouts = dropouts_of(model)
        self.optimizer = build_optimizer(model, optimizer, memory)
        self.masters = self.optimizer.masters
        self.ema = EMA(model if self.masters is None else self.masters, ema)
        self.fused = FusedBackward(self.parameters) if memory.fused_backward else None
        self.nonfinite_in_a_row = 0
        self.batch_splits = mesh.dp
        """A batch is split into at least this many parts, over ranks and then over the micro-batches of each."""
        self.spikes = SpikeGuard(config.spike)
        self.exchange = StepExchange(mesh)
        """The one message between ranks in each step, besides gradients and what the model sends."""

    def step(self, batch: EncodedBatch) -> dict[str, Any]:
        """Train on this rank's part of a global batch, and return measurements of the whole of it.

        Args:
            batch: the samples that `Mesh.sample_range` gives this rank, on any device.

        Raises:
            UserError: after ``max_nonfinite_steps`` steps in a row without a finite loss and gradient.
        """
        if self.matmul_rate is None:
            self._prepare(batch)
        with matmul_precision(self.matmul_precision):
            return self.update(batch)

    @property
    def matmul_precision(self) -> str:
        """The precision of products of float32 matrices in the model; known from the first step on."""
        return self.config.matmul_precision if self.chosen_matmul is None else self.chosen_matmul.precision

    def _prepare(self, batch: EncodedBatch) -> None:
        """Choose the precision of matrix products with the first batch, and measure their rate.

        No state changes: draws are a function of the step, and the gradients of the measured passes are cleared.
        """
        setting, device = self.config.matmul_precision, self.accelerator.device
        if setting.startswith("fastest"):
            self.chosen_matmul, reason = choose_precision(
                setting, self.kept_matmul, lambda: self.accumulate(batch)[0].item(), self.mesh
            )
            self.optimizer.zero_grad()
            if self.mesh.is_main:
                ProgressBar.write(f"trainer.matmul_precision = {setting}: {self.matmul_precision} ({reason})")
        dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        self.matmul_rate = matmul_rate(device, dtype, self.matmul_precision)

    def update(self, batch: EncodedBatch) -> dict[str, Any]:
        """Do what `step` does, in the precision of matrix products that the caller has set."""
        step = batch.step
        factor = learning_rate_factor(self.optimizer_config, step, self.config.steps)
        if step in self.spikes.excluded_steps:
            return {**self._line(None, None, factor), "excluded": True}
        self.optimizer.set_factor(factor)
        norms = None
        if self.fused is not None:
            part, own_levels, norm = self._measure_fused(batch)
        else:
            part, own_levels = self.accumulate(batch)
            norms = BlockNorms(self.model, self.mesh) if self._measures_block_norms(step) else None
            norm = full_tensor(clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        loss, gradient_norm, levels = self._exchange(part, own_levels, norm)
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        spike = finite and self.spikes.enabled and self.spikes.is_spike(mean_level(levels), loss)
        if finite and not spike:
            self._update(batch, norm)
            self.ema.update(step)
        self.optimizer.zero_grad()
        self._count(step, finite)
        if spike:
            self.spikes.exclude(step)
            return {**self._line(None, None, factor), "spike": loss, "excluded": True}
        if not finite:
            return self._line(None, None, factor)
        line = {**self._line(loss, gradient_norm, factor), **self.method.after_step(batch)}
        return line if norms is None else {**line, "block_norms": norms.after_update()}

    def _line(self, loss: float | None, gradient_norm: float | None, factor: float) -> dict[str, Any]:
        """Return the measurements of a step; without a loss it was skipped."""
        return {
            "loss": loss,
            "lr": self.optimizer_config.lr * factor,
            "grad_norm": gradient_norm,
            "skipped": loss is None,
        }

    def _measures_block_norms(self, step: int) -> bool:
        return self.config.block_norms_every is not None and step % self.config.block_norms_every == 0

    def accumulate(self, batch: EncodedBatch) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the loss of the global batch, averaged over all ranks, in the parameters.

        Returns:
            this rank's part of the loss, a float32 scalar (the loss is its mean over all ranks); and noise
            levels, float32 [global batch] on the CPU, in which those of other ranks are 0.
        """
        micro_batches = self.mesh.micro_batches(batch.batch_size, self.micro_batch_size(batch.batch_size))
        size, samples = (int(batch.height[0]), int(batch.width[0])), self.mesh.sample_range(batch.batch_size)
        shape = tuple(batch.latents.shape[1:])
        total, levels = torch.zeros((), device=self.accelerator.device), torch.zeros(batch.batch_size)
        for number, (rows, counts) in enumerate(micro_batches):
            indices = samples[rows]
            draws = self.method.draw(self.seed, batch.step, indices, shape, *size)  # type: ignore[arg-type]
            if self.mesh.sp.rank == 0:  # ranks that share samples must not add up their levels
                levels[indices.start : indices.stop] = draws.t.amax(dim=1)  # conditioning frames have level 0
            dropped = dropped_channels(self.dropouts, self.seed, batch.step, indices, self.accelerator.device)
            with dropped, nullcontext() if number == len(micro_batches) - 1 else self.network.no_sync():
                # Ranks average their gradients, and each has a part of the sum: hence the factor.
                factor = counts * self.mesh.world_size / batch.batch_size
                loss = self.sample_losses(batch.rows(rows), draws).sum() * factor
                loss.backward()
            total += loss.detach()
        return total, levels

    @property
    def _in_one_pass(self) -> bool:
        """Whether each weight can be updated before the gradients of the others are known."""
        return math.isinf(self.config.max_grad_norm) and not self.spikes.enabled

    def _measure_fused(self, batch: EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `accumulate` does, and the gradient's norm; no gradients stay.

        If clipping and the spike guard need no second pass, weights are updated, but for those whose own gradient is
        not finite.
        """
        assert self.fused is not None
        if self.micro_batch_size(batch.batch_size) is not None:
            raise UserError(
                f"memory.fused_backward: each batch of this run was split into {self.batch_splits} parts, whose "
                "gradients must be added up: resume without it, or on as many processes as before."
            )
        found = GradientNorm(self.parameters)

        def measure(parameter: nn.Parameter) -> None:
            own = found.add(parameter)
            if self._in_one_pass and own.isfinite():
                self.optimizer.step_one(parameter, rounding_seed(self.seed, batch.step))

        with self.fused.handling(measure):
            return *self.accumulate(batch), found.total()

    def _update(self, batch: EncodedBatch, norm: Tensor) -> None:
        """Update all weights with the gradients of ``batch``, of that norm, unless they have been."""
        if self.fused is None:
            self.optimizer.step(rounding_seed(self.seed, batch.step))
        elif not self._in_one_pass:

            def clip_and_update(parameter: nn.Parameter) -> None:
                clip_grads_with_norm_(parameter, self.config.max_grad_norm, norm)
                self.optimizer.step_one(parameter, rounding_seed(self.seed, batch.step))

            with self.fused.handling(clip_and_update):
                self.accumulate(batch)

    def _exchange(self, part: Tensor, levels: Tensor, norm: Tensor) -> tuple[float, float, list[float]]:
        """Return the loss and the gradient's norm, and noise levels if the spike guard needs them.

        Ranks exchange one message, and the CPU waits once for the device.
        """
        if not self.spikes.enabled:
            levels = levels[:0]
        own = torch.cat([part[None], levels.to(part.device, non_blocking=True)])
        sums = self.exchange.reduce(own)
        loss, *rest = torch.cat([sums[:1] / self.mesh.world_size, sums[1:], norm[None]]).tolist()
        self.exchange.receive(rest[len(levels) : -1])
        return loss, rest[-1], rest[: len(levels)]

    def micro_batch_size(self, batch_size: int) -> int | None:
        """Return the largest micro-batch of a rank, in samples; None: its whole part of the batch.

        If no size is set, it is no larger than on the number of ranks that the run had before, so that it fits.
        """
        if self.config.micro_batch_size is not None or self.batch_splits <= self.mesh.dp:
            return self.config.micro_batch_size
        return -(-batch_size // self.batch_splits)

    def sample_losses(self, batch: EncodedBatch, draws: TrainingDraws) -> Tensor:
        """Return the loss of each sample ``[B]`` with these draws.

        Ranks that share a sample each return the part of its loss that their frames have; the parts add up to it.
        """
        device = self.accelerator.device
        batch, draws = batch.to(device, non_blocking=True), draws.to(device)
        x = batch.latents
        sharding = self.model.token_sharding(self.mesh.sp, *x.shape[2:], len(x))  # type: ignore[operator]
        with self.accelerator.autocast():
            losses = self.method.losses(self.network.module, batch, draws, sharding)
        # The ranks of a row have the same frames, of which each counts a share.
        return losses / sharding.grid.space

    def _count(self, step: int, finite: bool) -> None:
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"loss or gradient not finite in {self.nonfinite_in_a_row} steps in a row, up to {step}: "
                "lower optimizer.lr (and muon_lr), lengthen optimizer.warmup_steps, or look for broken clips."
            )

    def matmul_state(self) -> dict[str, Any] | None:
        """Return the chosen precision for the manifest of a checkpoint; None if the settings name one."""
        return self.kept_matmul if self.chosen_matmul is None else self.chosen_matmul.state()

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return weights, averages and optimizer state, by name; of sharded tensors, this rank's shard."""
        masters = {} if self.masters is None else self.masters.state_dict()
        return {
            "model": {**trained_state(self.model), **masters},
            **({"ema": self.ema.average} if self.ema.average else {}),
            "optimizer": self.optimizer.state_dict(),
            **self.method.state(),
        }

    def read(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        """Load the state of a checkpoint with manifest ``meta``, whatever ranks and shards wrote it.

        Raises:
            UserError: if it cannot be read, or is of another model or optimizer.
        """
        rename = stdit_names(self.model.config)  # type: ignore[arg-type]
        stored = StoredTensors(checkpoint / "optimizer", rename)
        state = self.state()
        moments = self.optimizer.like(stored.tensors())
        stored.read_into(moments)
        self.optimizer.load_state_dict(moments)
        StoredTensors(checkpoint / "model", rename).read_into(state["model"])
        if self.masters is not None:
            self.masters.write_back()
        if (checkpoint / "ema").is_dir() and self.ema.average:
            StoredTensors(checkpoint / "ema", rename).read_into(self.ema.average)
        else:
            self.ema.begin()
        self.method.read(checkpoint, meta)
        self.nonfinite_in_a_row = meta["nonfinite_in_a_row"]
        self.batch_splits = max(self.mesh.dp, meta["batch_splits"])
        self.spikes.load(meta.get("spikes", {}))
        kept = meta.get("matmul_precision") or {}
        self.kept_matmul = kept if kept.get("setting") == self.config.matmul_precision else None
