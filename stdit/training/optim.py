"""Optimizers and their learning rates: AdamW, and Muon for the matrices of the blocks."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from xxhash import xxh3_64_intdigest

from stdit.errors import UserError
from stdit.models.matmul_rate import matmul_precision
from stdit.parallel.processes.parameters import distribute_like, full_tensor, trained_parameters
from stdit.parallel.processes.storage import StoredTensor
from stdit.training.config import OPTIMIZERS, OptimizerConfig
from stdit.training.low_bit_adamw import (
    STORED,
    build_low_bit_adamw,
    read_moment,
    seeded_rounding,
    stored_tensors,
)
from stdit.training.master_weights import MasterWeights, build_master_weights
from stdit.training.memory_config import MemoryConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(?:attn|cross_attn|mlp)\.(\w+)\.weight")
STACKED = {"qkv": 3, "kv_linear": 2}
AT_ONCE = 2**24
"""Muon orthogonalises about this many weights at once."""


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the factor of the learning rates in ``step`` (from 0) of ``steps``: warm-up, plateau, decay."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    length = config.decay_share * steps
    if config.schedule == "constant" or length == 0:
        return rise
    progress = min(max((step - (steps - length)) / length, 0.0), 1.0)  # 0 before the fall, 1 at the end
    fall = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (config.final_share + (1 - config.final_share) * fall)


def rounding_seed(seed: int, step: int) -> int:
    """Return the seed of what is rounded at random in ``step``."""
    return xxh3_64_intdigest(f"{seed} {step}".encode()) >> 1


def split_parameters(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Split the parameters into those for Muon, the matrices of attention and MLP in the blocks, and the others.

    Returns:
        Names for Muon, each with the number of matrices stacked in it (qkv 3, kv 2); names of all others.
    """
    matrices: dict[str, int] = {}
    others = []
    for name, parameter in trained_parameters(model).items():
        match = BLOCK_MATRIX.search(name)
        if match and parameter.ndim == 2:
            matrices[name] = STACKED.get(match[1], 1)
        else:
            others.append(name)
    return matrices, others


def count_matrices(model: nn.Module) -> int:
    """Return the number of weights that Muon updates."""
    return sum(model.get_parameter(name).numel() for name in split_parameters(model)[0])


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, memory: MemoryConfig | None = None
) -> "Optimizers":
    """Build the optimizer that a config names, over all parameters of ``model`` that are trained."""
    memory = memory or MemoryConfig()
    masters = build_master_weights(model, memory)
    model = model if masters is None else masters
    named = trained_parameters(model)
    if rounds := memory.weights == "bf16" or memory.optimizer_state != "fp32":
        built = build_low_bit_adamw(_groups(model, named), config, memory)
    else:
        built = OPTIMIZERS.get(config.name)(model, config)
    return Optimizers(named, built if isinstance(built, list) else [built], masters, rounds)


def register_optimizer(
    name: str, build: Callable[[nn.Module, OptimizerConfig], Optimizer | list[Optimizer]]
) -> None:
    """Make ``optimizer.name = name`` stand for an optimizer.

    Args:
        build: ``(model, config) -> optimizer`` of torch over the parameters of the model, or a list of several that
            share them. The learning rates of its groups are those after warm-up; its state must hold tensors only.

    Raises:
        UserError: if another optimizer has the name.
    """
    OPTIMIZERS.register(name, build)


def build_adamw(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build AdamW over all parameters."""
    return _adamw(model, list(trained_parameters(model)), config)


def build_muon(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """Build Muon for the matrices of attention and MLP, and AdamW for all other parameters."""
    return muon_and_adamw(model, config, split_parameters(model)[0])


def muon_and_adamw(model: nn.Module, config: OptimizerConfig, matrices: dict[str, int]) -> list[Optimizer]:
    """Build Muon for some parameters (name to the number of stacked matrices), and AdamW for the others."""
    named = trained_parameters(model)
    optimizers: list[Optimizer] = [_adamw(model, [name for name in named if name not in matrices], config)]
    if matrices:
        by_parts: dict[int, list[nn.Parameter]] = defaultdict(list)
        for name, parts in matrices.items():
            by_parts[parts].append(named[name])
        optimizers.append(
            Muon(
                [{"params": params, "parts": parts} for parts, params in by_parts.items()],
                lr=config.muon_lr,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
                scale=config.muon_scale,
            )
        )
    return optimizers


def _adamw(model: nn.Module, names: list[str], config: OptimizerConfig) -> Optimizer:
    """Build AdamW over some parameters."""
    return AdamW(
        _groups(model, names),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _groups(model: nn.Module, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return groups of parameters for AdamW: only matrices get weight decay."""
    parameters = [trained_parameters(model)[name] for name in names]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Optimizers:
    """Several optimizers over one model, as one; its state is a flat dict of tensors by parameter name."""

    def __init__(
        self,
        named_parameters: dict[str, nn.Parameter],
        optimizers: list[Optimizer],
        masters: MasterWeights | None = None,
        rounds: bool = False,
    ) -> None:
        self.named_parameters, self.masters, self.rounds = named_parameters, masters, rounds
        self.optimizers = optimizers
        self.base_rates = [
            [float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers
        ]
        self._owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        self._numbers = {p: number for number, p in enumerate(named_parameters.values())}

    def step(self, seed: int = 0) -> None:
        """Take one step; ``seed`` is that of random rounding."""
        with self._updating(seed):
            for optimizer in self.optimizers:
                optimizer.step()

    def set_factor(self, factor: float) -> None:
        """Set the learning rates to ``factor`` times those of the settings."""
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * factor)
                else:
                    group["lr"] = rate * factor

    def step_one(self, parameter: nn.Parameter, seed: int = 0) -> None:
        """Take a step with one parameter of the model, the only one that has a gradient."""
        updated = parameter if self.masters is None else self.masters.of[parameter]
        with self._updating(seed + self._numbers[updated], [parameter]):
            self._owners[updated].step()

    @contextmanager
    def _updating(self, seed: int, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """In this context, optimizers have the gradients of these parameters of the model, None: of all."""
        with ExitStack() as stack:
            if self.masters is not None:
                stack.enter_context(self.masters.updating(parameters))
            if self.rounds:
                device = next(iter(self.named_parameters.values())).device
                stack.enter_context(seeded_rounding(device, seed))
            yield

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """``<parameter>.<quantity>`` to tensor, such as ``t_block.1.bias.exp_avg``."""
        return {
            key: tensor
            for name, state in self._states()
            for quantity, value in state.items()
            for key, tensor in stored_tensors(f"{name}.{quantity}", value)
        }

    def like(self, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Return an empty state like a stored one; tensors as large as their parameter are placed like it."""
        return {key: self._room(key, *found) for key, found in stored.items()}

    def _room(self, key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter = self.named_parameters[self._split(key)[0]]
        if parameter.shape == shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=parameter.device)

    def _split(self, key: str) -> tuple[str, str, str]:
        """Split a key into parameter, quantity, and the part of a rounded one. Raises UserError."""
        rest, part = key, ""
        if key.endswith(tuple(f".{one}" for one in STORED)):
            rest, _, part = key.rpartition(".")
        name, _, quantity = rest.rpartition(".")
        if name not in self.named_parameters:
            raise UserError(f"the optimizer's state has {key}, but this model has no such weight")
        return name, quantity, part

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Replace the state by one from `state_dict`; its tensors are not copied, unless they are rounded anew."""
        states: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
        for key, value in tensors.items():
            name, quantity, part = self._split(key)
            states[name][quantity][part] = value
        for name, parameter in self.named_parameters.items():
            before = self._owners[parameter].state.pop(parameter, {})
            state = {
                quantity: read_moment(parts, parameter, quantity, before.get(quantity))
                for quantity, parts in states[name].items()
            }
            if state:
                self._owners[parameter].state[parameter] = state

    def _states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, parameter in self.named_parameters.items():
            for optimizer in self.optimizers:
                if parameter in optimizer.state:
                    yield name, optimizer.state[parameter]


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations, for matrices and kernels of convolutions.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scaling ``match_rms_adamw`` is that of Liu et
    al. 2025 (arXiv:2502.16982, section 2.2). The update rule is ``torch.optim.Muon``'s, differing in what
    matters on a CPU: float32 instead of bfloat16, and many matrices of equal shape at once. Parameters that
    stack several matrices (``parts`` of a group, along the rows) have them orthogonalised one by one; a kernel
    [O I h w] is a matrix of O rows. Of sharded parameters every rank gathers these matrices, and moves its share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        scale: Literal["original", "match_rms_adamw"] = "original",
        iterations: int = 5,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, scale=scale, iterations=iterations, parts=1
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            momenta = [self._momentum(p) for p in params]
            torch._foreach_lerp_(momenta, [p.grad for p in params], 1 - group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            options = tuple(group[name] for name in ("momentum", "lr", "scale", "iterations"))
            for p in params:
                alike[p.shape[0] // group["parts"], p.shape[1:].numel(), *options].append(p)
        for (rows, columns, *options), params in alike.items():
            count = max(1, AT_ONCE // (rows * columns))
            for start in range(0, len(params), count):
                self._move(params[start : start + count], rows, columns, *options)

    def _move(
        self,
        params: list[Tensor],
        rows: int,
        columns: int,
        momentum: float,
        lr: float,
        scale: str,
        iterations: int,
    ) -> None:
        """Update parameters, each one or several matrices of rows x columns; full matrices exist only in here."""
        gradients = [p.grad for p in params if p.grad is not None]
        directions = torch._foreach_lerp(gradients, [self._momentum(p) for p in params], momentum)  # Nesterov
        matrices = torch.cat([full_tensor(direction).reshape(-1, rows, columns) for direction in directions])
        steps = orthogonalise(matrices, iterations).split([len(p) // rows for p in params])
        size = max(1, rows / columns) ** 0.5 if scale == "original" else 0.2 * max(rows, columns) ** 0.5
        shares = [distribute_like(step.reshape(p.shape), p) for step, p in zip(steps, params, strict=True)]
        torch._foreach_add_(params, shares, alpha=-lr * size)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


@matmul_precision("highest")
def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Bring all singular values of ``matrices [N R C]`` near 1 (0.7 to 1.2), keeping their singular vectors.

    Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T (Jordan et al. 2024). The products are in
    float32 whatever precision is set: rounded to bfloat16, the factors of the second form no longer commute, and
    singular values grow to 40.
    """
    X = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = X.shape[1] > X.shape[2]
    X = X.mT if tall else X
    if X.shape[2] < 2 * X.shape[1]:
        for _ in range(iterations):
            X = _polynomial(X @ X.mT) @ X
    else:  # all factors are polynomials of the first A and commute, so iterate on the small side only
        A = X @ X.mT
        Q = M = _polynomial(A)
        for _ in range(iterations - 1):
            A = M @ A @ M
            M = _polynomial(A)
            Q = M @ Q
        X = Q @ X
    return X.mT if tall else X


def _polynomial(A: Tensor) -> Tensor:
    """``a + b A + c A^2`` for ``[N R R]``."""
    a, b, c = NEWTON_SCHULZ
    M = torch.baddbmm(A, A, A, beta=b, alpha=c)
    M.diagonal(dim1=1, dim2=2).add_(a)
    return M
