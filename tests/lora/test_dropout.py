"""Dropout of adapters: a function of seed, step, sample and layer, in training alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.diffusion.draws import dropped_channels
from stdit.lora.adapters import adapter_weights
from stdit.lora.config import LoRAConfig
from stdit.lora.dropout import ChannelDropout, dropouts_of
from stdit.models.stdit import STDiT
from stdit.training.config import OptimizerConfig
from stdit.training.trainer import Trainer
from tests.lora.tiny import add_random_adapter
from tests.training.test_validation_loss import measured
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer

CPU = torch.device("cpu")
SHARE = 0.25


def adapted(dropout: float = SHARE, **settings: Any) -> STDiT:
    model = tiny_model(in_channels=3).eval()  # as it is read from a file
    with torch.no_grad():
        for parameter in model.parameters():  # where the output is zero, gradients would be
            parameter.add_(0.1 * torch.randn_like(parameter))
    add_random_adapter(model, dropout=dropout, **settings)
    return model


def trainer(model: STDiT, **settings: Any) -> Trainer:
    return tiny_trainer(model, OptimizerConfig(name="adamw"), **settings)


def gradients(one: Trainer, step: int = 0) -> list[Tensor]:
    loss, _ = one.accumulate(tiny_batch(step))
    return [loss, *(parameter.grad for parameter in one.parameters)]  # type: ignore[list-item]


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(found, expected, strict=True))


def test_channels_are_dropped_alike_in_all_tokens_of_a_sample() -> None:
    dropout = ChannelDropout(SHARE, 1000)
    with dropped_channels({"a": dropout}, 0, 0, range(2), CPU):
        x = dropout(torch.ones(2, 3, 5, 1000))
        rows = dropout(torch.ones(6, 5, 1000))  # [(B T) S D]
    assert torch.equal(rows, x.flatten(0, 1)) and (x == x[:, :1, :1]).all()
    kept = x[:, 0, 0]
    assert sorted(set(kept.flatten().tolist())) == pytest.approx([0, 1 / (1 - SHARE)])
    assert ((kept == 0).float().mean(1) - SHARE).abs().max() < 0.05
    assert torch.equal(dropout(x), x), "outside of the block nothing is dropped"


def test_seed_step_sample_and_layer_all_matter_and_nothing_else() -> None:
    def drawn(seed: int = 0, step: int = 0, indices: range = range(1), name: str = "a") -> Tensor:
        dropout = ChannelDropout(SHARE, 100)
        with dropped_channels({name: dropout, "other": ChannelDropout(SHARE, 7)}, seed, step, indices, CPU):
            assert dropout.factors is not None
            return dropout.factors

    found = [drawn(), drawn(seed=1), drawn(step=1), drawn(indices=range(1, 2)), drawn(name="b")]
    assert len({tuple(one.flatten().tolist()) for one in found}) == 5
    assert torch.equal(drawn(indices=range(3)), torch.cat([drawn(indices=range(i, i + 1)) for i in range(3)]))


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_gradients_depend_on_neither_micro_batches_nor_recomputation(settings: dict[str, Any]) -> None:
    expected = gradients(trainer(adapted(**settings)))
    assert not close(expected, gradients(trainer(adapted(0.0, **settings))))
    assert not close(expected, gradients(trainer(adapted(**settings)), step=1))
    assert close(gradients(trainer(adapted(**settings), micro_batch_size=1)), expected)
    checkpointed = adapted(**settings)
    checkpointed.enable_gradient_checkpointing()
    assert close(gradients(trainer(checkpointed)), expected)


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_nothing_is_dropped_in_validation_and_by_the_averages(settings: dict[str, Any]) -> None:
    one, other = trainer(adapted(**settings)), trainer(adapted(0.0, **settings))
    assert measured(one) == pytest.approx(measured(other), rel=1e-5)
    assert not dropouts_of(one.model.with_weights(one.model.state_dict()))
    names = adapter_weights(one.model).keys()
    assert names == adapter_weights(other.model).keys()


def test_layers_outside_of_the_blocks_have_none() -> None:
    model = adapted(targets=".")
    assert {name.split(".")[0] for name in dropouts_of(model)} == {"blocks"}
    assert model.peft_config["default"].lora_dropout == 0.0
    assert LoRAConfig().dropout == 0.0
    assert all(gradient.isfinite().all() for gradient in gradients(trainer(model)))
