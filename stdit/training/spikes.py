"""Loss spikes: which losses are spikes, and which batches a run excludes because of them."""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from stdit.errors import UserError
from stdit.training.config import NEIGHBOUR_FRACTION, SpikeConfig


class SpikeGuard:
    """Compare each loss with earlier ones at similar noise levels; the state is the same on all ranks."""

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.excluded_steps: set[int] = set()
        """Steps whose batches are not trained on."""
        self.spikes = 0
        self.history: deque[tuple[float, float]] = deque(maxlen=config.window)
        """Mean noise level and loss of the latest steps."""

    @property
    def enabled(self) -> bool:
        return self.config.factor is not None

    def is_spike(self, level: float, loss: float) -> bool:
        """Return whether a loss is a spike; if not, later ones are compared with it.

        Args:
            level: mean noise level of the step's global batch.
        """
        if self.config.factor is None:
            return False
        if len(self.history) == self.config.window:
            nearest = sorted(self.history, key=lambda one: (abs(one[0] - level), one))
            similar = nearest[: self.config.window // NEIGHBOUR_FRACTION]
            if loss > self.config.factor * median(one[1] for one in similar):
                return True
        self.history.append((level, loss))
        return False

    def exclude(self, step: int) -> None:
        """Exclude the batches of a spike in ``step``. Raises UserError if there were too many spikes."""
        first = max(0, step - self.config.exclude_batches + 1)
        self.excluded_steps |= set(range(first, step + 1))
        self.spikes += 1
        if self.spikes >= self.config.max_spikes:
            raise UserError(
                f"trainer.spike.max_spikes = {self.config.max_spikes} losses were spikes, the last in step {step}: "
                "lower optimizer.lr (and muon_lr), raise trainer.spike.factor or exclude_batches, or look for broken "
                "clips."
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        history = [list(one) for one in self.history]
        return {"excluded_steps": sorted(self.excluded_steps), "spikes": self.spikes, "history": history}

    def load(self, state: dict[str, Any]) -> None:
        """Load a state. Steps that are excluded already stay so: they are the reason for a rollback."""
        self.excluded_steps |= {int(step) for step in state.get("excluded_steps", [])}
        self.spikes = max(self.spikes, int(state.get("spikes", 0)))
        self.history.clear()
        self.history.extend((float(level), float(loss)) for level, loss in state.get("history", []))


def mean_level(levels: Sequence[float]) -> float:
    """Return the mean noise level of a global batch.

    Summed in float32 and in order, so that it is the same for every split of the batch over ranks.
    """
    return float(sum(torch.tensor(levels).unbind())) / len(levels)
