"""Sampling steps that are not computed: their velocity is extrapolated from earlier ones, video by video.

What is skipped is decided as a solver with variable steps does it (Hairer, Norsett & Wanner 1993, Solving Ordinary
Differential Equations I, section III.5): each computed velocity is compared with what linear extrapolation would have
given, which says how far it may be trusted for the next steps.

Letters: B videos, C channels, T_n latent frames of this rank, H height, W width; n halves of guidance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stdit.parallel.sequence.collectives import all_gather
from stdit.pipelines.guided_model import GuidedModel
from stdit.pipelines.steps import EveryStep

THRESHOLDS = {"slow": 0.02, "fast": 0.06}
"""Thresholds of `OutputCache`, chosen with the quickstart's model: see the page of this package."""
ALIGNED = 4
"""After skipped steps a video is computed again at a multiple of this step, or of a smaller power of two, so that the
videos of a batch share model calls."""
NEEDED = 3
"""Computed velocities, each at another level, before the error of the next one is known."""


def always_computed(levels: Sequence[float], halves: Sequence[Sequence[object]]) -> list[bool]:
    """Return which steps `OutputCache` computes whatever its threshold is.

    The first and the last, and those of which a half of guidance has fewer than three earlier levels.

    Args:
        levels: noise levels of the steps, and the last one, 0.
        halves: of each step; those of a model that takes the scale as an input are others after it has changed.
    """
    last = len(levels) - 2
    seen: dict[object, list[float]] = {}
    computed = []
    for step, (level, own) in enumerate(zip(levels, halves, strict=False)):
        earlier = [seen.setdefault(half, []) for half in own]
        computed.append(not 0 < step < last or any(len(one) < NEEDED for one in earlier))
        for one in earlier:
            one += [level] if level not in one else []
    return computed


class History:
    """The last two velocities of one half of guidance, and the error of linear extrapolation.

    All errors are relative to the velocity. In noise level sigma the error is ``bend |sigma - s_0| |sigma - s_1|``,
    s_0 and s_1 being the levels of the two velocities, and ``bend`` half of the second derivative.
    """

    def __init__(self, like: Tensor) -> None:
        self.velocities = like.new_zeros(2, *like.shape)  # [2 B C T_n H W], the newest first
        self.levels = torch.zeros(2, len(like), dtype=torch.double)
        self.count = torch.zeros(len(like), dtype=torch.long)
        self.bend = torch.zeros(len(like), dtype=torch.double)

    def forget(self, videos: Tensor) -> None:
        """Begin anew for the videos of a mask ``[B]``."""
        self.count[videos] = 0

    def error(self, sigma: float) -> Tensor:
        """Return the expected error ``[B]`` of extrapolation to a level; infinite where it is not known."""
        distances = (sigma - self.levels).abs()
        # A second velocity at one level is for another sample.
        known = (self.count >= NEEDED) & (distances[0] > 0)
        return torch.where(known, self.bend * distances.prod(0), torch.inf)

    def extrapolate(self, sigma: float) -> Tensor:
        """Return the velocities ``[B C T_n H W]`` at a level, on the straight line through the last two."""
        newest, previous = self.levels
        share = ((sigma - newest) / (newest - previous)).where(self.count > 1, 0.0)
        first, second = self.velocities
        return torch.lerp(first, second, -share.to(first)[:, None, None, None, None])

    def record(self, videos: Sequence[int], velocities: Tensor, sigma: float, error: Tensor) -> None:
        """Add the velocities of some videos, of which extrapolation would have had the relative ``error [b]``."""
        distances = (sigma - self.levels[:, videos]).abs()
        measured = (self.count[videos] > 1) & (distances[0] > 0)
        self.bend[videos] = torch.where(measured, error / distances.prod(0), self.bend[videos])
        moved = [video for video, distance in zip(videos, distances[0].tolist(), strict=True) if distance]
        self.velocities[1, moved], self.levels[1, moved] = self.velocities[0, moved], self.levels[0, moved]
        self.count[moved] += 1
        self.velocities[0, videos] = velocities
        self.levels[0, videos] = sigma


class OutputCache(EveryStep):
    """A model whose velocity is extrapolated where that adds less than a threshold to the error of the latents.

    Ranks exchange sums of errors when they compute a step, and only then; so all that share a video skip the same
    steps, and a skipped step sends nothing. No decision depends on another video of the batch.

    Args:
        threshold: largest error that a skipped step may add, relative to the velocity: ``|dv| / |v|`` times the
            width of the step in noise level, summed over the halves of guidance with their weights.
        levels: noise levels of the steps, and the last one, 0.
        max_noise_level: of each latent frame, ``[B T]``; from there on it is generated. Other frames do not count.
    """

    def __init__(
        self, model: GuidedModel, threshold: float, levels: Sequence[float], max_noise_level: Tensor
    ) -> None:
        super().__init__(model)
        self.threshold, self.levels = threshold, levels
        self.max_noise_level = max_noise_level.cpu()
        self.generated = torch.zeros_like(self.max_noise_level, dtype=torch.bool)
        self.histories: dict[str, History] = {}
        self.scale: float | None = None
        self.step = 0

    def velocity(self, x_t: Tensor, t: Tensor, scale: float) -> Tensor:
        """Return the velocity in the next step, computed or extrapolated."""
        sigma, halves = self.levels[self.step], list(self.model.weights(scale))
        self._forget_changed(sigma <= self.max_noise_level, scale)
        skipped = self._skips(scale)
        for half in halves:
            self.histories.setdefault(half, History(x_t))
        extrapolated = torch.stack(
            [self.histories[half].extrapolate(sigma) for half in halves]
        )  # [n B C T_n H W]
        computed = (~skipped).nonzero()[:, 0].tolist()
        if computed:
            found = self.model.velocities(x_t[computed], t[computed], scale, computed)
            errors = self._relative_errors(found, extrapolated[:, computed], computed)
            for half, velocities, error in zip(halves, found, errors, strict=True):
                self.histories[half].record(computed, velocities, sigma, error)
            extrapolated[:, computed] = found
        self.model.count_skipped(skipped.nonzero()[:, 0].tolist(), scale)
        self.step += 1
        return self.model.guide(extrapolated, scale)

    def forget(self) -> None:
        self.histories.clear()

    def _forget_changed(self, generated: Tensor, scale: float) -> None:
        """Begin anew for videos in which frames are generated from here on, ``[B T]``, that were not before.

        Likewise for all, if the guidance scale changes that the model takes as an input.
        """
        if self.model.takes_scale and scale != self.scale:
            self.forget()
        self.scale = scale
        changed = (generated != self.generated).any(1)
        for history in self.histories.values():
            history.forget(changed)
        self.generated = generated

    def _skips(self, scale: float) -> Tensor:
        """Return which videos skip this step, ``[B]``: those that skip the next ones, too, as `ALIGNED` asks."""
        last = len(self.levels) - 2
        if not 0 < self.step < last:
            return torch.zeros(len(self.generated), dtype=torch.bool)
        multiple = min(ALIGNED, self.step & -self.step)  # the largest power of two that divides the step
        return self._error(min(self.step + multiple, last) - 1, scale) < self.threshold

    def _error(self, step: int, scale: float) -> Tensor:
        """Return the error ``[B]`` that the extrapolation of a step would add to the latents."""
        before, here, after = self.levels[step - 1 : step + 2]
        width = max(before - here, here - after)  # Heun's method has two steps at one level
        error = torch.zeros(len(self.generated), dtype=torch.double)
        for half, weight in self.model.weights(scale).items():
            history = self.histories.get(half)
            error += torch.inf if history is None else abs(weight) * width * history.error(here)
        return error

    def _relative_errors(self, found: Tensor, extrapolated: Tensor, videos: Sequence[int]) -> Tensor:
        """Return ``|found - extrapolated| / |found|`` over the generated frames, ``[n b]``, on the CPU."""
        sharding = self.model.sharding
        counts = sharding.split(self.generated[videos].to(found), 1)[:, None, :, None, None]  # [b 1 T_n 1 1]
        squares = torch.stack(
            [(one.double() * counts).square().flatten(2).sum(2) for one in (found - extrapolated, found)]
        )
        for ranks in (
            sharding.column_group,
            self.model.cfg,
        ):  # the latter so that both decide alike, to the last bit
            squares = all_gather(squares[None], ranks, 0, [1] * ranks.size).sum(0)
        error, size = squares.cpu()
        return (error / size).sqrt()
