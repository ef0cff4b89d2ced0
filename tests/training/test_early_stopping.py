"""When a run whose validation loss does not fall ends."""

import json
import math

import pytest

from stdit.errors import UserError
from stdit.training.config import ValidationConfig
from stdit.training.early_stopping import EarlyStopping


def early(patience: int | None = 2, min_improvement: float = 0.0) -> EarlyStopping:
    return EarlyStopping(ValidationConfig(loss_every=1, patience=patience, min_improvement=min_improvement))


@pytest.mark.parametrize(
    ("losses", "min_improvement", "best", "end"),
    [
        ([5, 4, 3, 2, 1], 0, 5, None),
        ([5, 4, 4, 3, 3, 3], 0, 4, 6),
        ([5, 4.9, 4.4, 4.3, 4.1], 0.1, 3, 5),
        ([math.nan, 3, math.inf, 2, math.nan, 2], 0, 4, 6),
        ([math.nan, math.nan, 1], 0, None, 2),
        ([0, 0, 0], 0, 1, 3),
    ],
)
def test_it_ends_when_the_loss_stays_above_the_best(
    losses: list[float], min_improvement: float, best: int | None, end: int | None
) -> None:
    stopping, found = early(min_improvement=min_improvement), None
    for step, loss in enumerate(losses, 1):
        stopping.record(step, loss)
        state = json.dumps(stopping.state(), allow_nan=False)
        stopping = early(min_improvement=min_improvement)
        stopping.load(json.loads(state))
        if stopping.is_over:
            found = step
            break
    assert (stopping.best_step, found) == (best, end)


def test_without_patience_nothing_is_recorded() -> None:
    stopping = early(patience=None)
    stopping.load({"best_step": 1, "best_loss": 1.0, "measured_since": 9})
    stopping.record(1, 0.5)
    assert stopping.best_step is None and not stopping.is_over


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"patience": 3},
            "validation.patience = 3: it waits for the validation loss, .* set validation.loss_every",
        ),
        ({"patience": 0, "loss_every": 1}, "validation.patience = 0: must be at least 1"),
        ({"min_improvement": 1.0}, "validation.min_improvement = 1.0: must be at least 0 and below 1"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValidationConfig(**settings)  # type: ignore[arg-type]
