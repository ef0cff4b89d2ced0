import pytest
import torch
from torch import nn

from stdit.parallel.mesh import Mesh
from stdit.parallel.parameters import replicated, sharded, state_bytes


@pytest.mark.parametrize(
    "ranks, sharded, expected",
    [(1, False, 200), (4, False, 200), (1, True, 200), (5, True, 40), (4, True, 60)],
)
def test_state_is_whole_or_divided(ranks: int, sharded: bool, expected: int) -> None:
    assert state_bytes(10, ranks, sharded) == expected


@pytest.mark.parametrize("spread", [replicated, sharded])
def test_one_rank_alone_keeps_its_model(spread: object) -> None:
    model = nn.Linear(2, 2)
    network = spread(model, Mesh())  # type: ignore[operator]
    assert network.module is model and type(model) is nn.Linear
    with network.apart():
        assert isinstance(model.weight, nn.Parameter) and type(model.weight.data) is torch.Tensor
