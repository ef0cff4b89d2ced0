"""End a run whose validation loss has stopped falling."""

import math
from typing import Any

from stdit.training.config import ValidationConfig


class EarlyStopping:
    """The best validation loss of a run, and how many measurements ago it was; the same on all ranks."""

    def __init__(self, config: ValidationConfig) -> None:
        self.patience, self.min_improvement = config.patience, config.min_improvement
        self.best_step: int | None = None
        """The step with the best loss; None: there was no finite one, or ``validation.patience`` is not set."""
        self.best_loss = math.inf
        self.measured_since = 0
        """Measurements after the best one."""

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return self.patience is not None and self.measured_since >= self.patience

    def record(self, step: int, loss: float) -> None:
        """Record the validation loss after ``step`` steps."""
        if self.patience is None:
            return
        if loss < self.best_loss and loss <= (1 - self.min_improvement) * self.best_loss:
            self.best_step, self.best_loss, self.measured_since = step, loss, 0
        else:
            self.measured_since += 1

    def state(self) -> dict[str, Any]:
        """Return the state for the manifest of a checkpoint."""
        loss = None if self.best_step is None else self.best_loss
        return {"best_step": self.best_step, "best_loss": loss, "measured_since": self.measured_since}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned; an empty one begins again."""
        if self.patience is not None:
            self.best_step = state.get("best_step")
            self.best_loss = math.inf if self.best_step is None else state["best_loss"]
            self.measured_since = state.get("measured_since", 0)

    def __str__(self) -> str:
        least = f" by {self.min_improvement:.3g} of itself" if self.min_improvement else ""
        best = "no loss was finite"
        if self.best_step is not None:
            best = f"the best is {self.best_loss:.5g} at step {self.best_step}"
        times = f"validation.patience = {self.patience} measurements"
        return f"the validation loss has not fallen{least} in {times}; {best}"
