"""Pyramid attention broadcast: outputs of attention that later sampling steps use again (arXiv:2408.12588).

In the middle of sampling, attention changes little from step to step: least across to the text, then over time, then
over space (Zhao et al. 2024, section 3.2). Each kind is computed in every n-th step and used again in between.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Output = Callable[[str, Callable[[], Tensor]], Tensor]
"""Function that returns the output of a part of a block (attention, cross or mlp), by calling it or from before."""


def compute(part: str, function: Callable[[], Tensor]) -> Tensor:
    """Call a part of a block."""
    return function()


class Kept:
    """What the parts of a block gave, each before its gate."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.again: tuple[str, ...] = ()
        """Parts of which the output is used again, if it is there."""

    def __call__(self, part: str, function: Callable[[], Tensor]) -> Tensor:
        if part not in self.again or part not in self.outputs:
            self.outputs[part] = function()
        return self.outputs[part]


class Ranges(NamedTuple):
    """For how many steps the output of each kind is used: the one in which it is computed, and those after it."""

    spatial: int
    temporal: int
    cross: int
    mlp: int = 1


@dataclass
class AttentionBroadcast:
    """What the blocks of a model keep from step to step."""

    ranges: Ranges
    timesteps: tuple[float, float]
    """Outside of these all is computed."""
    timestep: float = 0.0
    """That of the step in progress."""
    _calls: Counter[str] = field(default_factory=Counter)
    _kept: dict[str, dict[tuple[int, int], Kept]] = field(default_factory=dict)

    def forget(self) -> None:
        """Compute all in the next step."""
        self._kept.clear()

    def call(self, rows: str) -> "BroadcastCall":
        """Return what a model call uses and keeps.

        Args:
            rows: name of the calls with these rows of text.
        """
        kept = self._kept.setdefault(rows, {})
        number = self._calls[rows]
        self._calls[rows] += 1
        low, high = self.timesteps
        again = {
            name: low < self.timestep < high and number % steps > 0
            for name, steps in self.ranges._asdict().items()
        }
        return BroadcastCall(again, kept)


@dataclass
class BroadcastCall:
    """The part of `AttentionBroadcast` that belongs to one model call."""

    again: Mapping[str, bool]
    """Whether outputs of each kind in `Ranges` are used again, where there are any."""
    kept: dict[tuple[int, int], Kept]
    """By the number of the block and that of the chunk in which it runs."""
    _chunks: Counter[int] = field(default_factory=Counter)

    def output(self, number: int, kind: str) -> Output:
        """Return how the next run of a block, or of a chunk of its tokens, gets its outputs.

        Args:
            number: place of the block in the model.
            kind: its letter; other attention than spatial and temporal is always computed.
        """
        kept = self.kept.setdefault((number, self._chunks[number]), Kept())
        self._chunks[number] += 1
        attention = {"S": "spatial", "T": "temporal"}.get(kind, "")
        names = {"attention": attention, "cross": "cross", "mlp": "mlp"}
        kept.again = tuple(part for part, name in names.items() if self.again.get(name))
        return kept
