"""Settings that save memory in training. Imports no torch."""

import re
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal

from stdit.errors import UserError, install_command
from stdit.models.config import Activations

TORCHAO = {
    "memory.weights": ("bf16",),
    "memory.optimizer_state": ("8bit", "4bit"),
    "lora.base_dtype": ("int8", "nf4"),
}
"""Values that need torchao."""
_ITEM = re.compile(r"(keep|recompute|offload)(?: +(\d+)(?:-(\d+))?)?")


@dataclass
class MemoryConfig:
    """What is kept in training, and where: less memory for more time, or for rounding."""

    weights: Literal["fp32", "bf16", "bf16_master"] = "fp32"
    """The trained weights and their gradients. bf16: updates are rounded up or down at random, so that small ones are
    not lost (needs torchao); bf16_master: the optimizer has a copy in fp32. Both need trainer.precision bf16."""
    optimizer_state: Literal["fp32", "8bit", "4bit"] = "fp32"
    """The two moments of AdamW; with fewer bits they are rounded in blocks that share a scale (needs torchao)."""
    offload_optimizer: bool = False
    """On GPUs: keep the optimizer's state, its copy of the weights and the average in CPU memory, and step there."""
    fused_backward: bool = False
    """Update each weight as soon as its gradient is known, and drop the gradient. Clipping needs the norm of all of
    them first, in a pass of its own, which doubles the time; with trainer.max_grad_norm .inf it does not."""
    activations: str = "keep"
    """What is kept of the blocks for the backward pass: keep, recompute (their inputs alone; a third more time),
    offload (all, in CPU memory), or a list such as "recompute 0-27, offload 28-41"; other blocks keep theirs."""

    def __post_init__(self) -> None:
        for item in self.activations.split(","):
            found = _ITEM.fullmatch(item.strip())
            if found is None or (found[3] is not None and int(found[3]) < int(found[2])):
                raise UserError(
                    f"memory.activations = {self.activations!r}: {item.strip()!r} is neither keep, recompute "
                    'or offload, nor one of these and block numbers, such as "recompute 0-27".'
                )

    def block_activations(self, blocks: int) -> list[Activations]:
        """Return what is kept of each block, in running order.

        Raises:
            UserError: if there is no such block.
        """
        modes: list[Activations] = ["keep"] * blocks
        for item in self.activations.split(","):
            found = _ITEM.fullmatch(item.strip())
            assert found is not None
            first = 0 if found[2] is None else int(found[2])
            last = blocks - 1 if found[2] is None else int(found[3] or first)
            if last >= blocks:
                raise UserError(
                    f"memory.activations = {self.activations!r}: there is no block {last}: this model has blocks 0 "
                    f"to {blocks - 1}."
                )
            modes[first : last + 1] = [found[1]] * (last + 1 - first)  # type: ignore[list-item]
        return modes


def check_memory(config: Any) -> None:
    """Raise UserError for ways of a `TrainConfig` to save memory that do not go together, or lack a package."""
    memory, lora = config.memory, config.lora
    if lora.rank is None and lora.base_dtype != "fp32":
        raise UserError(
            f"lora.base_dtype = {lora.base_dtype}: rounds weights that are not trained, and without lora.rank all "
            "are: add lora.rank, or use memory.weights bf16 and memory.optimizer_state 8bit."
        )
    if lora.rank is not None and memory.weights != "fp32":
        raise UserError(
            f"memory.weights = {memory.weights}: the weights of an adapter are few, and stay in fp32: use "
            "lora.base_dtype for those of the model below it."
        )
    if lora.base_dtype in TORCHAO["lora.base_dtype"] and lora.dora:
        raise UserError(
            f"lora.dora and lora.base_dtype = {lora.base_dtype}: DoRA needs the length of each row of the weights: "
            "use bf16."
        )
    settings = {
        "memory.weights": memory.weights,
        "memory.optimizer_state": memory.optimizer_state,
        "lora.base_dtype": lora.base_dtype,
    }
    for name, value in settings.items():
        if name != "memory.optimizer_state" and value != "fp32" and config.trainer.precision != "bf16":
            raise UserError(f"{name} = {value}: needs bf16 arithmetic: add trainer.precision bf16.")
        if value not in TORCHAO.get(name, ()):
            continue
        if name != "lora.base_dtype" and config.optimizer.name != "adamw":
            raise UserError(
                f"{name} = {value} and optimizer.name = {config.optimizer.name}: is for adamw alone: use that, or "
                "fp32."
            )
        if find_spec("torchao") is None:
            raise UserError(f"{name} = {value}: needs torchao: {install_command('memory')}.")
    if config.parallel.shard_parameters:
        changed = {
            f"memory.{f.name}": getattr(memory, f.name) for f in fields(memory) if f.name != "activations"
        }
        usual = {f"memory.{f.name}": f.default for f in fields(memory)}
        changed |= {
            "lora.base_dtype": lora.base_dtype if lora.base_dtype in TORCHAO["lora.base_dtype"] else None
        }
        for name, value in changed.items():
            if value != usual.get(name):
                raise UserError(
                    f"{name} = {value} and parallel.shard_parameters: are two ways to save the same memory, and do "
                    "not work together: leave one of them out."
                )
    if memory.fused_backward:
        for name in ("micro_batch_size", "block_norms_every"):
            if (value := getattr(config.trainer, name)) is not None:
                raise UserError(
                    f"memory.fused_backward and trainer.{name} = {value}: no gradient is kept until the end of a "
                    "step: leave one of them out."
                )


def check_processes(memory: MemoryConfig, processes: int) -> None:
    """Raise UserError for what one process alone can do."""
    if memory.fused_backward and processes > 1:
        raise UserError(
            f"memory.fused_backward on {processes} processes: gradients are averaged over them at the end of "
            "the backward pass: use parallel.shard_parameters."
        )
