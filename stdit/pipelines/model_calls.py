"""How many model calls a video took, and how many were skipped. Imports no torch."""

from collections.abc import Iterable
from typing import NamedTuple


class ModelCalls(NamedTuple):
    """Model calls for one video; with guidance a step has two."""

    run: int = 0
    skipped: int = 0
    skipped_steps: int = 0

    def facts(self) -> dict[str, int | float]:
        """Return what the metadata of a video says of its model calls."""
        return {
            "model_calls": self.run,
            "skipped_steps": self.skipped_steps,
            "saved_share": round(self.saved_share, 4),
        }

    def __add__(self, other: "ModelCalls") -> "ModelCalls":  # type: ignore[override]
        return ModelCalls(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def saved_share(self) -> float:
        """The part of the calls that were skipped."""
        return self.skipped / max(1, self.run + self.skipped)


def describe_calls(videos: Iterable[ModelCalls]) -> str:
    """Return a line that says how many model calls a video took on average, and what part was saved."""
    calls = list(videos)
    total = sum(calls, ModelCalls())
    made, all_calls = (number / len(calls) for number in (total.run, total.run + total.skipped))
    return f"model calls of a video: {made:.4g} of {all_calls:.4g}, {total.saved_share:.0%} saved"
