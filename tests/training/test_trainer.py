from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.errors import UserError
from stdit.models.opensora import opensora_names
from stdit.parallel.processes.mesh import Mesh
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, OptimizerConfig, SpikeConfig, TrainerConfig
from stdit.training.trainer import Trainer
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer


def trainer(**settings: Any) -> Trainer:
    return tiny_trainer(tiny_model(in_channels=3), OptimizerConfig(name="muon", lr=1e-3), **settings)


def gradients(one: Trainer, step: int) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    one.optimizer.step = lambda seed: seen.update(  # type: ignore[method-assign]
        {name: p.grad.clone() for name, p in one.model.named_parameters() if p.grad is not None}
    )
    one.step(tiny_batch(step))
    return seen


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = trainer(), trainer(micro_batch_size=3)
    expected = gradients(whole, 5)
    found = gradients(parts, 5)
    assert len(expected) == len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert whole.step(tiny_batch(5))["loss"] == pytest.approx(parts.step(tiny_batch(5))["loss"], rel=1e-5)


def test_a_step_depends_on_seed_step_and_state_only() -> None:
    first, second = trainer(), trainer()
    torch.manual_seed(1)
    losses = [first.step(tiny_batch(step))["loss"] for step in range(3)]
    torch.manual_seed(2)
    assert [second.step(tiny_batch(step))["loss"] for step in range(3)] == losses
    assert trainer().step(replace(tiny_batch(0), step=1))["loss"] != trainer().step(tiny_batch(0))["loss"]


@pytest.mark.parametrize("blocks_in_two_lists", [False, True])
def test_state_round_trip_is_bit_exact(blocks_in_two_lists: bool, tmp_path: Path) -> None:
    """Also from a checkpoint whose weights have Open-Sora's names, as they once had."""
    first, second = trainer(), trainer()
    for step in range(3):
        first.step(tiny_batch(step))
    names = opensora_names(first.model.config) if blocks_in_two_lists else str
    state = {part: {names(key): value for key, value in of.items()} for part, of in first.state().items()}
    assert any("spatial_blocks" in name for name in state["optimizer"]) == blocks_in_two_lists
    folder = CheckpointWriter(tmp_path, CheckpointConfig(), Mesh()).save(3, state, {}, at_once=True)
    second.read(folder, {"nonfinite_in_a_row": 2, "batch_splits": 1})
    assert second.nonfinite_in_a_row == 2
    for step in (3, 4):
        assert first.step(tiny_batch(step)) == second.step(tiny_batch(step))
    for one, other in (
        (first.model.state_dict(), second.model.state_dict()),
        (first.ema.average, second.ema.average),
    ):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_do_not_grow_on_fewer_ranks(tmp_path: Path) -> None:
    before, expected = trainer(micro_batch_size=2), trainer()
    meta = {"nonfinite_in_a_row": 0, "batch_splits": 2}
    folder = CheckpointWriter(tmp_path, CheckpointConfig(), Mesh()).save(
        1, before.state(), meta, at_once=True
    )
    found = trainer()
    found.read(folder, meta)
    assert (
        found.batch_splits,
        found.micro_batch_size(4),
        found.micro_batch_size(3),
        expected.micro_batch_size(4),
    ) == (
        2,
        2,
        2,
        None,
    )
    assert trainer(micro_batch_size=3).micro_batch_size(4) == 3
    assert found.step(tiny_batch(1)) == before.step(tiny_batch(1))
    assert found.step(tiny_batch(2))["loss"] == before.step(tiny_batch(2))["loss"]


def test_nonfinite_steps_are_skipped_counted_and_stop_the_run() -> None:
    one = trainer(max_nonfinite_steps=3)
    broken = replace(tiny_batch(0), latents=torch.full((4, 3, 2, 4, 4), float("nan")))
    before = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    assert one.step(broken) == {"loss": None, "lr": 1e-3, "grad_norm": None, "skipped": True}
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())
    assert not one.optimizer.state_dict() and one.nonfinite_in_a_row == 1
    assert not one.step(tiny_batch(1))["skipped"] and one.nonfinite_in_a_row == 0
    one.step(replace(broken, step=2))
    one.step(replace(broken, step=3))
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, up to 4: lower"):
        one.step(replace(broken, step=4))


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32() -> None:
    one = trainer(precision="bf16")
    seen = []
    one.model.blocks[0].mlp.register_forward_hook(lambda *hook: seen.append(hook[2].dtype))  # type: ignore
    losses = one.step(tiny_batch(0)), trainer().step(tiny_batch(0))
    assert set(seen) == {torch.bfloat16}
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=0.05)
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}


def test_products_are_as_exact_as_the_settings_say_within_a_step() -> None:
    one = trainer(matmul_precision="medium")
    seen = []
    hook = lambda *_: seen.append(torch.get_float32_matmul_precision())  # noqa: E731
    one.model.register_forward_hook(hook)
    one.model.register_full_backward_hook(hook)
    assert not one.step(tiny_batch(0))["skipped"]
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("setting", ["fastest", "fastest_exact"])
def test_choosing_a_precision_changes_no_step(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stdit.training.matmul._time_ratio", lambda run: [run(), run(), 1.0][-1])
    plain, choosing = (
        trainer(spike=SpikeConfig(factor=3)),
        trainer(matmul_precision=setting, spike=SpikeConfig(factor=3)),
    )
    random_state = torch.get_rng_state()
    for step in range(2):
        assert choosing.step(tiny_batch(step)) == plain.step(tiny_batch(step))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert choosing.matmul_precision == "highest"
    for one, other in zip(flat(plain.state()), flat(choosing.state()), strict=True):
        assert torch.equal(one, other)


def flat(state: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for part in state.values() for tensor in part.values()]


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, checkpointed = trainer(), trainer()
    checkpointed.model.enable_gradient_checkpointing()  # type: ignore[operator]
    expected, found = gradients(plain, 0), gradients(checkpointed, 0)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_compile_compiles_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr("stdit.models.stdit.STDiT.compile_blocks", lambda self: compiled.append(self))
    assert compiled == [trainer(compile=True).model]


def test_gradients_are_clipped() -> None:
    seen = gradients(trainer(max_grad_norm=0.01), 0)
    norm = sum(float(g.square().sum()) for g in seen.values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["steps", "micro_batch_size", "max_nonfinite_steps", "max_grad_norm"])
def test_impossible_settings(name: str) -> None:
    with pytest.raises(UserError, match=rf"trainer.{name} = 0"):
        TrainerConfig(**{name: 0})  # type: ignore[arg-type]
