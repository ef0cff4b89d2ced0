"""How the steps of a sampler call the model: in every step, or with attention of earlier steps."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from stdit.errors import UserError
from stdit.models.broadcast import AttentionBroadcast, Ranges
from stdit.pipelines.guided_model import GuidedModel, rows_name


class EveryStep:
    """A model that computes every step."""

    def __init__(self, model: GuidedModel) -> None:
        self.model = model

    def velocity(self, x_t: Tensor, t: Tensor, scale: float) -> Tensor:
        """Return the velocity in the next step, as `GuidedModel.velocity` does."""
        return self.model.velocity(x_t, t, scale)

    def forget(self) -> None:
        """Begin anew, because the sample or the text was changed from outside."""


def attention_broadcast(
    ranges: Sequence[int], between: tuple[float, float], timesteps: Sequence[float]
) -> AttentionBroadcast:
    """Return what keeps the attention of earlier steps.

    Args:
        ranges: steps for which spatial, temporal and cross attention and, if there is a fourth, MLPs are used.
        between: the timesteps between which they are.
        timesteps: of all steps.

    Raises:
        UserError: a range is longer than the steps between.
    """
    low, high = between
    inside = sum(low < timestep < high for timestep in timesteps)
    if max(ranges) > max(1, inside):
        raise UserError(
            f"pab = {list(ranges)}: attention of {max(ranges)} steps would never be refreshed in the {inside} "
            f"steps of this video with timesteps between {low:g} and {high:g}: use at most {max(1, inside)}, "
            "more num_inference_steps, or other pab_timesteps."
        )
    return AttentionBroadcast(Ranges(*ranges), (low, high))


def reused_parts(
    broadcast: AttentionBroadcast, timesteps: Sequence[float], halves: Sequence[int], kinds: str
) -> Iterator[dict[str, tuple[str, ...]]]:
    """Yield which parts of the blocks each step uses again, by the letters of the blocks.

    Args:
        halves: of guidance, in each step.
        kinds: letters of the blocks.
    """
    letters = sorted(set(kinds))
    for timestep, count in zip(timesteps, halves, strict=True):
        broadcast.begin_step(timestep)
        call = broadcast.call(rows_name(count))
        yield {kind: call.output(number, kind).again for number, kind in enumerate(letters)}


class BroadcastSteps(EveryStep):
    """A model that uses attention of earlier steps again: see `attention_broadcast` for the arguments."""

    def __init__(
        self,
        model: GuidedModel,
        ranges: Sequence[int],
        between: tuple[float, float],
        timesteps: Sequence[float],
    ) -> None:
        super().__init__(model)
        self.broadcast = attention_broadcast(ranges, between, timesteps)
        self.remaining = iter(timesteps)

    def velocity(self, x_t: Tensor, t: Tensor, scale: float) -> Tensor:
        self.broadcast.begin_step(next(self.remaining))
        self.model.broadcast = self.broadcast
        velocity = super().velocity(x_t, t, scale)
        self.model.broadcast = None  # what follows the steps, such as the refinement, computes all
        return velocity

    def forget(self) -> None:
        self.broadcast.forget()
