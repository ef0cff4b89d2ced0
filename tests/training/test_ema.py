import pytest
import torch
from torch import nn

from stdit.errors import UserError
from stdit.training.config import EMAConfig
from stdit.training.ema import EMA


def test_average_follows_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    ema = EMA(model, EMAConfig(decay=0.5))
    expected = model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)
    assert EMA(model, EMAConfig(decay=0.5, warmup=False)).decay(0) == 0.5


def test_half_precision_weights_have_float32_averages() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA(model, EMAConfig())
    ema.update(0)
    assert {tensor.dtype for tensor in ema.state_dict().values()} == {torch.float32}


def test_impossible_decay() -> None:
    with pytest.raises(UserError, match=r"ema.decay"):
        EMAConfig(decay=1.0)
