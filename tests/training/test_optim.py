from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stdit.errors import UserError
from stdit.training.config import OptimizerConfig
from stdit.training.matmul import matmul_precision
from stdit.training.optim import (
    NEWTON_SCHULZ,
    Muon,
    build_optimizer,
    learning_rate_factor,
    orthogonalise,
    split_parameters,
)
from tests.training.tiny import tiny_model


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 24), (2, 24, 8), (1, 8, 12)])
def test_orthogonalise_follows_the_formula(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = NEWTON_SCHULZ
    X = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    X = X.mT if shape[1] > shape[2] else X
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    expected = X.mT if shape[1] > shape[2] else X
    torch.testing.assert_close(orthogonalise(matrices), expected, atol=2e-5, rtol=0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(4, 16, 64)))
    assert 0.6 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 512, 128), (4, 64, 256)])
def test_orthogonalise_computes_in_float32_whatever_the_precision_of_a_step(
    precision: str, shape: tuple[int, ...]
) -> None:
    seen = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.__name__ or "matmul" in func.__name__:
                seen.add((func.__name__, torch.get_float32_matmul_precision()))
            return func(*args, **kwargs or {})

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(4, shape[1], 4, generator=generator),
        torch.randn(4, 4, shape[2], generator=generator),
    )
    matrices = left @ right + 0.1 * torch.randn(
        shape, generator=generator
    )  # as gradients are: low rank and noise
    expected = orthogonalise(matrices)
    with matmul_precision(precision), Watch():
        found = orthogonalise(matrices)
        assert torch.get_float32_matmul_precision() == precision
    assert {name for name, _ in seen} == {"matmul", "baddbmm"}
    assert {used for _, used in seen} == {"highest"}
    assert torch.equal(found, expected)
    assert torch.linalg.svdvals(found).max() < 1.3


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_muon_updates_as_torch_does(scale: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(value) for value in torch.randn(shape).repeat(2, 1, 1))
    settings: dict[str, Any] = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    first = Muon([ours], **settings, scale=scale)
    second = torch.optim.Muon([theirs], **settings, adjust_lr_fn=scale)
    start = ours.detach().clone()
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        first.step()
        second.step()
    difference = (ours - theirs).norm() / (ours - start).norm()
    assert difference < 0.02  # torch iterates in bfloat16


def test_muon_treats_stacked_matrices_one_by_one() -> None:
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(24, 8))
    apart = [nn.Parameter(part.clone()) for part in stacked.detach().chunk(3)]
    first, second = Muon([{"params": [stacked], "parts": 3}]), Muon(apart)
    for _ in range(2):
        stacked.grad = torch.randn(24, 8)
        for parameter, gradient in zip(apart, stacked.grad.chunk(3), strict=True):
            parameter.grad = gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(stacked, torch.cat(list(apart)))


def test_muon_moves_few_matrices_at_once_as_it_moves_many(monkeypatch: pytest.MonkeyPatch) -> None:
    models = tiny_model(), tiny_model()
    for model, at_once in zip(models, (2**24, 1), strict=True):
        monkeypatch.setattr("stdit.training.optim.AT_ONCE", at_once)
        give_gradients(model, 0)
        build_optimizer(model, OptimizerConfig(name="muon")).step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = tiny_model()
    matrices, others = split_parameters(model)
    assert {name.split(".", 2)[2] for name in matrices} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight",
        "cross_attn.q_linear.weight", "cross_attn.kv_linear.weight", "cross_attn.proj.weight",
    }  # fmt: skip
    assert matrices["blocks.0.attn.qkv.weight"] == 3
    assert matrices["blocks.1.cross_attn.kv_linear.weight"] == 2
    assert matrices["blocks.0.mlp.fc1.weight"] == 1
    assert {"x_embedder.proj.weight", "t_block.1.weight", "blocks.0.scale_shift_table"} <= set(others)
    assert len(matrices) + len(others) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip_is_bit_exact(name: str) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.01)  # type: ignore[arg-type]
    straight, resumed = tiny_model(), tiny_model()
    first, before = build_optimizer(straight, config), build_optimizer(resumed, config)
    for step in range(4):
        give_gradients(straight, step)
        first.step()
    for step in range(2):
        give_gradients(resumed, step)
        before.step()
    saved: dict[str, Tensor] = {key: value.clone() for key, value in before.state_dict().items()}
    after = build_optimizer(resumed, config)
    give_gradients(resumed, 9)
    after.set_factor(0.0)
    after.step()  # has a state of its own, which goes
    after.load_state_dict(saved)
    after.set_factor(1.0)
    for step in range(2, 4):
        give_gradients(resumed, step)
        after.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert len({key.rpartition(".")[0] for key in saved}) == len(list(resumed.parameters()))


def test_step_scales_every_rate() -> None:
    optimizer = build_optimizer(tiny_model(), OptimizerConfig(name="muon", lr=0.1, muon_lr=0.2))
    optimizer.set_factor(0.5)
    assert {g["lr"] for o in optimizer.optimizers for g in o.param_groups} == {0.05, 0.1}


def test_learning_rate_rises_stays_and_falls() -> None:
    def rates(**settings: object) -> list[float]:
        config = OptimizerConfig(**settings)  # type: ignore[arg-type]
        return [round(learning_rate_factor(config, step, 10), 4) for step in range(10)]

    assert rates() == [1] * 10
    assert rates(warmup_steps=3)[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert rates(schedule="linear", decay_share=0.5) == [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates(schedule="linear", decay_share=0.5, final_share=0.5)[-2:] == [0.7, 0.6]
    cosine = rates(schedule="cosine")
    assert cosine == sorted(cosine, reverse=True) and cosine[5] == 0.5


@pytest.mark.parametrize(
    "settings", [{"lr": 0}, {"muon_lr": -1}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}, {"decay_share": 2}]
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"optimizer.{next(iter(settings))}"):
        OptimizerConfig(**settings)  # type: ignore[arg-type]
