"""Linear layers whose frozen weights take 8 or 4 bits."""

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.errors import UserError
from stdit.lora.adapters import adapter_weights, add_adapter, linear_layers
from stdit.lora.config import LoRAConfig
from stdit.models.activations import offloaded
from stdit.models.low_bit import (
    LowBitLinear,
    full_weight,
    layers_to_round,
    low_bit_layers,
    make_low_bit,
    round_weight,
)
from stdit.models.stdit import STDiT
from tests.parallel.sequence.test_sharding import make_batch, make_model

BF16 = torch.bfloat16


def rounded_layer(kind: Any, rows: int = 96, columns: int = 48) -> tuple[LowBitLinear, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    model = nn.Sequential(nn.Linear(columns, rows))
    make_low_bit(model, ["0"])
    layer = model[0]
    assert isinstance(layer, LowBitLinear)
    layer.weight = nn.Parameter(round_weight(weight, kind), requires_grad=False)
    layer.bias = nn.Parameter(torch.randn(rows), requires_grad=False)
    return layer, weight


@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("nf4", 0.12)])
@pytest.mark.parametrize("sizes", [(96, 48), (64, 32), (30, 7)])
def test_a_weight_is_close_to_itself(kind: Any, error: float, sizes: tuple[int, int]) -> None:
    layer, weight = rounded_layer(kind, *sizes)
    full = full_weight(layer.weight, torch.float32)
    assert full.shape == weight.shape
    assert 0 < float((full - weight).norm() / weight.norm()) < error


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_gradient_are_those_of_the_rounded_weight(kind: Any, autocast: bool) -> None:
    layer, _ = rounded_layer(kind)
    weight = full_weight(layer.weight, BF16 if autocast else torch.float32)
    x, other = (torch.randn(2, 5, 48).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        with torch.autocast("cpu", BF16, enabled=autocast):
            found = layer(x)
    expected = F.linear(other.to(weight.dtype), weight, layer.bias.to(weight.dtype))
    assert torch.equal(found, expected) and found.dtype == weight.dtype
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert all(
        tensor.is_floating_point() is False or type(tensor) is not Tensor or tensor.numel() < weight.numel()
        for tensor in saved
    ), "the full weight is not kept"


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_compiled_layer_whose_activations_are_offloaded(kind: Any) -> None:
    layer, _ = rounded_layer(kind)
    x, other = (torch.randn(2, 5, 48).requires_grad_() for _ in range(2))
    other.data.copy_(x.data)
    expected = layer(x)
    expected.square().sum().backward()
    compiled = torch.compile(layer, backend="aot_eager")
    with offloaded(layer):
        found = compiled(other)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    torch.testing.assert_close(other.grad, x.grad)
    with offloaded(layer):
        assert torch.equal(layer(other), expected)


@pytest.mark.parametrize("kind, error", [("int8", 0.02), ("nf4", 0.2)])
def test_a_model_with_rounded_blocks(kind: Any, error: float) -> None:
    """Its output is close, an adapter on it is trained, and copies around other weights have the same blocks."""
    model = make_model(torch.float32, depth=2, hidden_size=64).requires_grad_(False)
    x, _, t, _, condition = make_batch(3, 6, 6, 2, False, torch.float32)
    names = layers_to_round(model)
    last = f"blocks.{len(model.blocks) - 1}."
    of_blocks = [name for name in linear_layers(model) if name.startswith("blocks.")]
    assert names == [name for name in of_blocks if not name.startswith(last)]
    other = copy.deepcopy(model)
    make_low_bit(other, names)
    for name in names:
        layer, before = other.get_submodule(name), model.get_submodule(name)
        layer.weight = nn.Parameter(round_weight(before.weight, kind), requires_grad=False)  # type: ignore[arg-type]
        layer.bias = before.bias
    assert low_bit_layers(other) == names

    def output(one: STDiT) -> Tensor:
        with torch.autocast("cpu", BF16):
            found: Tensor = one(x, 1000 * t, **condition).sample.float()
        return found

    expected, found = output(model), output(other)
    assert float((found - expected).norm() / expected.norm()) < error
    add_adapter(other, LoRAConfig(rank=2))
    assert torch.equal(output(other), found) and low_bit_layers(other) == names
    output(other).sum().backward()
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert len(trained) == len(adapter_weights(other)) and all(
        p.dtype == torch.float32 for p in trained.values()
    )
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    around = other.with_weights(other.state_dict())
    assert low_bit_layers(around) == names and torch.equal(output(around), found)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="int8 weights need torchao: pip install"):
        round_weight(torch.ones(2, 2), "int8")
