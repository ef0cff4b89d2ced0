"""The steps of a pipeline call: noise levels, guidance, and how often each calls the model."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from stdit.diffusion.flow import FlowObjective
from stdit.diffusion.scheduler import SOLVERS, set_flow_timesteps
from stdit.pipelines.config import check_scales, guides_refinement
from stdit.pipelines.inputs import guidance_scale_of_step
from stdit.pipelines.model_calls import ModelCalls
from stdit.pipelines.output_cache import always_computed


class Schedule(NamedTuple):
    """The steps of a call; a step of Heun's method counts as two."""

    scheduler: Any
    """With the noise levels of this call."""
    scales: list[float]
    """The guidance scale of each step."""
    guided: bool
    """Whether some calls need negative prompts."""
    takes_scale: bool
    """Whether the model takes the scale as an input."""
    refinement: list[float]
    """The guidance scale of each model call of the refinement."""
    caches: bool
    """Whether steps may be skipped."""

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        latent_frames: int,
        flow: FlowObjective,
        scheduler: Any,
        takes: Sequence[float] | None,
        device: torch.device | str = "cpu",
    ) -> "Schedule":
        """Return the steps of a call with these settings, all of them resolved.

        Args:
            latent_frames: of the video, T'.
            scheduler: that of the pipeline, which the settings may replace.
            takes: range of guidance scales that the model takes as an input; None: it takes none.

        Raises:
            UserError: a scheduler that cannot do flow matching, or a scale out of the range.
        """
        size = latent_frames, int(settings["height"]), int(settings["width"])
        shift = flow.size_shift(*size) if settings["shift"] is None else settings["shift"]
        scheduler = scheduler if settings["solver"] is None else SOLVERS[settings["solver"]]()
        set_flow_timesteps(scheduler, int(settings["num_inference_steps"]), shift, device)
        scales = [
            guidance_scale_of_step(
                float(settings["guidance_scale"]), sigma, step // scheduler.order, dict(settings)
            )
            for step, sigma in enumerate(scheduler.sigmas[:-1].tolist())
        ]
        if takes is not None:
            check_scales(scales, takes)
        guided = takes is None and (any(scale != 1 for scale in scales) or guides_refinement(settings))
        refinement = [float(settings["refine_guidance_scale"])] * 2 * int(settings["refine_pairs"])
        caches = settings["cache"] != "off"
        return cls(scheduler, scales, guided, takes is not None, refinement, caches)

    @property
    def timesteps(self) -> list[float]:
        """Of each step."""
        found: list[float] = self.scheduler.timesteps.tolist()
        return found

    def halves(self, scale: float) -> int:
        """Return the model calls of a step with this guidance scale, for a video."""
        return 2 if self.guided and scale != 1 else 1

    @property
    def always_computed(self) -> list[bool]:
        """Which steps are computed however much a cache may skip."""
        if not self.caches:
            return [True] * len(self.scales)
        changes = accumulate((one != other for one, other in pairwise(self.scales)), initial=0)
        halves = [
            [change] if self.takes_scale else ["cond", "uncond"][: self.halves(scale)]
            for scale, change in zip(self.scales, changes, strict=True)
        ]
        return always_computed(self.scheduler.sigmas.tolist(), halves)

    def calls(self) -> tuple[ModelCalls, ModelCalls]:
        """Return the model calls of a video: at least, and at most."""
        steps = [self.halves(scale) for scale in self.scales]
        refinement = sum(map(self.halves, self.refinement))
        computed = sum(one for one, needed in zip(steps, self.always_computed, strict=True) if needed)
        skipped = sum(not needed for needed in self.always_computed)
        least = ModelCalls(computed + refinement, sum(steps) - computed, skipped)
        return least, ModelCalls(sum(steps) + refinement)
