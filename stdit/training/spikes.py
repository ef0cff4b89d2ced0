"""Losses that jump: which are spikes, and which batches a run leaves out because of them."""

from collections import deque
from statistics import median
from typing import Any

from stdit.diffusion.draws import sample_generator
from stdit.diffusion.flow import RectifiedFlow
from stdit.errors import UserError
from stdit.training.config import NEIGHBOUR_FRACTION, SpikeConfig


class SpikeGuard:
    """Compares losses, and remembers what to leave out; alike on all ranks, and as a checkpoint has it."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.left_out: set[int] = set()
        """Steps whose batches are not trained on."""
        self.spikes = 0
        self.history: deque[tuple[float, float]] = deque(maxlen=config.window)
        """Noise level and loss of the latest steps."""

    def is_spike(self, level: float, loss: float) -> bool:
        """Whether a loss is one; if not, later ones are compared with it."""
        if self.config.factor is None:
            return False
        if len(self.history) == self.config.window:
            like = sorted(self.history, key=lambda one: (abs(one[0] - level), one))[
                : self.config.window // NEIGHBOUR_FRACTION
            ]
            if loss > self.config.factor * median(one[1] for one in like):
                return True
        self.history.append((level, loss))
        return False

    def leave_out(self, step: int) -> None:
        """Leave out what a spike in ``step`` takes out. Raises UserError if there were too many spikes."""
        self.left_out |= set(range(max(0, step - self.config.exclude_batches + 1), step + 1))
        self.spikes += 1
        if self.spikes >= self.config.max_spikes:
            raise UserError(
                f"trainer.spike.max_spikes = {self.config.max_spikes} losses were spikes, the last in step {step}: "
                "lower optimizer.lr (and muon_lr), raise trainer.spike.factor or exclude_batches, or look for broken "
                "clips."
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        history = [list(one) for one in self.history]
        return {"left_out": sorted(self.left_out), "spikes": self.spikes, "history": history}

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with a state. What is left out already stays so: a run that goes back does so because of it."""
        self.left_out |= {int(step) for step in state.get("left_out", [])}
        self.spikes = max(self.spikes, int(state.get("spikes", 0)))
        self.history.clear()
        self.history.extend((float(level), float(loss)) for level, loss in state.get("history", []))


def mean_level(
    flow: RectifiedFlow, seed: int, step: int, size: int, latent_frames: int, height: float, width: float
) -> float:
    """Mean noise level of the global batch of a step, the first that is drawn for each sample."""
    levels = [
        flow.sample_t(sample_generator(seed, step, index), latent_frames, int(height), int(width))
        for index in range(size)
    ]
    return float(sum(levels)) / size
