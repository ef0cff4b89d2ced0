"""Solvers: diffusers schedulers that carry noise to data along the path of rectified flow.

Symbols: x data, eps noise, sigma noise level (1 noise, 0 data), x_sigma = (1 - sigma) x + sigma eps. Schedulers take
eps - x, the velocity from data to noise: minus that of `stdit.diffusion.flow`. timestep = 1000 sigma.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import (
    ConfigMixin,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from stdit.checkpoint_files import Sealed, verify_if_sealed
from stdit.diffusion.flow import shift_t
from stdit.errors import UserError

logger = logging.getLogger(__name__)


class RectifiedFlowOutput(NamedTuple):
    """Result of a step."""

    prev_sample: Tensor
    """The sample at the next, lower noise level."""


class RectifiedFlow(Sealed, SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Euler's method in equal steps of the noise level, shifted by size (Liu et al. 2022, arXiv:2209.03003).

    The names are those of diffusers' schedulers, which can take its place:
    ``UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True,
    prediction_type="flow_prediction")``.

    Args:
        num_train_timesteps: timesteps per unit of noise level; the models of stdit have 1000.
        use_dynamic_shifting: `set_timesteps` takes ``mu``; kept by the schedulers that are made from this config.
        time_shift_type: meaning of ``mu``, the logarithm of the shift r: t -> r t / (1 + (r - 1) t).
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        use_dynamic_shifting: bool = True,
        time_shift_type: str = "exponential",
    ) -> None:
        self.register_to_config(_use_default_values=[])  # or other schedulers would take their own defaults
        self.timesteps = torch.empty(0)
        """Those of the steps, ``[steps]``."""
        self.sigmas = torch.empty(0)
        """Noise levels of the steps, and 0 at the end: ``[steps + 1]``."""
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step, such as for a sample that is not all noise."""
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Any = None,
        mu: float = 0.0,
    ) -> None:
        """Choose the noise levels of a sampling run.

        Args:
            num_inference_steps: number of steps.
            sigmas: the noise levels of the steps before the shift, instead of equal ones; 0 follows the last.
            mu: logarithm of the shift r.

        Raises:
            ValueError: neither steps nor noise levels are given.
        """
        if sigmas is None:
            if num_inference_steps is None:
                raise ValueError("set_timesteps needs num_inference_steps or sigmas")
            sigmas = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
        levels = torch.cat([torch.as_tensor(sigmas, dtype=torch.float32).cpu(), torch.zeros(1)])
        self.sigmas = shift_t(levels, math.exp(mu)).where(levels < 1, levels).to(device)  # 1 stays exactly 1
        self.timesteps = self.config.num_train_timesteps * self.sigmas[:-1]
        self.step_index = self.begin_index = None

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return x_sigma of data ``sample`` and ``noise`` ``[B ...]`` at ``timestep``, one or ``[B]``.

        Raises:
            ValueError: there is no noise.
        """
        if noise is None:
            raise ValueError("scale_noise needs noise")
        sigma = timestep.to(sample.device, sample.dtype) / self.config.num_train_timesteps
        return torch.lerp(sample, noise, sigma.view(-1, *[1] * (sample.ndim - 1)))

    def step(
        self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, return_dict: bool = True
    ) -> RectifiedFlowOutput | tuple[Tensor]:
        """Go from the noise level of ``timestep`` to the next one.

        Args:
            model_output: eps - x, as the model estimates it.
            sample: x_sigma, of the same shape.
        """
        if self.step_index is None:
            self.step_index = self.begin_index
        if self.step_index is None:
            distances = (self.timesteps - torch.as_tensor(timestep, device=self.timesteps.device)).abs()
            self.step_index = int(distances.argmin())
        sigma, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self.step_index += 1
        previous = sample + (following - sigma) * model_output
        return RectifiedFlowOutput(previous) if return_dict else (previous,)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def save_pretrained(
        self, save_directory: str | PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write ``scheduler_config.json`` and a manifest; ``options`` are those of diffusers."""
        super().save_pretrained(save_directory, push_to_hub, **options)
        self._seal(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None = None, **options: Any
    ) -> Self:
        """Read what `save_pretrained` wrote; ``options`` are those of diffusers.

        Raises:
            UserError: the file is not as it was written.
        """
        if pretrained_model_name_or_path is not None:
            verify_if_sealed(Path(pretrained_model_name_or_path) / (options.get("subfolder") or ""))
        scheduler: Self = super().from_pretrained(pretrained_model_name_or_path, **options)
        return scheduler


class Heun(FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """Heun's method as diffusers has it, at any noise levels: theirs end in a step of no length."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, sigmas: Any = None) -> None:
        """Choose the noise levels of a sampling run, in which each but the first comes twice.

        Args:
            num_inference_steps: number of steps.
            sigmas: their noise levels, instead of equal steps; 0 follows the last.
        """
        super().set_timesteps(num_inference_steps, device)  # forgets the last run
        levels = (
            torch.linspace(1, 0, num_inference_steps + 1)[:-1] if sigmas is None else torch.as_tensor(sigmas)
        )
        first, *others = levels.float().tolist()
        self.sigmas = torch.tensor(
            [first, *(level for level in others for _ in range(2)), 0.0], device=device
        )
        self.timesteps = self.config.num_train_timesteps * self.sigmas[:-1]


_AS_OURS = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}
SOLVERS: dict[str, Callable[[], Any]] = {
    "euler": RectifiedFlow,
    "heun": Heun,
    "dpm++": partial(DPMSolverMultistepScheduler, **_AS_OURS),
    "unipc": partial(UniPCMultistepScheduler, **_AS_OURS),
}
"""Schedulers by the names of `stdit.pipelines.config.Solver`.

euler: first order, one model call a step (arXiv:2209.03003); heun: second order, two calls (Karras et al. 2022,
arXiv:2206.00364, algorithm 1); dpm++: DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095); unipc: UniPC of second
order (Zhao et al. 2023, arXiv:2302.04867).
"""


def set_flow_timesteps(
    scheduler: Any, num_inference_steps: int, shift: float, device: torch.device | str | None = None
) -> None:
    """Choose the noise levels of any flow scheduler, shifted by ``shift`` as far as it can.

    A scheduler that was made from the config of `RectifiedFlow` takes the shift as ``mu``. Others get shifted noise
    levels, to which they apply a shift of their own; a warning names one that takes neither.

    Raises:
        UserError: the scheduler cannot do flow matching, see `check_flow_scheduler`.
    """
    check_flow_scheduler(scheduler)
    options = _shifted(scheduler, num_inference_steps, shift)
    if shift != 1 and not options:
        logger.warning(
            "%s takes no shift of the noise levels from outside: the shift %.3g is left out",
            *(type(scheduler).__name__, shift),
        )
    scheduler.set_timesteps(num_inference_steps, device=device, **options)


def check_flow_scheduler(scheduler: Any) -> None:
    """Raise UserError unless a scheduler carries noise to data along the straight path, which is tried out.

    One that draws new noise in each step is refused as well: its videos would depend on those in the same batch.
    """
    failure, draws_noise = None, False
    try:
        claims = _claims_flow(scheduler)
        if claims and _reaches_data(scheduler, lambda sample, sigma: _NOISE - _DATA):
            return
        draws_noise = claims and _reaches_data(scheduler, lambda sample, sigma: (sample - _DATA) / sigma)
    except Exception as error:  # whatever it finds wrong with its settings
        failure = error
    if draws_noise:
        raise UserError(
            f"scheduler {type(scheduler).__name__}: with its settings it draws new noise in each step, with "
            "which a video would depend on the others of its batch: use one that draws none, such as "
            "RectifiedFlow, or set algorithm_type='dpmsolver++' or stochastic_sampling=False."
        )
    raise UserError(
        f"scheduler {type(scheduler).__name__}: with its settings it cannot do flow matching"
        f"{'' if failure is None else f' ({failure})'}: use RectifiedFlow, "
        "FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or UniPCMultistepScheduler or "
        "DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True, "
        "prediction_type='flow_prediction')."
    ) from failure


_DATA, _NOISE = torch.tensor([[0.5, -1.0]]), torch.tensor([[-2.0, 0.3]])


def _reaches_data(scheduler: Any, velocity: Callable[[Tensor, float], Tensor]) -> bool:
    """Return whether a scheduler goes from noise to data; ``velocity`` is a function of x_sigma and sigma."""
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(4, **_shifted(trial, 4, 2.0))
    sample = torch.lerp(_DATA, _NOISE, trial.sigmas[0])
    with torch.random.fork_rng(devices=[]):
        for timestep, sigma in zip(trial.timesteps, trial.sigmas.tolist(), strict=False):  # 0 follows
            sample = trial.step(velocity(sample, sigma), timestep, sample, return_dict=False)[0]
    return torch.allclose(sample, _DATA, atol=1e-3)


def _claims_flow(scheduler: Any) -> bool:
    """Return whether a scheduler's config speaks of flow matching, or at least of nothing else."""
    if not (isinstance(scheduler, SchedulerMixin) and hasattr(scheduler, "sigmas")):
        return False
    config = scheduler.config
    return bool(
        config.get("prediction_type", "flow_prediction") == "flow_prediction"
        and config.get("use_flow_sigmas", True)
    )


def _shifted(scheduler: Any, steps: int, shift: float) -> dict[str, Any]:
    """Return the arguments of ``set_timesteps`` that make the noise levels those of `RectifiedFlow`."""
    arguments = inspect.signature(scheduler.set_timesteps).parameters
    takes_mu = "mu" in arguments and scheduler.config.get("use_dynamic_shifting")
    levels = torch.linspace(1, 0, steps + 1)[:-1]
    options: dict[str, Any] = {"mu": math.log(shift)} if takes_mu else {}
    if "sigmas" in arguments:
        options["sigmas"] = (levels if takes_mu else shift_t(levels, shift)).numpy()
    return options
