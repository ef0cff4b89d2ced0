"""The usual training method: the flow objective on the clips. Other methods change a part of it.

Letters: B samples, C channels, T frames, T_n those of this rank, H, W latent rows and columns, F = T or 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stdit.data.batch import EncodedBatch
from stdit.diffusion.draws import TrainingDraws, draw_batch
from stdit.diffusion.flow import FlowObjective, frame_loss, frame_weights
from stdit.parallel.sequence.sharding import TokenSharding


@dataclass(frozen=True)
class StepInputs:
    """What a model gets beside noisy latents; the same for all models of a training step."""

    flow: FlowObjective
    sharding: TokenSharding
    rows: Mapping[str, Tensor]
    """By the names of the model's arguments, a row for each sample."""

    def velocity(self, model: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that a model predicts, ``[B C T_n H W]``.

        Args:
            x_t: noisy latents of this rank's frames, ``[B C T_n H W]``.
            t: noise levels of all frames, ``[B F]``.
        """
        level = self.sharding.split(t, dim=1)
        # A tuple of tensors, since hooks of the backward pass see no other.
        output = model(
            hidden_states=self.flow.scale_model_input(x_t, level),
            timestep=1000 * t,
            **self.rows,
            sharding=self.sharding,
            return_dict=False,
        )[0]
        return self.flow.velocity(output, x_t, level)


class FlowMatching:
    """What a training step draws, and its loss."""

    def __init__(self, flow: FlowObjective) -> None:
        self.flow = flow

    def draw(
        self,
        seed: int,
        step: int,
        indices: Sequence[int],
        latent_shape: tuple[int, int, int, int],
        height: int,
        width: int,
    ) -> TrainingDraws:
        """Draw the random numbers of samples of the global batch of ``step``: see `draw_batch`."""
        return draw_batch(self.flow, seed, step, indices, latent_shape, height, width)

    def losses(
        self, model: nn.Module, batch: EncodedBatch, draws: TrainingDraws, sharding: TokenSharding
    ) -> Tensor:
        """Return the loss of each sample in this rank's frames, ``[B]``; those of all ranks add up to it."""
        inputs = self.inputs(batch, draws, sharding)
        x, noise = self.latents(inputs, batch, draws), sharding.split(draws.noise, dim=2)
        x_t = self.flow.add_noise(x, noise, sharding.split(draws.t, dim=1))
        target = self.target(inputs, x, noise, x_t, draws.t)
        weight = sharding.split(frame_weights(draws.condition_mask), dim=1)
        return frame_loss(inputs.velocity(model, x_t, draws.t), target, weight)

    def inputs(self, batch: EncodedBatch, draws: TrainingDraws, sharding: TokenSharding) -> StepInputs:
        """Return what the models of the step get."""
        rows = {
            "encoder_hidden_states": batch.text_states,
            "encoder_attention_mask": batch.text_mask,
            "fps": batch.fps,
            "height": batch.height,
            "width": batch.width,
            "drop_caption": draws.drop_caption,
        }
        return StepInputs(self.flow, sharding, rows)

    def latents(self, inputs: StepInputs, batch: EncodedBatch, draws: TrainingDraws) -> Tensor:
        """Return the latents without noise that the model learns from, ``[B C T_n H W]``."""
        return inputs.sharding.split(batch.latents, dim=2)

    def target(self, inputs: StepInputs, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that the model should predict at ``x_t``, ``[B C T_n H W]``."""
        return x - noise

    def after_step(self, batch: EncodedBatch) -> dict[str, Any]:
        """Train what else is trained, after an update of the model; return measurements of it."""
        return {}

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what checkpoints keep of the method, as `Trainer.state` does."""
        return {}

    def read(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        """Load what `state` returned."""
