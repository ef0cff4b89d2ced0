"""One training step: a pure function of (seed, step) and of the state."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from stdit.data.batch import EncodedBatch
from stdit.diffusion.draws import TrainingDraws, draw_batch
from stdit.diffusion.flow import RectifiedFlow, frame_weights
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import full_tensor, replicate_model, shard_model
from stdit.parallel.processes.storage import StoredTensors
from stdit.training.block_norms import LayerNorms
from stdit.training.config import EMAConfig, OptimizerConfig, TrainerConfig
from stdit.training.ema import EMA
from stdit.training.optim import build_optimizer, learning_rate_factor
from stdit.training.spikes import SpikeGuard, mean_level

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """While it lasts, products of float32 matrices are so exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Trainer:
    """The model with its optimizer and average, and the step that moves them."""

    def __init__(
        self,
        model: nn.Module,
        flow: RectifiedFlow,
        accelerator: "Accelerator",
        mesh: Mesh,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        ema: EMAConfig,
        seed: int,
        shard_parameters: bool = False,
    ) -> None:
        self.config, self.optimizer_config, self.seed = config, optimizer, seed
        self.accelerator, self.mesh, self.flow = accelerator, mesh, flow
        if config.compile:
            model.compile_blocks()  # type: ignore[operator]
        self.model, self.network = model, (shard_model if shard_parameters else replicate_model)(model, mesh)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, optimizer)
        self.ema = EMA(model, ema)
        self.nonfinite_in_a_row = 0
        self.parts = mesh.dp
        """Into so many parts at least the ranks, and then the passes of a rank, split a batch."""
        self.spikes = SpikeGuard(config.spike)

    def step(self, batch: EncodedBatch) -> dict[str, Any]:
        """Train on this rank's part of a global batch, and return measurements of the whole of it.

        Args:
            batch: the samples that `Mesh.sample_range` gives this rank, on any device.

        Raises:
            UserError: after ``max_nonfinite_steps`` steps in a row without a finite loss and gradient.
        """
        with matmul_precision(self.config.matmul_precision):
            return self._step(batch)

    def _step(self, batch: EncodedBatch) -> dict[str, Any]:
        step = batch.step
        factor = learning_rate_factor(self.optimizer_config, step, self.config.steps)
        if step in self.spikes.left_out:
            return {**self._line(None, None, factor), "left_out": True}
        total = self.accumulate(batch)
        layers = LayerNorms(self.model, self.mesh) if self._measures_layers(step) else None
        gradient_norm = float(full_tensor(clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        finite = math.isfinite(total) and math.isfinite(gradient_norm)
        spike = finite and self.spikes.is_spike(self._mean_level(batch), float(total))
        if finite and not spike:
            self.optimizer.step(factor)
            self.ema.update(self.model, step)
        self.optimizer.zero_grad()
        self._count(step, finite)
        if spike:
            self.spikes.leave_out(step)
            return {**self._line(None, None, factor), "spike": float(total), "left_out": True}
        if not finite:
            return self._line(None, None, factor)
        line = self._line(float(total), gradient_norm, factor)
        return line if layers is None else {**line, "layers": layers.after_update()}

    def _line(self, loss: float | None, gradient_norm: float | None, factor: float) -> dict[str, Any]:
        """Measurements of a step; one without a loss was skipped."""
        return {
            "loss": loss,
            "lr": self.optimizer_config.lr * factor,
            "grad_norm": gradient_norm,
            "skipped": loss is None,
        }

    def _measures_layers(self, step: int) -> bool:
        return self.config.block_norms_every is not None and step % self.config.block_norms_every == 0

    def _mean_level(self, batch: EncodedBatch) -> float:
        size = (batch.latents.shape[2], float(batch.height[0]), float(batch.width[0]))
        return mean_level(self.flow, self.seed, batch.step, batch.batch_size, *size)

    def accumulate(self, batch: EncodedBatch) -> Tensor:
        """Return the loss of the global batch; leave its gradients, averaged over all ranks, in the parameters."""
        passes = self.mesh.micro_batches(batch.batch_size, self.most_at_once(batch.batch_size))
        total = torch.zeros((), device=self.accelerator.device)
        for index, (rows, counts) in enumerate(passes):
            with nullcontext() if index == len(passes) - 1 else self.network.no_sync():
                # Ranks average their gradients, and each has a part of the sum: hence the factor.
                factor = counts * self.mesh.world_size / batch.batch_size
                loss = self._losses(batch, rows).sum() * factor
                loss.backward()
            total += loss.detach()
        return self.mesh.all_reduce_mean(total)

    def most_at_once(self, batch_size: int) -> int | None:
        """Clips that a rank has in one pass, at most; None: its share of the batch.

        On fewer ranks than the run had before, no more than then, if nothing else is set: they fit in memory.
        """
        if self.config.micro_batch_size is not None or self.parts <= self.mesh.dp:
            return self.config.micro_batch_size
        return -(-batch_size // self.parts)

    def _losses(self, batch: EncodedBatch, rows: slice) -> Tensor:
        """Return the losses of some samples of this rank's part of the batch, over this rank's frames of them."""
        size = (int(batch.height[0]), int(batch.width[0]))
        indices, shape = self.mesh.sample_range(batch.batch_size)[rows], tuple(batch.latents.shape[1:])
        draws = draw_batch(self.flow, self.seed, batch.step, indices, shape, *size)  # type: ignore[arg-type]
        return self.losses(batch.rows(rows), draws)

    def losses(self, batch: EncodedBatch, draws: TrainingDraws) -> Tensor:
        """Return the loss of each sample ``[B]`` with these draws.

        Ranks that share a sample each return the part of its loss that their frames have; the parts add up to it.
        """
        device = self.accelerator.device
        batch, draws = batch.to(device, non_blocking=True), draws.to(device)
        x = batch.latents
        x_t = self.flow.add_noise(x, draws.noise, draws.t)
        sharding = self.model.token_sharding(self.mesh.sp, *x.shape[2:])  # type: ignore[operator]
        x, noise, x_t = (sharding.split(value, dim=2) for value in (x, draws.noise, x_t))
        t, weight = (sharding.split(value, dim=1) for value in (draws.t, frame_weights(draws.condition_mask)))
        with self.accelerator.autocast():
            output = self.network.module(
                hidden_states=self.flow.scale_model_input(x_t, t),
                timestep=1000 * draws.t,
                encoder_hidden_states=batch.text_states,
                encoder_attention_mask=batch.text_mask,
                fps=batch.fps,
                height=batch.height,
                width=batch.width,
                drop_caption=draws.drop_caption,
                sharding=sharding,
            )
        return self.flow.loss(output, x, noise, x_t, t, weight)

    def _count(self, step: int, finite: bool) -> None:
        self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"loss or gradient not finite in {self.nonfinite_in_a_row} steps in a row, up to {step}: "
                "lower optimizer.lr (and muon_lr), lengthen optimizer.warmup_steps, or look for broken clips."
            )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights, averages and optimizer state, by name; of what is sharded, this rank's share."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def read(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        """Take over the state in a checkpoint, whose manifest is ``meta``, however it was shared out.

        Raises:
            UserError: if it cannot be read, or is of another model or optimizer.
        """
        stored = StoredTensors(checkpoint / "optimizer")
        state = {**self.state(), "optimizer": self.optimizer.like(stored.shapes())}
        stored.read_into(state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        for part in ("model", "ema"):
            StoredTensors(checkpoint / part).read_into(state[part])
        self.nonfinite_in_a_row = meta["nonfinite_in_a_row"]
        self.parts = max(self.mesh.dp, meta["parts"])
        self.spikes.take_over(meta.get("spikes", {}))
