"""Model FLOPs utilisation: the arithmetic of the model, as a share of what matrix products reach in the same time."""

from stdit.data.batch import EncodedBatch
from stdit.models.config import STDiTConfig
from stdit.models.size import training_flops


class Utilisation:
    """Utilisation of the steps of a run; the arithmetic is counted once per bucket.

    Args:
        config: with the resolved sizes of the model.
        frame_timesteps: whether every frame has a timestep of its own.
        processes: that share a step.
    """

    def __init__(self, config: STDiTConfig, frame_timesteps: bool, processes: int) -> None:
        self.config, self.frame_timesteps, self.processes = config, frame_timesteps, processes
        self._flops: dict[tuple[int, ...], tuple[int, int]] = {}

    def flops(self, batch: EncodedBatch) -> int:
        """Return the floating-point operations of the forward and backward pass of the global batch."""
        shape, tokens = (batch.batch_size, *batch.latents.shape[2:]), batch.text_states.shape[1]
        if shape not in self._flops:
            one, two = (
                training_flops(self.config, batch.batch_size, shape[1:], count, self.frame_timesteps)
                for count in (1, 2)
            )
            self._flops[shape] = one, two - one  # each text token adds as much
        first, each = self._flops[shape]
        return first + (tokens - 1) * each

    def mfu(self, batch: EncodedBatch, seconds: float, rate: float) -> float:
        """Return the utilisation of a step that took ``seconds``, on processes of ``rate`` FLOP/s each."""
        return self.flops(batch) / (self.processes * rate * seconds)
