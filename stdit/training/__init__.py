"""Training: start-up, the step, optimizers, averaged weights, checkpoints, and the folder of a run.

`start` makes a `Session`, with which `train.py` runs the loop. See README.md for how to use a run.
"""

from typing import TYPE_CHECKING

from stdit.lazy import lazy_getattr
from stdit.training.config import TrainConfig, parse_train

if TYPE_CHECKING:
    from stdit.training.session import Session, start
    from stdit.training.trainer import Trainer

__all__ = ["Session", "TrainConfig", "Trainer", "parse_train", "start"]

__getattr__ = lazy_getattr(
    __name__,
    {
        "Session": "stdit.training.session",
        "Trainer": "stdit.training.trainer",
        "start": "stdit.training.session",
    },
)
