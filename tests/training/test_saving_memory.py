"""Ways to save memory in training: what they compute, and that they resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.training.checkpoint_writer import CheckpointWriter
from stdit.training.config import CheckpointConfig, OptimizerConfig, SpikeConfig
from stdit.training.memory_config import MemoryConfig, check_processes
from stdit.training.trainer import Trainer
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer

MODES = {
    "bf16": dict(weights="bf16"),
    "bf16 fused": dict(weights="bf16", fused_backward=True),
    "master": dict(weights="bf16_master"),
    "master fused": dict(weights="bf16_master", fused_backward=True),
    "8bit": dict(optimizer_state="8bit"),
    "4bit": dict(optimizer_state="4bit"),
    "all": dict(weights="bf16", optimizer_state="8bit", fused_backward=True, activations="recompute"),
}


def trainer(
    memory: dict[str, Any] | None = None, name: str = "adamw", ema: float = 0.9, **settings: Any
) -> Trainer:
    memory = memory or {}
    if memory.get("weights", "fp32") != "fp32":
        settings["precision"] = "bf16"
    return tiny_trainer(
        tiny_model(in_channels=3, hidden_size=64),
        OptimizerConfig(name=name, lr=1e-3),
        memory=MemoryConfig(**memory),
        ema=ema,
        **settings,
    )


def weights(one: Trainer) -> dict[str, Tensor]:
    return {f"{part} {name}": t.clone() for part, named in one.state().items() for name, t in named.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("settings", [dict(max_grad_norm=0.05), dict(max_grad_norm=float("inf"))])
def test_fused_backward_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    plain, fused = trainer(name=name, **settings), trainer(dict(fused_backward=True), name, **settings)
    for step in range(3):
        assert plain.step(tiny_batch(step)) == fused.step(tiny_batch(step))
        assert all(parameter.grad is None for parameter in fused.parameters)
    assert equal(weights(plain), weights(fused))


def test_fused_backward_holds_one_gradient_at_a_time() -> None:
    one, most = trainer(dict(fused_backward=True)), 0

    def count(parameter: nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in one.parameters))

    for parameter in one.parameters:
        parameter.register_post_accumulate_grad_hook(count)  # type: ignore[arg-type]
    assert passes_of_a_step(one) == 2, "the first has the norm"
    assert most == 0, "each is dropped before this hook sees it"
    assert passes_of_a_step(trainer(dict(fused_backward=True), max_grad_norm=float("inf"))) == 1


def passes_of_a_step(one: Trainer) -> int:
    passes, forward = [], one.sample_losses
    one.sample_losses = lambda *args: passes.append(1) or forward(*args)  # type: ignore[method-assign,func-returns-value]
    one.step(tiny_batch(0))
    return len(passes)


def test_fused_backward_is_for_whole_batches() -> None:
    one = trainer(dict(fused_backward=True))
    one.batch_splits = 2  # as after a resume from two processes
    with pytest.raises(
        UserError, match="memory.fused_backward: each batch of this run was split into 2 parts"
    ):
        one.step(tiny_batch(0))


@pytest.mark.parametrize("settings", [dict(), dict(max_grad_norm=float("inf"))])
def test_fused_backward_skips_what_is_not_finite(settings: dict[str, Any]) -> None:
    one = trainer(dict(fused_backward=True), **settings)
    before, batch = weights(one), tiny_batch(0)
    batch.latents[0] = float("nan")
    assert one.step(batch)["skipped"]
    assert all(torch.equal(before[f"model {name}"], p) for name, p in one.model.named_parameters())
    spiky = trainer(
        dict(fused_backward=True), spike=SpikeConfig(factor=3.0, window=8), max_grad_norm=float("inf")
    )
    for step in range(8):
        spiky.step(tiny_batch(step))
    before, batch = weights(spiky), tiny_batch(8)
    batch.latents.mul_(100)
    assert "spike" in spiky.step(batch) and equal(before, weights(spiky))


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_same_bit_for_bit(mode: str, tmp_path: Path) -> None:
    straight, first = trainer(MODES[mode]), trainer(MODES[mode])
    for step in range(4):
        straight.step(tiny_batch(step))
    for step in range(2):
        first.step(tiny_batch(step))
    folder = CheckpointWriter(tmp_path, CheckpointConfig(), Mesh()).save(2, first.state(), {}, at_once=True)
    resumed = trainer(MODES[mode])
    torch.manual_seed(5)
    resumed.read(folder, {"nonfinite_in_a_row": 0, "batch_splits": 1})
    for step in range(2, 4):
        resumed.step(tiny_batch(step))
    assert equal(weights(straight), weights(resumed))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters, resumed.parameters, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_training_goes_as_in_full_precision(mode: str) -> None:
    full, saving = trainer(precision="bf16"), trainer(MODES[mode])
    losses = [
        (full.step(tiny_batch(s % 2))["loss"], saving.step(tiny_batch(s % 2))["loss"]) for s in range(12)
    ]
    assert losses[0][1] == pytest.approx(losses[0][0], rel=1e-2)
    assert losses[-1][1] == pytest.approx(losses[-1][0], rel=0.1)
    assert losses[-1][1] < losses[1][1]


def test_small_updates_are_not_lost_in_bf16() -> None:
    """Rounded to nearest, no weight of 1 would ever move by 1e-4."""
    for weights_setting in ("bf16", "bf16_master"):
        one = trainer(dict(weights=weights_setting))
        for parameter in one.parameters:
            parameter.data.fill_(1.0)
        if one.masters is not None:
            for copy in one.masters.of.values():
                copy.data.fill_(1.0)
        one.optimizer.set_factor(0.1)
        for step in range(30):
            for parameter in one.parameters:
                parameter.grad = torch.ones_like(parameter)
            one.optimizer.step(step)
        updated = one.optimizer.named_parameters.values()
        moved = torch.cat([(1 - p.detach().float()).flatten() for p in updated]).mean()
        assert float(moved) == pytest.approx(30 * 1e-4, rel=0.1), weights_setting


@pytest.mark.parametrize(
    "before, after",
    [("8bit", "fp32"), ("fp32", "8bit"), ("8bit", "4bit"), ("4bit", "8bit"), ("8bit", "master")],
)
def test_a_run_may_resume_with_other_settings_of_memory(before: str, after: str, tmp_path: Path) -> None:
    one, other = trainer(MODES.get(before)), trainer(MODES.get(after))
    for step in range(3):
        one.step(tiny_batch(step))
    folder = CheckpointWriter(tmp_path, CheckpointConfig(), Mesh()).save(3, one.state(), {}, at_once=True)
    other.read(folder, {"nonfinite_in_a_row": 0, "batch_splits": 1})
    parameters = zip(
        one.optimizer.named_parameters.values(), other.optimizer.named_parameters.values(), strict=True
    )
    for a, b in parameters:
        assert torch.equal(a, b)
        kept, read = (o.optimizer._owners[p].state[p] for o, p in ((one, a), (other, b)))
        for moment in ("exp_avg", "exp_avg_sq"):
            plain, found = (
                v.dequantize() if hasattr(v, "codes") else v for v in (kept[moment], read[moment])
            )
            largest = float(plain.abs().max())
            torch.testing.assert_close(
                found, plain, rtol=0.0, atol=(0.2 if "4bit" in (before, after) else 0.05) * largest
            )
    assert torch.isfinite(torch.tensor(other.step(tiny_batch(3))["loss"]))


def test_without_an_average_the_latest_weights_are_used(tmp_path: Path) -> None:
    one = trainer(ema=0.0)
    one.step(tiny_batch(0))
    assert set(one.state()) == {"model", "optimizer"}
    assert all(torch.equal(one.ema.weights()[name], p) for name, p in one.model.named_parameters())
    folder = CheckpointWriter(tmp_path, CheckpointConfig(), Mesh()).save(1, one.state(), {}, at_once=True)
    other = trainer()  # as with resume_changed
    other.read(folder, {"nonfinite_in_a_row": 0, "batch_splits": 1})
    assert all(torch.equal(other.ema.average[name], p) for name, p in one.model.named_parameters())


def test_averages_survive_a_visit_in_a_rounded_model() -> None:
    one = trainer(MODES["master"])
    one.step(tiny_batch(0))
    before = weights(one)
    with one.ema.applied(one.model):
        average = one.ema.average
        for name, parameter in one.model.named_parameters():
            assert torch.equal(parameter, average[name].to(torch.bfloat16))
    assert equal(before, weights(one))


@pytest.mark.parametrize("activations", ["recompute", "offload", "recompute 0, offload 1", "recompute 1-1"])
def test_activations_change_no_gradient(activations: str) -> None:
    plain, other = trainer(), trainer()
    other.model.set_activations(MemoryConfig(activations=activations).block_activations(2))  # type: ignore[operator]
    for one in (plain, other):
        one.accumulate(tiny_batch(0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters, other.parameters, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(activations="drop"), "'drop' is neither keep, recompute or offload"),
        (dict(activations="recompute 5-2"), "'recompute 5-2' is neither"),
        (dict(activations="recompute 0-1, "), "'' is neither"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MemoryConfig(**settings)


def test_blocks_that_are_not_there() -> None:
    with pytest.raises(UserError, match="there is no block 4: this model has blocks 0 to 3"):
        MemoryConfig(activations="recompute 2-4").block_activations(4)


def test_fused_backward_is_for_one_process() -> None:
    with pytest.raises(UserError, match="memory.fused_backward on 2 processes"):
        check_processes(MemoryConfig(fused_backward=True), 2)
