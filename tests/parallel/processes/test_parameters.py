import pytest
import torch
from torch import nn

from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import replicate_model, shard_model
from stdit.parallel.sequence.group import Group
from tests.parallel.ranks import run_on_ranks


@pytest.mark.parametrize("distribute", [replicate_model, shard_model])
def test_a_single_rank_keeps_its_model(distribute: object) -> None:
    model = nn.Linear(2, 2)
    network = distribute(model, Mesh())  # type: ignore[operator]
    assert network.module is model and type(model) is nn.Linear
    with network.no_sync():
        assert isinstance(model.weight, nn.Parameter) and type(model.weight.data) is torch.Tensor


class Backwards(nn.Module):
    """Layers that run in another order than they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[::-1]:
            x = layer(x)
        return x


def check_all_passes_are_equal(group: Group) -> None:
    torch.manual_seed(0)
    model = Backwards()
    network = replicate_model(model, Mesh(group.rank, group.size))
    torch.manual_seed(group.rank)
    x, passes = torch.randn(8, 40), []
    for _ in range(3):
        model.zero_grad()
        network.module(x=x).square().sum().backward()
        passes.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(passes[0], passes[1]) and torch.equal(passes[0], passes[2])


def test_the_first_pass_of_a_process_sums_gradients_in_the_same_order_as_later_ones() -> None:
    run_on_ranks(3, check_all_passes_are_equal)
