"""Linear layers whose frozen weights take 8 or 4 bits, so that adapters can be trained on large models.

torchao rounds and stores the weights. A layer has them in full only while it computes, forward and backward.
"""

from collections.abc import Iterable
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.errors import UserError, install_command

LowBit = Literal["int8", "nf4"]
"""int8: a scale for each row; nf4: 4-bit normal floats (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""
NF4_BLOCK = 64
"""Weights that share a scale, and scales that share one: as in the paper."""
NF4_SCALES = 256


def round_weight(weight: Tensor, kind: LowBit) -> Tensor:
    """Return a weight [O I] as a tensor of torchao.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8Tensor, NF4Tensor, PerRow
    except ImportError:
        raise UserError(
            f"{kind} weights need torchao: {install_command('memory')}, or keep them in bf16."
        ) from None
    weight = weight.to(torch.bfloat16)
    if kind == "int8":
        rounded: Tensor = Int8Tensor.from_hp(weight, PerRow())
        return rounded
    block = gcd(weight.numel(), NF4_BLOCK)
    rounded = NF4Tensor.from_tensor(weight, block, gcd(weight.numel() // block, NF4_SCALES))
    return rounded


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it does not see the methods of torchao's tensors
def full_weight(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor of `round_weight` as a plain one of ``dtype``."""
    full: Tensor = (
        weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()
    )
    return full.to(dtype)


class LowBitLinear(nn.Linear):
    """A linear layer whose weight is a tensor of `round_weight`; the gradient of the input alone is computed."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out: Tensor = _FrozenProduct.apply(x.to(dtype), self.weight, bias)  # type: ignore[no-untyped-call]
        return out


class _FrozenProduct(torch.autograd.Function):
    """``x W^T + b``, which keeps the rounded weight for the backward pass, not the full one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, full_weight(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return gradient @ full_weight(weight, gradient.dtype), None, None


def layers_to_round(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that a rounded model has in 8 or 4 bits: of all blocks but the last.

    No later block evens out the error of the last one, which is most of the whole: see stdit/models/README.md.
    """
    blocks = list(model.blocks.named_children())[:-1]  # type: ignore[operator,union-attr]
    return [
        f"blocks.{number}.{name}"
        for number, block in blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def make_low_bit(model: nn.Module, names: Iterable[str]) -> None:
    """Replace linear layers by low-bit ones on the meta device, whose weights are then to be set."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        empty = LowBitLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        model.set_submodule(name, empty.requires_grad_(False))


def low_bit_layers(model: nn.Module) -> list[str]:
    """Return the names of the low-bit layers, as they are without adapters."""
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, LowBitLinear)
    ]
