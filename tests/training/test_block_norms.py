import pytest
import torch

from stdit.training.config import OptimizerConfig
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer


def test_norms_are_those_of_each_block() -> None:
    one = tiny_trainer(
        tiny_model(in_channels=3), OptimizerConfig(lr=1e-2), block_norms_every=2, max_grad_norm=1e-3
    )
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    line = one.step(tiny_batch(0))
    found = line["block_norms"]
    after = dict(one.model.named_parameters())
    assert set(found) == {name.split(".")[0] for name in after if not name.startswith("blocks")} | {
        "blocks.0",
        "blocks.1",
    }
    for block, norms in found.items():
        mine = [name for name in after if name.startswith(f"{block}.") or name == block]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in mine])
        weights = torch.cat([after[name].flatten() for name in mine])
        assert norms["weight"] == pytest.approx(float(weights.detach().norm()), rel=1e-5)
        assert norms["update"] == pytest.approx(float(moved.norm()), rel=1e-5)
    total = sum(norms["gradient"] ** 2 for norms in found.values() if "gradient" in norms) ** 0.5
    assert total == pytest.approx(line["grad_norm"], rel=1e-5), "before clipping"
    assert "block_norms" not in one.step(tiny_batch(1))
