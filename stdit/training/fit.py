"""Choose what is kept in memory: ``--fit GIB`` takes the fastest choice that fits, ``--dry_run memory`` shows all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from math import isinf, prod
from typing import Any

from stdit.errors import UserError, install_command
from stdit.parallel.processes.mesh import runs_on_cpu
from stdit.parallel.sequence.planner import GIB, format_gib
from stdit.training.build import RunInputs
from stdit.training.config import TrainConfig
from stdit.training.memory_config import MemoryConfig
from stdit.training.memory_estimate import MemoryEstimate

PASSES = {"keep": 3.0, "recompute": 4.0, "offload": 4.0}
"""Forward passes that a step takes, by what its blocks keep: a backward pass counts as two, copies as one."""
SLOWER = {
    "memory.weights bf16": 1.1,
    "memory.optimizer_state 8bit": 1.75,
    "memory.optimizer_state 4bit": 1.45,
    "memory.offload_optimizer True": 1.2,
    "lora.base_dtype int8": 1.03,
    "lora.base_dtype nf4": 1.1,
}
"""Factors of the time of a step, measured by ``scripts/bench/memory.py --model B`` on two cores of an Intel Xeon. Of
a GPU nothing was measured: that of ``offload_optimizer`` is a guess, and updates in few bits may cost less there."""
ROUNDING = {"bf16": 1, "8bit": 1, "int8": 1, "4bit": 2, "nf4": 2}
"""How much a choice rounds: of equally fast ones, that which rounds least is taken."""


@dataclass(frozen=True)
class MemoryChoice:
    """Settings, and what follows from them."""

    settings: dict[str, Any]
    """By dotted name; those that a run may choose."""
    config: TrainConfig
    """With these settings."""
    size: int
    """Bytes of a process, estimated."""
    time: float
    """Of a step, as a multiple of that of the fastest choice; a rough figure."""

    def __str__(self) -> str:
        usual = {
            **{f"memory.{name}": value for name, value in vars(MemoryConfig()).items()},
            "lora.base_dtype": "fp32",
        }
        changed = [f"--{name} {str(v).lower()}" for name, v in self.settings.items() if v != usual[name]]
        return " ".join(changed) or "all is kept in fp32"


def memory_choices(inputs: RunInputs, processes: int) -> list[MemoryChoice]:
    """Return all choices that a run has, the fastest first; settings that are not their defaults stay as they are.

    Of the ways to share the work among the processes, that which needs least counts.

    Raises:
        UserError: if ``parallel.sp`` does not divide the processes.
    """
    config, estimate = inputs.config, MemoryEstimate(inputs)
    splits = estimate.splits(processes)
    alternatives = dict(_alternatives(inputs, splits[0].processes))
    found = []
    for values in product(*alternatives.values()):
        settings = dict(zip(alternatives, values, strict=True))
        changed = with_settings(config, settings)
        size = min(map(estimate.of(changed).total, splits))
        found.append(MemoryChoice(settings, changed, size, _time(changed, settings)))
    least = min(choice.time for choice in found)
    found = [replace(choice, time=choice.time / least) for choice in found]
    return sorted(
        found, key=lambda one: (one.time, sum(ROUNDING.get(v, 0) for v in one.settings.values()), one.size)
    )


def _alternatives(inputs: RunInputs, processes: int) -> Iterator[tuple[str, list[Any]]]:
    """Yield the names of settings, and the values that each may have in this run."""
    config, resumed = inputs.config, inputs.resumed
    memory, lora, on_gpu = config.memory, config.lora.rank is not None, not runs_on_cpu(config.trainer.device)
    bf16, adamw = config.trainer.precision == "bf16", config.optimizer.name == "adamw"
    alone, torchao = not config.parallel.shard_parameters, find_spec("torchao") is not None
    one_pass = config.trainer.micro_batch_size is None and config.trainer.block_norms_every is None
    whole = resumed is None or resumed.meta["batch_splits"] == 1
    may_fuse = processes == 1 and one_pass and whole and alone and not lora
    allowed: dict[str, list[Any]] = {
        "memory.activations": ["keep", "recompute", *(["offload"] if on_gpu else [])],
        "memory.weights": [
            "fp32",
            *(["bf16"] if bf16 and adamw and torchao and alone and not lora else []),
            *(["bf16_master"] if bf16 and on_gpu and alone and not lora else []),
        ],
        "memory.optimizer_state": [
            "fp32",
            *(["8bit", "4bit"] if adamw and torchao and alone and not lora else []),
        ],
        "memory.offload_optimizer": [False, *([True] if on_gpu and alone and not lora else [])],
        "memory.fused_backward": [False, *([True] if may_fuse else [])],
    }
    for name, values in allowed.items():
        set_to = getattr(memory, name.partition(".")[2])
        yield name, values if set_to == values[0] else [set_to]
    rounded = ["int8", "nf4"] if torchao and alone and not config.lora.dora else []
    choices = ["fp32", "bf16", *rounded] if lora and bf16 else ["fp32"]
    yield "lora.base_dtype", choices if config.lora.base_dtype == "fp32" else [config.lora.base_dtype]


def with_settings(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return a config with other settings of ``memory`` and ``lora``, by dotted name."""
    groups: dict[str, dict[str, Any]] = {"memory": {}, "lora": {}}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    return replace(
        config, memory=replace(config.memory, **groups["memory"]), lora=replace(config.lora, **groups["lora"])
    )


def _time(config: TrainConfig, settings: Mapping[str, Any]) -> float:
    """Return the time of a step with these settings, roughly, in forward passes."""
    memory, modes = config.memory, config.memory.block_activations(2 * config.model.depth)
    time = sum(PASSES[mode] for mode in modes) / len(modes)
    needs_norm = not isinf(config.trainer.max_grad_norm) or config.trainer.spike.factor is not None
    if memory.fused_backward and needs_norm:
        time *= 2
    return time * prod(SLOWER.get(f"{name} {value}", 1.0) for name, value in settings.items())


def fitted(inputs: RunInputs, processes: int) -> RunInputs:
    """Return the inputs of a run with the fastest settings that fit in ``fit`` GiB, and print what was chosen.

    Raises:
        UserError: if none does; the message has what is missing.
    """
    config = inputs.config
    if config.fit is None:
        return inputs
    choices = memory_choices(inputs, processes)
    fitting = [choice for choice in choices if choice.size <= config.fit * GIB]
    if not fitting:
        least = min(choices, key=lambda choice: choice.size)
        missing = least.size - int(config.fit * GIB)
        raise UserError(
            f"fit = {config.fit:g}: nothing fits: the least that this run needs is about {format_gib(least.size)} "
            f"GiB ({least}), {format_gib(missing)} GiB more. {_advice(config)}"
        )
    chosen = fitting[0]
    print(
        f"fit = {config.fit:g}: about {format_gib(chosen.size)} GiB, {chosen.time:.3g} times the time: {chosen}"
    )
    return replace(inputs, config=replace(chosen.config, fit=None))


def _advice(config: TrainConfig) -> str:
    """Return what else would save memory."""
    ways = []
    if config.lora.rank is None:
        ways.append("train an adapter (lora.rank 16, with init_from)")
    if config.trainer.precision != "bf16":
        ways.append("use bf16 arithmetic (trainer.precision bf16)")
    if config.ema.decay:
        ways.append("keep no average (ema.decay 0)")
    if find_spec("torchao") is None:
        ways.append(f"install torchao ({install_command('memory')}), for weights and moments of 8 and 4 bits")
    ways.append(
        "train on smaller or shorter clips, or on fewer at once (data.buckets, trainer.micro_batch_size)"
    )
    return "To need less: " + "; ".join(ways) + "."


def choice_lines(inputs: RunInputs, processes: int) -> Iterator[str]:
    """Yield a table of all choices, the fastest first."""
    yield "memory GiB   time  settings"
    for choice in memory_choices(inputs, processes):
        yield f"{format_gib(choice.size):>10} {choice.time:>6.2f}  {choice}"
