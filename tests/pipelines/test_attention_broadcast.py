"""Pyramid attention broadcast: which attention is computed when, and that ranks agree about it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.diffusion.scheduler import RectifiedFlow, set_flow_timesteps
from stdit.errors import UserError
from stdit.models.broadcast import AttentionBroadcast, Ranges
from stdit.models.stdit import STDiT
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.sequence.group import Group
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.pipeline import STDiTPipeline
from tests.parallel.ranks import run_on_ranks
from tests.pipelines.tiny import tiny_model, tiny_pipeline

STEPS = 10
PAB = {
    "pab": [2, 3, 4],
    "pab_timesteps": (250.0, 850.0),
}  # used again in the steps with timestep 800, ..., 300
INSIDE = range(2, 8)
MODELS: dict[str, dict[str, Any]] = {
    "S T": {},
    "S T T S": {"blocks": "S T T S", "depth": 4},
    "T first, J": {"blocks": "T S J T", "depth": 4},
    "convolution": {"mlp_conv": True},
    "all cross-attend": {"cross_attention": "all"},
}


def pipeline(folder: Path, **settings: Any) -> STDiTPipeline:
    pipe = tiny_pipeline(folder)
    pipe.transformer = tiny_model(**settings)
    return pipe


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> STDiTPipeline:
    return pipeline(tmp_path_factory.mktemp("tiny"), cross_attention="all")


def sample(pipe: STDiTPipeline, **settings: Any) -> torch.Tensor:
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "shift": 1.0, **settings}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    found = pipe(["a red circle", "a blue square"], generator=generators, **settings).frames
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def computed_parts(model: STDiT) -> Iterator[list[Counter[str]]]:
    """Yield what is computed in each call of a model: attention of each kind of block, and MLPs."""
    calls: list[Counter[str]] = []
    hooks = [model.register_forward_pre_hook(lambda *_: calls.append(Counter()))]
    for block in model.blocks:
        for name in ("attn", "cross_attn", "mlp"):
            if (part := getattr(block, name)) is not None:
                label = block.kind if name == "attn" else name
                hooks.append(
                    part.register_forward_pre_hook(lambda *_, label=label: calls[-1].update([label]))
                )
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("ranges", [[2, 3, 4], [1, 4, 2], [2, 1, 3, 2]])
def test_attention_is_computed_in_every_nth_step_between_the_timesteps(
    ranges: list[int], pipe: STDiTPipeline
) -> None:
    with computed_parts(pipe.transformer) as calls:
        sample(pipe, **PAB | {"pab": ranges})
    assert len(calls) == STEPS
    for name, blocks, every in zip(("S", "T", "cross_attn", "mlp"), (2, 2, 4, 4), [*ranges, 1], strict=False):
        for step, found in enumerate(calls):
            again = step in INSIDE and step % every > 0
            assert found[name] == (0 if again else blocks), (step, name)


def test_ranges_of_one_step_change_nothing(pipe: STDiTPipeline) -> None:
    whole = sample(pipe)
    assert torch.equal(sample(pipe, **PAB | {"pab": [1, 1, 1, 1]}), whole)
    errors = [
        float((sample(pipe, **PAB | {"pab": ranges}) - whole).norm() / whole.norm())
        for ranges in ([1, 1, 2], [2, 3, 4], [2, 3, 4, 4])
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < 0.5


def test_attention_of_steps_without_guidance_is_not_used_longer(pipe: STDiTPipeline) -> None:
    """Every second step has guidance, so attention of the step before is that of other rows."""
    for ranges, expected in (([2, 2, 2], [2] * 10), ([3, 3, 3], [2, 2, 0, 2, 2, 0, 2, 2, 2, 2])):
        with computed_parts(pipe.transformer) as calls:
            sample(pipe, **PAB | {"pab": ranges}, guidance_schedule="oscillating")
        assert [found["S"] for found in calls] == expected


def test_only_what_is_used_again_is_kept(pipe: STDiTPipeline) -> None:
    broadcast = AttentionBroadcast(Ranges(2, 1, 3), (0, 1000))
    for kind, kept in (("S", {"attention", "cross"}), ("T", {"cross"}), ("J", {"cross"})):
        output = broadcast.call(kind).output(0, kind)
        for part in ("attention", "cross", "mlp"):
            output(part, lambda: torch.zeros(1))
        assert output.outputs.keys() == kept  # type: ignore[attr-defined]


def test_the_refinement_computes_all(pipe: STDiTPipeline) -> None:
    with computed_parts(pipe.transformer) as calls:
        sample(pipe, **PAB, refine_pairs=2, refine_level=0.5)
    assert len(calls) == STEPS + 4 and all(found["S"] == found["T"] == 2 for found in calls[STEPS:])


def test_a_callback_that_changes_latents_begins_anew(pipe: STDiTPipeline) -> None:
    with computed_parts(pipe.transformer) as calls:
        sample(
            pipe,
            **PAB,
            callback_on_step_end=lambda pipe, step, timestep, given: {"latents": 2 * given["latents"]},
        )
    assert all(found["S"] == 2 for found in calls)


@pytest.mark.slow
def test_a_compiled_model_uses_attention_again(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path)
    expected = sample(pipe, **PAB)
    pipe.transformer.compile_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(sample(pipe, **PAB), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pab": [2, 4]}, r"pab = \[2, 4\]: must be for how many steps"),
        ({"pab": [0, 4, 6]}, r"pab = \[0, 4, 6\]: must be"),
        ({"pab": [2, 4, -6]}, "each at least 1"),
        ({"pab": [2, 4, 11]}, r"pab = \[2, 4, 11\]: would never be refreshed in 10 steps"),
        (
            PAB | {"pab": [2, 4, 7]},
            "7 steps would never be refreshed in the 6 steps of this video .* at most 6",
        ),
        (
            {"pab": [2, 3, 4], "pab_timesteps": (930, 450)},
            r"pab_timesteps = \[930, 450\]: must be two rising",
        ),
        ({"pab_timesteps": (450, 930)}, "pab_timesteps = .* would have no effect: pab is not set"),
        ({"pab": [2, 3, 4], "cache": "slow"}, "pab = .* and cache = slow: videos that skip steps cannot"),
        ({"pab": 3}, "pab = 3: has a wrong type|pab = 3: must be for how many steps"),
        ({"pab": [2, 4, float("inf")]}, "must be for how many steps"),
        ({"pab": [2, 3, 4], "pab_timesteps": 5.0}, "pab_timesteps = 5.0: must be two rising"),
        (
            PAB | {"conditions": [FrameCondition(torch.zeros(3, 1, 8, 8), 0, strength=0.5)]},
            "pab and condition .*: attention of a frame without noise",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, pipe: STDiTPipeline) -> None:
    with pytest.raises(UserError, match=message):
        sample(pipe, **settings)


def compare(group: Group, grid: tuple[int, int], cfg: int, folder: Path) -> None:
    mesh = build_mesh(SamplingParallelConfig(grid=grid, cfg=cfg), torch.device("cpu"))
    for name, settings in MODELS.items():
        pipe = STDiTPipeline.from_pretrained(folder, transformer=tiny_model(**settings))
        pipe.set_progress_bar_config(disable=True)
        pipe.share(Mesh())
        alone = sample(pipe, **PAB, num_frames=5)
        for chunks in (1, 3):
            pipe.share(replace(mesh, sp=replace(mesh.sp, chunks=chunks)))
            found = sample(pipe, **PAB, num_frames=5)
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5, msg=f"{name}, {chunks} chunks")


@pytest.mark.parametrize(
    ("grid", "cfg"),
    [
        ((2, 2), 1),
        pytest.param((2, 1), 1, marks=pytest.mark.slow),
        pytest.param((2, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(tmp_path: Path, grid: tuple[int, int], cfg: int) -> None:
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(grid[0] * grid[1] * cfg, compare, grid, cfg, tmp_path / "pipeline")


def count_traffic(group: Group) -> None:
    """XL/2's blocks on its latents of 51 frames in 480p, but for the width and the number of patches."""
    model = tiny_model(depth=28, hidden_size=16, num_heads=2, patch_size=(1, 2, 2))
    scheduler = RectifiedFlow()
    set_flow_timesteps(scheduler, 30, 4.84)
    latents, states = torch.randn(1, 3, 15, 8, 8), torch.randn(1, 2, 16)
    size = {"fps": torch.ones(1), "height": torch.full((1,), 8.0), "width": torch.full((1,), 8.0)}
    sharding = model.token_sharding(group, *latents.shape[2:])
    sent: dict[bool, list[int]] = {}
    for uses_again in (False, True):
        broadcast = AttentionBroadcast(Ranges(2, 4, 6), (450, 930))
        sent[uses_again] = []
        for timestep in scheduler.timesteps.tolist():
            broadcast.begin_step(timestep)
            group.traffic.clear()
            with torch.no_grad():
                model(
                    sharding.split(latents, 2),
                    torch.full((1,), timestep),
                    states,
                    sharding=sharding,
                    broadcast=broadcast.call("cond") if uses_again else None,
                    **size,
                )
            sent[uses_again].append(sum(group.traffic.bytes.values()))
    share = sum(sent[True]) / sum(sent[False])
    assert 0.5 < share <= 0.57, share
    assert sum(size == 0 for size in sent[True]) == 13


def test_temporal_attention_that_is_used_again_sends_nothing() -> None:
    run_on_ranks(2, count_traffic)
