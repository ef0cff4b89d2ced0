"""Distribution matching: a student that makes videos in a few steps, and the score of its videos."""

import copy

import pytest
import torch
from torch import Tensor

from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.group import ONE_RANK
from stdit.training.config import OptimizerConfig
from stdit.training.few_steps import DistributionMatching, FewStepSampling, ScoreMatching
from stdit.training.trainer import Trainer
from tests.training.tiny import tiny_batch, tiny_model, tiny_teacher, tiny_trainer

SIZES = {"in_channels": 3, "patch_size": (1, 2, 2)}
SHAPE = (3, 2, 4, 4)


def model(seed: int = 0, **settings: object) -> STDiT:
    """Return a model in which no weight is zero."""
    found = tiny_model(**SIZES, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return found


def student(seed: int = 1) -> STDiT:
    return model(seed, guidance_range=(1.0, 4.0))


def few_step_trainer(
    one: STDiT,
    teacher: STDiT,
    steps: tuple[int, ...] = (1, 2),
    updates: int = 2,
    lr: float = 3e-3,
    conditioning: dict[str, float] | None = None,
) -> Trainer:
    """Return the trainer of a student, with that of its score, which begins as the student does."""
    flow = FlowObjective(FlowConfig(conditioning={"first": 0.5} if conditioning is None else conditioning))
    shared = {"teacher": tiny_teacher(teacher), "steps": steps, "student": one}
    optimizer = OptimizerConfig(name="adamw", lr=lr)
    of_score = ScoreMatching(flow, **shared)
    score = tiny_trainer(copy.deepcopy(one), optimizer, method=lambda _: of_score, ema=0.0)
    method = DistributionMatching(flow, **shared, score=score, updates=updates)
    return tiny_trainer(one, optimizer, method=lambda _: method)


def sampling(
    steps: tuple[int, ...], conditioning: dict[str, float] | None = None
) -> tuple[FewStepSampling, STDiT]:
    flow = FlowObjective(FlowConfig(conditioning=conditioning or {}))
    return FewStepSampling(flow, tiny_teacher(model()), steps), student()


@pytest.mark.parametrize("conditioning", [{}, {"first": 1.0}])
def test_a_video_is_made_by_euler_steps_from_noise(conditioning: dict[str, float]) -> None:
    method, one = sampling((3,), conditioning)
    batch, sharding = tiny_batch(0), one.token_sharding(ONE_RANK, *SHAPE[1:])
    lengths = set()
    for step in range(12):
        draws = method.draw(0, step, range(4), SHAPE, 4, 4)
        inputs = method.inputs(batch, draws, sharding)
        found = method.make_video(one, one, inputs, batch, draws)
        given = draws.condition_mask[:, None, :, None, None]
        x = torch.where(given, batch.latents, draws.start)
        levels = [*draws.levels.tolist(), 0.0]  # the last step goes all the way
        assert levels[0] == 1
        with torch.no_grad():
            for high, low in zip(levels, levels[1:], strict=False):
                t = high * (~draws.condition_mask).float() if conditioning else torch.full((4, 1), high)
                velocity = one(x, timestep=1000 * t, **inputs.rows, return_dict=False)[0][:, :3]
                x = torch.where(given, x, x + (high - low) * velocity)
        torch.testing.assert_close(found.detach(), x)
        assert given.any() == bool(conditioning)
        if conditioning:
            assert torch.equal(found[given.expand_as(found)], batch.latents[given.expand_as(found)])
        assert found.requires_grad
        lengths.add(len(draws.levels))
    assert lengths == {1, 2, 3}


def test_all_samples_of_a_step_take_the_same_steps_and_draws_do_not_depend_on_the_batch() -> None:
    method, _ = sampling((1, 2, 4))
    found = [method.draw(0, step, range(6), SHAPE, 4, 4) for step in range(40)]
    for step, draws in enumerate(found):
        part = method.draw(0, step, range(2, 4), SHAPE, 4, 4)
        assert torch.equal(part.levels, draws.levels) and torch.equal(part.start, draws.start[2:4])
        assert not torch.equal(draws.start, draws.noise)
    # One step, then two of which one or two are taken, then four.
    assert {tuple(draws.levels.tolist()) for draws in found} >= {(1.0,), (1.0, 0.5), (1.0, 0.75, 0.5, 0.25)}


def test_the_gradient_of_the_loss_is_the_direction_between_score_and_teacher() -> None:
    one, teacher = student(), model()
    trainer = few_step_trainer(one, teacher)
    method, batch = trainer.method, tiny_batch(0)
    assert isinstance(method, DistributionMatching)
    draws = method.draw(1, 0, range(4), SHAPE, 4, 4)
    sharding = one.token_sharding(ONE_RANK, *SHAPE[1:])
    inputs = method.inputs(batch, draws, sharding)
    x = method.make_video(one, one, inputs, batch, draws)
    with torch.no_grad():
        t = draws.t[:, None, :, None, None]
        x_t = (1 - t) * x + t * draws.noise
        real = x_t + t * method.teacher.velocity(inputs, x_t, draws.t)
        fake = x_t + t * inputs.velocity(method.score.model, x_t, draws.t)
        generated = (~draws.condition_mask).float()[:, None, :, None, None]
        size = (x - real).abs().mean((1, 3, 4), keepdim=True).clamp(min=1e-6)
        direction = generated * (fake - real) / size
        # Frames have equal weights, and values within a frame, too.
        expected = direction / generated.sum((1, 2, 3, 4), keepdim=True) / (SHAPE[0] * SHAPE[2] * SHAPE[3])
    (found,) = torch.autograd.grad(_losses_of(x, method, inputs, draws).sum(), x, retain_graph=True)
    torch.testing.assert_close(found, expected)
    assert draws.condition_mask.any() and not draws.condition_mask.all()
    whole = method.losses(one, batch, draws, sharding)
    whole.sum().backward()
    gradients = torch.autograd.grad(x, list(one.parameters()), expected, allow_unused=True)
    for weight, gradient in zip(one.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient)
    assert all(weight.grad is None for weight in method.score.model.parameters())


def _losses_of(x: Tensor, method: DistributionMatching, inputs, draws) -> Tensor:
    from stdit.diffusion.flow import frame_loss, frame_weights

    target = x.detach() - method.direction(inputs, x.detach(), draws)
    return frame_loss(x, target, frame_weights(draws.condition_mask)) / 2


@pytest.mark.parametrize("conditioning", [{}, {"first": 1.0}])
def test_the_score_learns_from_the_students_videos(conditioning: dict[str, float]) -> None:
    """Of the clips it sees conditioning frames alone; and it has no average, since it makes no videos."""
    one, losses = student(), []
    before = {name: weight.clone() for name, weight in one.named_parameters()}
    for factor in (1, 5):
        trainer = few_step_trainer(one, model(), updates=3, conditioning=conditioning)
        method, batch = trainer.method, tiny_batch(0)
        assert isinstance(method, DistributionMatching)
        weights = {name: weight.clone() for name, weight in method.score.model.named_parameters()}
        batch.latents.mul_(factor)
        losses.append(method.after_step(batch)["score_loss"])
        assert any(not torch.equal(w, weights[name]) for name, w in method.score.model.named_parameters())
        assert method.score.ema.average == {}
    assert (losses[0] == losses[1]) == (not conditioning)
    assert all(torch.equal(weight, before[name]) for name, weight in one.named_parameters())


def test_a_student_learns_the_distribution_of_its_teacher() -> None:
    """The teacher makes videos around one mean, the student begins around another one."""
    teacher, one = model(0), student(5)
    trainer = few_step_trainer(one, teacher, steps=(1, 2), updates=4, lr=1e-3, conditioning={})

    def videos(net: STDiT, steps: int, **more: Tensor) -> Tensor:
        batch = tiny_batch(99, size=64)
        x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(7))
        rows = {name: getattr(batch, name) for name in ("fps", "height", "width")}
        rows |= {
            "encoder_hidden_states": batch.text_states,
            "encoder_attention_mask": batch.text_mask,
            **more,
        }
        with torch.no_grad():
            for step in range(steps):
                t = torch.full((64, 1), 1 - step / steps)
                x = x + net(x, timestep=1000 * t, **rows, return_dict=False)[0][:, :3] / steps
        return x

    scale = {"guidance": torch.full((64,), 1.0)}
    expected = videos(teacher, 30).mean(0)

    def distance() -> float:
        return float((videos(one, 2, **scale).mean(0) - expected).norm())

    before = distance()
    for step in range(80):
        trainer.step(tiny_batch(step % 4, size=16))
    assert distance() < 0.5 * before
