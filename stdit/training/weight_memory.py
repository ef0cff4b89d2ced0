"""Memory of weights, gradients, optimizer and average in training."""

from dataclasses import replace
from math import ceil
from typing import NamedTuple

from torch import nn

from stdit.lora.adapters import linear_layers, target_layers
from stdit.models.low_bit import layers_to_round
from stdit.models.size import count_on_meta, meta_model
from stdit.parallel.sequence.planner import FLOAT32_BYTES
from stdit.training.config import TrainConfig
from stdit.training.low_bit_adamw import BLOCKS
from stdit.training.optim import count_matrices

BFLOAT16_BYTES = 2
MOMENT_BYTES = {
    "fp32": 4.0,
    **{name: int(name[0]) / 8 + FLOAT32_BYTES / size for name, size in BLOCKS.items()},
}
"""Of a value of one moment of AdamW, with its part of a scale."""
BASE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Of a frozen weight that is rounded; others are fp32 or bf16."""


class WeightCounts(NamedTuple):
    """Numbers of weights of a model that need not be built."""

    trained: int
    largest: int
    """Of the largest trained tensor."""
    in_muon: int
    """Those that Muon trains: it keeps one number for each, where AdamW keeps two."""
    rounded: int
    """Those that a base of 8 or 4 bits has rounded."""
    frozen: int
    """All that are not trained."""

    @classmethod
    def of(cls, config: TrainConfig) -> "WeightCounts":
        """Count the weights of a run. Raises UserError if an adapter does not fit the model."""
        weights = count_on_meta(config.model)
        if config.lora.rank is not None:
            model = meta_model(config.model)
            layers = linear_layers(model)
            sizes = [
                _adapter_sizes(layers[name], config) for name in target_layers(model, config.lora.targets)
            ]
            rounded = sum(layers[name].weight.numel() for name in layers_to_round(model))
            return cls(sum(map(sum, sizes)), max(map(max, sizes)), 0, rounded, weights)
        in_muon = count_on_meta(config.model, count_matrices) if config.optimizer.name == "muon" else 0
        return cls(weights, _largest(config), in_muon, 0, 0)

    @property
    def weights(self) -> int:
        """All of them."""
        return self.trained + self.frozen

    def rounded_bytes(self, config: TrainConfig) -> int:
        """Return the bytes of the weights and moments that have 8 or 4 bits, in one process that has all of them."""
        weights = 0.0 if config.lora.base_dtype in ("fp32", "bf16") else BASE_BYTES[config.lora.base_dtype]
        state = config.memory.optimizer_state
        moments = 0.0 if state == "fp32" else 2 * MOMENT_BYTES[state]
        return ceil(weights * self.rounded + moments * self.trained)

    def bytes(self, config: TrainConfig, processes: int, on_gpu: bool) -> dict[str, int]:
        """Return the bytes in each of the processes, by what they hold; on a GPU, without what is offloaded."""
        memory = config.memory
        share = 1 / processes if config.parallel.shard_parameters else 1.0
        width = FLOAT32_BYTES if memory.weights == "fp32" else BFLOAT16_BYTES
        has_master = memory.weights == "bf16_master"
        here = not (on_gpu and memory.offload_optimizer)
        moments = (2 * self.trained - self.in_muon) * MOMENT_BYTES[memory.optimizer_state]
        gradients = self.largest if memory.fused_backward else self.trained
        base = BASE_BYTES[config.lora.base_dtype]
        other = FLOAT32_BYTES if config.lora.base_dtype == "fp32" else BFLOAT16_BYTES
        found = {
            "weights": width * self.trained,
            "frozen weights": base * self.rounded + other * (self.frozen - self.rounded),
            "gradients": (FLOAT32_BYTES if has_master and here else width) * gradients,
            "optimizer": here * (moments + FLOAT32_BYTES * has_master * self.trained),
            "average": here * FLOAT32_BYTES * self.trained * (config.ema.decay > 0),
        }
        held = {name: ceil(share * size) for name, size in found.items()}
        if config.distill.steps:  # as the student, without an average
            held["score"] = sum(held[name] for name in ("weights", "gradients", "optimizer"))
        if config.has_teacher:  # whole, on each process
            held["teacher"] = FLOAT32_BYTES * self.trained
        return held


def _adapter_sizes(layer: nn.Linear, config: TrainConfig) -> list[int]:
    """Return the numbers of weights of the tensors that an adapter of a layer has."""
    rank = config.lora.rank or 0
    return [rank * layer.in_features, rank * layer.out_features, layer.out_features * config.lora.dora]


def _largest(config: TrainConfig) -> int:
    """Return the weights of the largest tensor: blocks are alike, so that of a shallow model."""
    model = meta_model(replace(config.model, depth=1))
    return max(parameter.numel() for parameter in model.parameters())
