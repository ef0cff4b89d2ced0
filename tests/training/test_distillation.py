"""A student learns the guided velocity of its teacher, at the guidance scale that it gets."""

from functools import partial

import pytest
import torch
from torch import Tensor

from stdit.diffusion.config import FlowConfig
from stdit.diffusion.draws import draw_batch
from stdit.diffusion.flow import FlowObjective
from stdit.training.config import OptimizerConfig
from stdit.training.distillation import GuidanceDistillation
from stdit.training.flow_matching import StepInputs
from tests.pipelines.tiny import tiny_model
from tests.training.tiny import tiny_batch, tiny_teacher, tiny_trainer
from tests.training.tiny import tiny_model as trained_model


def test_the_target_is_the_guided_velocity() -> None:
    model, flow = tiny_model(), FlowObjective(FlowConfig())
    teacher = tiny_teacher(model)
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(3, 3, 4, 8, 8, generator=generator), torch.tensor([[0.2], [0.5], [0.9]])
    rows = {
        "encoder_hidden_states": torch.randn(3, 5, 16, generator=generator),
        "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5]),
        "drop_caption": torch.tensor([False, False, True]),
        **{name: torch.full((3,), 8.0) for name in ("fps", "height", "width")},
    }
    scales = torch.tensor([1.0, 3.0, 2.0])
    sharding = model.token_sharding(_alone(), 4, 8, 8)
    found = teacher.velocity(StepInputs(flow, sharding, {**rows, "guidance": scales}), x_t, t)

    def velocity(**changed: Tensor) -> Tensor:
        with torch.no_grad():
            output = model(x_t, timestep=1000 * t, **{**rows, **changed}).sample
            return flow.velocity(output, x_t, t)

    without = velocity(drop_caption=torch.ones(3, dtype=torch.bool))
    expected = without + scales[:, None, None, None, None] * (velocity() - without)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[0], velocity()[0])
    torch.testing.assert_close(found[2], without[2])
    assert not found.requires_grad and not any(weight.requires_grad for weight in model.parameters())


def test_scales_are_drawn_evenly_and_for_each_sample() -> None:
    flow = FlowObjective(FlowConfig(conditioning={"first": 0.5}))
    teacher = tiny_teacher(tiny_model())
    draws = draw_batch(flow, 0, 7, range(400), (1, 2, 2, 2), 8, 8)
    scales = teacher.scales(draws)
    assert scales.shape == (400,) and 1 <= scales.min() < 1.1 and 3.9 < scales.max() < 4
    assert scales.mean() == pytest.approx(2.5, abs=0.15)
    part = draw_batch(flow, 0, 7, range(100, 110), (1, 2, 2, 2), 8, 8)
    assert torch.equal(teacher.scales(part), scales[100:110])


def test_a_student_begins_as_its_teacher_and_comes_closer_to_its_guidance() -> None:
    sizes = {"in_channels": 3, "patch_size": (1, 2, 2)}
    teacher, student = trained_model(**sizes), trained_model(**sizes, guidance_range=(1.0, 4.0))
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    student.load_state_dict(teacher.state_dict(), strict=False)
    method = partial(GuidanceDistillation, teacher=tiny_teacher(teacher))
    trainer = tiny_trainer(student, OptimizerConfig(name="adamw", lr=3e-3), method=method)
    losses = [trainer.step(tiny_batch(step % 2, size=8))["loss"] for step in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def _alone():
    from stdit.parallel.sequence.group import ONE_RANK

    return ONE_RANK
