"""Pyramid attention broadcast: outputs of attention that later sampling steps use again (arXiv:2408.12588).

In the middle of sampling, attention changes little from step to step: least across to the text, then over time, then
over space (Zhao et al. 2024, section 3.2). Each kind is computed in every n-th step and used again in between.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Output = Callable[[str, Callable[[], Tensor]], Tensor]
"""Function that returns the output of a part of a block (attention, cross or mlp), by calling it or from before."""


def compute(part: str, function: Callable[[], Tensor]) -> Tensor:
    """Call a part of a block."""
    return function()


MANY = 2**30
"""More steps than there are."""


class Kept:
    """What the parts of a block gave, each before its gate."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.computed: dict[str, int] = {}
        """The model call in which each was computed."""
        self.parts: tuple[str, ...] = ()
        """Parts that are kept."""
        self.again: tuple[str, ...] = ()
        """Parts of which the output is used again."""

    def __call__(self, part: str, function: Callable[[], Tensor]) -> Tensor:
        if part in self.again:
            return self.outputs[part]
        out = function()
        if part in self.parts:
            self.outputs[part] = out
        return out


class Ranges(NamedTuple):
    """For how many steps the output of each kind is used: the one in which it is computed, and those after it."""

    spatial: int
    temporal: int
    cross: int
    mlp: int = 1

    def of_parts(self, kind: str) -> dict[str, int]:
        """Return the range of each part of a block of a kind."""
        attention = {"S": self.spatial, "T": self.temporal}.get(kind, 1)
        return {"attention": attention, "cross": self.cross, "mlp": self.mlp}


@dataclass
class AttentionBroadcast:
    """What the blocks of a model keep from step to step."""

    ranges: Ranges
    timesteps: tuple[float, float]
    """Outside of these all parts are computed."""
    step: int = -1
    timestep: float = 0.0
    """That of the step in progress."""
    _kept: dict[str, dict[tuple[int, int], Kept]] = field(default_factory=dict)

    def begin_step(self, timestep: float) -> None:
        """Go on to the next step."""
        self.step, self.timestep = self.step + 1, timestep

    def forget(self) -> None:
        """Compute all parts in the next step."""
        self._kept.clear()

    def call(self, rows: str) -> "BroadcastCall":
        """Return what a model call uses and keeps.

        Args:
            rows: name of the calls with these rows of text.
        """
        low, high = self.timesteps
        return BroadcastCall(
            self.ranges, self.step, low < self.timestep < high, self._kept.setdefault(rows, {})
        )


@dataclass
class BroadcastCall:
    """The part of `AttentionBroadcast` that belongs to one model call."""

    ranges: Ranges
    step: int
    inside: bool
    """Whether outputs of earlier steps are used."""
    kept: dict[tuple[int, int], Kept]
    """By the number of the block and that of the chunk in which it runs."""
    _chunks: Counter[int] = field(default_factory=Counter)

    def output(self, number: int, kind: str) -> Kept:
        """Return how the next run of a block, or of a chunk of its tokens, gets its outputs.

        Args:
            number: place of the block in the model.
            kind: its letter; other attention than spatial and temporal is always computed.
        """
        kept = self.kept.setdefault((number, self._chunks[number]), Kept())
        self._chunks[number] += 1
        steps = {part: count for part, count in self.ranges.of_parts(kind).items() if count > 1}
        again = [
            part
            for part, count in steps.items()
            if self.inside and self.step % count and self.step - kept.computed.get(part, -MANY) < count
        ]
        kept.parts, kept.again = tuple(steps), tuple(again)
        kept.computed |= {part: self.step for part in steps if part not in again}
        return kept
