"""AdamW of torchao: moments of 8 or 4 bits (Dettmers et al. 2022, arXiv:2110.02861; Li et al. 2023,
arXiv:2309.01507), and weights in bf16 that are rounded at random (Zamirai et al. 2020, arXiv:2010.06192).

A checkpoint has the codes and scales of the moments. They become moments of any other precision when they are read.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stdit.training.config import OptimizerConfig
from stdit.training.memory_config import MemoryConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCKS = {"8bit": 256, "4bit": 128}
"""Values that share a scale, as torchao has it by default."""
SMALLEST = 4096
"""Moments with fewer values stay in fp32, as in torchao."""
STORED = ("codes", "scale")
"""What a checkpoint has of a rounded moment."""


def build_low_bit_adamw(
    groups: Iterable[dict[str, Any]], config: OptimizerConfig, memory: MemoryConfig
) -> Optimizer:
    """Build AdamW over groups of parameters, as `memory` asks for."""
    from torchao.optim import AdamW4bit, AdamW8bit, _AdamW

    kind = {"fp32": _AdamW, "8bit": AdamW8bit, "4bit": AdamW4bit}[memory.optimizer_state]
    optimizer: Optimizer = kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        bf16_stochastic_round=memory.weights == "bf16",
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:  # not torchao's, whose small moments have the weights' dtype
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: new_moment(parameter, name, memory.optimizer_state) for name in MOMENTS},
            }
    return optimizer


@contextmanager
def seeded_rounding(device: torch.device, seed: int) -> Iterator[None]:
    """Let torchao's optimizers round by a seed in this context; on CPUs they are not compiled."""
    on_cpu = device.type == "cpu"
    stance = torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()
    with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type), stance:
        torch.manual_seed(seed)
        yield


def new_moment(parameter: Tensor, name: str, precision: str) -> Tensor:
    """Return a moment of a parameter, which is 0."""
    count = parameter.numel()
    if precision == "fp32" or count < SMALLEST or count % BLOCKS[precision]:
        return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
    rounded: Tensor = _state_class(precision).zeros(
        parameter.shape, name == "exp_avg", BLOCKS[precision], parameter.device, dtype=torch.float32
    )
    return rounded


def _state_class(precision: str) -> Any:
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit

    return {"8bit": OptimState8bit, "4bit": OptimState4bit}[precision]


def stored_tensors(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors that a checkpoint has of one quantity: itself, or its codes and scales."""
    if not hasattr(value, "codes"):
        yield key, value
        return
    for part in STORED:
        yield f"{key}.{part}", getattr(value, part)


def read_moment(parts: Mapping[str, Tensor], parameter: Tensor, name: str, like: Any) -> Tensor:
    """Return a moment from its stored tensors, in the precision of ``like``.

    Args:
        parts: codes and scales, or under the empty name the moment itself.
        like: a moment, which is filled; None: a plain tensor is wanted.
    """
    stored: Any = parts.get("")
    if stored is None:
        precision = "8bit" if parts["codes"].shape == parameter.shape else "4bit"
        stored = new_moment(parameter, name, precision)
        for part in STORED:
            getattr(stored, part).copy_(parts[part])
        if type(stored) is type(like):
            return stored
        stored = stored.dequantize()
    return stored if like is None or not hasattr(like, "codes") else like.copy_(stored)
