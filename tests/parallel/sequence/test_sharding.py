"""The sharded model against one process: output, loss and every gradient, on weights without zeros."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective, frame_weights
from stdit.models.blocks import TokenGrid
from stdit.models.embeddings import rotary_angles
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.collectives import _PipelinedExchange
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import Grid, even_sizes
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.parallel.sequence.stages import Speeds, grids
from tests.parallel.ranks import run_on_ranks

BASE: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "caption_channels": 6,
    "model_max_length": 5,
    "patch_size": (1, 2, 2),
}
CASES: dict[str, dict[str, Any]] = {
    "alternate": {"frames": 5},
    "paired": {"frames": 5, "blocks": "S T T S"},
    "one clip": {"frames": 7, "batch": 1},
    "image": {"frames": 1},
    "image, one clip": {"frames": 1, "batch": 1},
    "fewer frames than ranks": {"frames": 2, "blocks": "S T T S"},
    "fewer patches than ranks": {"frames": 3, "rows": 2, "columns": 2},
    "conditioning frames": {"frames": 5, "conditioning": True},
    "conditioning frames, paired, one clip": {
        "frames": 5,
        "conditioning": True,
        "blocks": "S T T S",
        "batch": 1,
    },
    "checkpointing": {"frames": 5, "checkpointing": True},
    "checkpointing, paired": {"frames": 4, "checkpointing": True, "blocks": "S T T S"},
    "patches of two frames": {"frames": 5, "patch_size": (2, 2, 2)},
    "joint": {"frames": 5, "blocks": "S T J"},
    "joint alone, one clip, more ranks than heads": {"frames": 3, "blocks": "J", "depth": 1, "batch": 1},
    "linear, conditioning frames": {"frames": 5, "blocks": "S L", "conditioning": True},
    "linear, causal": {"frames": 4, "blocks": "T L J", "linear_causal": True},
    "linear, causal, fewer frames than ranks": {
        "frames": 2,
        "blocks": "L S",
        "linear_causal": True,
        "depth": 1,
    },
    "joint and linear, image": {"frames": 1, "blocks": "J L", "depth": 2, "mlp_conv": True},
    "joint and linear, fewer patches than ranks": {
        "frames": 3,
        "rows": 2,
        "columns": 2,
        "blocks": "S T J L",
        "depth": 2,
        "mlp_conv": True,
    },
    "joint and linear, all options": {
        "frames": 4,
        "blocks": "S T J L",
        "depth": 2,
        "mlp_conv": True,
        "frame_positions": True,
        "pooled_text": True,
        "cross_attention": "spatial",
        "gate_init": 0.5,
        "checkpointing": True,
    },
    "convolution over many rows": {
        "frames": 2,
        "rows": 8,
        "columns": 4,
        "blocks": "S",
        "depth": 1,
        "mlp_conv": True,
    },
    "every option": {
        "frames": 5,
        "mlp_conv": True,
        "frame_positions": True,
        "pooled_text": True,
        "cross_attention": "spatial",
        "gate_init": 0.5,
    },
}


def make_model(dtype: torch.dtype, **settings: Any) -> STDiT:
    torch.manual_seed(0)
    model = STDiT(**{**BASE, **settings}).to(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert (parameter != 0).all()
    return model


def make_batch(
    frames: int, rows: int, columns: int, batch: int, conditioning: bool, dtype: torch.dtype
) -> Any:
    generator = torch.Generator().manual_seed(1)
    x, noise = (
        torch.randn(batch, 4, frames, rows, columns, generator=generator, dtype=dtype) for _ in range(2)
    )
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[0, 3:] = False
    t = torch.linspace(0.2, 0.9, batch, dtype=dtype)[:, None]  # [B 1]
    first = torch.zeros(batch, frames, dtype=torch.bool)
    if conditioning:
        first[:, 0] = True
        t = t * ~first  # [B T]
    condition = {
        "encoder_hidden_states": torch.randn(batch, 5, 6, generator=generator, dtype=dtype),
        "encoder_attention_mask": mask,
        "fps": torch.full((batch,), 24.0, dtype=dtype),
        "height": torch.full((batch,), 8.0 * rows, dtype=dtype),
        "width": torch.full((batch,), 8.0 * columns, dtype=dtype),
        "drop_caption": torch.arange(batch) % 2 == 0,
    }
    return x, noise, t, frame_weights(first), condition


def run(
    model: STDiT, sharding: TokenSharding, x: Tensor, noise: Tensor, t: Tensor, weight: Tensor, condition: Any
) -> tuple[Tensor, Tensor]:
    """Return the output of this rank's frames, and its part of the loss times the number of ranks; sets gradients."""
    flow = FlowObjective(FlowConfig())
    x_t = flow.add_noise(x, noise, t)
    x, noise, x_t = (sharding.split(value, dim=2) for value in (x, noise, x_t))
    output = model(x_t, 1000 * t, **condition, sharding=sharding).sample
    weight, level = sharding.split(weight, dim=1), sharding.split(t, dim=1)
    loss = flow.loss(output[:, :4], x - noise, x_t, level, weight).mean() * sharding.grid.time
    loss.backward()
    return output.detach(), loss.detach()


def compare(groups: Sequence[Group], name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare a model on each of some groups with the same on one rank."""
    case = {"rows": 5, "columns": 6, "batch": 3, "conditioning": False, "checkpointing": False, **CASES[name]}
    sizes = [case.pop(key) for key in ("frames", "rows", "columns", "batch", "conditioning")]
    checkpointing = case.pop("checkpointing")
    model, batch = make_model(dtype, **case), make_batch(*sizes, dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    expected = run_alone(model, batch)
    for group in groups:
        model.zero_grad()
        what = f"{name} on {group.grid}, {group.chunks} chunks"
        compare_with(expected, model, model.token_sharding(group, *sizes[:3]), batch, tolerance, what)


def run_alone(model: STDiT, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output on one rank, and the loss and all gradients by name."""
    sizes = batch[0].shape[2:]
    output, loss = run(model, model.token_sharding(Group(), *sizes), *batch)
    gradients = {}
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0 or has_one_key(key, model, *sizes), key
        gradients[key] = parameter.grad
    return output, {"loss": loss, **gradients}


def compare_with(
    expected: tuple[Tensor, dict[str, Tensor]],
    model: STDiT,
    sharding: TokenSharding,
    batch: Any,
    tolerance: float,
    what: str,
) -> None:
    """Compare a model on a group with what `run_alone` returned for the same weights."""
    output, part = run(model, sharding, *batch)
    close(output, sharding.split(expected[0], dim=2), tolerance, f"{what}: output")
    found = average({"loss": part, **{key: value.grad for key, value in model.named_parameters()}})
    for key, value in expected[1].items():
        close(found[key], value, tolerance, f"{what}: {key}")


def has_one_key(key: str, model: STDiT, frames: int, rows: int, columns: int) -> bool:
    """Return whether a weight norms queries or keys in attention over one token, which has no gradient."""
    if "_norm" not in key:
        return False
    kind = model.blocks[int(key.split(".")[1])].kind
    tokens = {"S": rows * columns // 4, "T": frames}.get(kind, frames * rows * columns // 4)
    return tokens == 1


def average(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the means over all ranks, summed at once."""
    flat = torch.cat([value.flatten() for value in values.values()])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([value.numel() for value in values.values()])
    return {key: mean.view_as(values[key]) for key, mean in zip(values, means, strict=True)}


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Compare, relative to the largest expected value."""
    assert found.shape == expected.shape, what
    if expected.numel():
        gap = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
        assert gap <= tolerance, f"{what} differs by {gap:.1e}, relative to its largest value"


def compare_all(group: Group, names: Sequence[str]) -> None:
    """Compare on every grid of the ranks, also in chunks and in float32."""
    on_grids = [replace(group, grid=grid) for grid in grids(group.size)]
    for name in names:
        compare([*on_grids, replace(on_grids[0], chunks=3)], name, torch.float64, 1e-12)
        compare(on_grids[-1:], name, torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_equals_one_process(ranks: int) -> None:
    run_on_ranks(ranks, compare_all, tuple(CASES))


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_case_equals_one_process_on_two_or_three_ranks(ranks: int) -> None:
    run_on_ranks(ranks, compare_all, tuple(CASES)[ranks - 2 :: 2])


def test_grids_of_four_ranks_equal_one_process() -> None:
    run_on_ranks(
        4, compare_all, ("joint and linear, all options", "linear, causal", "fewer frames than ranks")
    )


def check_a_grid_for_each_size(group: Group) -> None:
    """Add up the gradients of a video and of an image, for which other grids are fastest."""
    group = replace(group, speeds=Speeds(flops=10, call=0))
    model = make_model(torch.float64)
    batches = [make_batch(frames, 6, 6, 2, False, torch.float64) for frames in (4, 1)]
    shardings = [model.token_sharding(group, *batch[0].shape[2:], 2) for batch in batches]
    assert [sharding.grid for sharding in shardings] == [Grid(2, 1), Grid(1, 2)]
    for batch in batches:
        run(model, model.token_sharding(Group(), *batch[0].shape[2:]), *batch)
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    for sharding, batch in zip(shardings, batches, strict=True):
        run(model, sharding, *batch)
    for key, value in average({key: p.grad for key, p in model.named_parameters()}).items():
        close(value, expected[key], 1e-12, key)


def test_sizes_with_different_grids_add_up() -> None:
    run_on_ranks(2, check_a_grid_for_each_size)


@pytest.mark.parametrize(
    "total, ranks, expected", [(5, 2, [3, 2]), (4, 4, [1] * 4), (2, 3, [1, 1, 0]), (7, 1, [7])]
)
def test_sizes_differ_by_at_most_one(total: int, ranks: int, expected: list[int]) -> None:
    assert even_sizes(total, ranks) == expected


def test_one_rank_alone_copies_nothing() -> None:
    x = torch.randn(2, 3, 4, 5)
    sharding = TokenSharding(Group(), 3, 4)
    assert sharding.switch(x, "time", "space") is x
    assert sharding.switch(x, "space", "time") is x
    assert sharding.split(x, dim=1) is x
    assert sharding.per_frame(x, "time").data_ptr() == x.data_ptr()


def count_traffic(group: Group, blocks: str, checkpointing: bool) -> None:
    """Count bytes and calls where all sizes divide, so that the formula is exact (arXiv:2403.10266, table 3).

    Overlapping chunks need more calls, and send the same bytes.
    """
    frames, rows, columns, batch, dim, pairs = 12, 4, 12, 2, 16, 4
    model = make_model(torch.float32, depth=pairs, blocks=blocks)
    if checkpointing:
        model.enable_gradient_checkpointing()
    group.traffic.clear()
    sharding = model.token_sharding(group, frames, rows, columns)
    run(model, sharding, *make_batch(frames, rows, columns, batch, False, torch.float32))

    tokens = batch * frames * (rows // 2) * (columns // 2)
    M, output = 4 * tokens * dim, 4 * tokens * model.out_channels * 2 * 2  # bytes
    # S T ends with space sharded: the last of its two switches per pair carries the output instead.
    switches, ends = (2 * pairs - 1, 1) if blocks == "S T" else (pairs, 0)
    sent = (switches * M + ends * output) * (group.size - 1) // group.size**2
    assert group.traffic.bytes["all_to_all"] == 2 * sent, "forward and backward"
    assert group.traffic.calls["all_to_all"] == 2 * (switches + ends) * group.chunks


def count_all_traffic(group: Group) -> None:
    for blocks in ("S T", "S T T S"):
        for checkpointing in (False, True):
            for chunks in (1, 3):
                here = replace(group, chunks=chunks, grid=Grid(group.size, 1))
                count_traffic(here, blocks, checkpointing)


def test_traffic_is_that_of_the_formula() -> None:
    run_on_ranks(2, count_all_traffic)


def check_gradient_order(group: Group) -> None:
    original, asked = _PipelinedExchange.wait_gradient, []

    def wait_gradient(exchange: _PipelinedExchange, index: int) -> Tensor:
        asked.append((index, next(iter(exchange.gradients))))
        return original(exchange, index)

    model = make_model(torch.float32, depth=1)
    sharding = model.token_sharding(replace(group, chunks=3, grid=Grid(2, 1)), 6, 6, 6)
    with patch.object(_PipelinedExchange, "wait_gradient", wait_gradient):
        run(model, sharding, *make_batch(6, 6, 6, 1, False, torch.float32))
    assert len(asked) == 2 * 3
    assert all(index == first_sent for index, first_sent in asked), asked


def test_gradients_of_chunks_are_sent_in_the_order_in_which_they_are_used() -> None:
    run_on_ranks(2, check_gradient_order)


def compile_a_switch_and_a_block(group: Group) -> None:
    model = make_model(torch.float32).eval()
    block, sharding = model.blocks[1], TokenSharding(group, 5, 7)
    grid = TokenGrid(7, rotary_angles(5, 8, torch.device("cpu")))
    torch.manual_seed(1)
    inputs = [
        torch.randn(shape)
        for shape in ((2, sharding.own("time").frames.size, 7, 16), (2, 5, 16), (2, 1, 6, 16))
    ]

    def switch_and_run(x: Tensor, y: Tensor, modulation: Tensor) -> Tensor:
        return block(sharding.switch(x, "time", "space"), y, None, modulation, grid)

    compiled = torch.compile(switch_and_run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (switch_and_run, compiled):
        x = inputs[0].clone().requires_grad_()
        output = function(x, *inputs[1:])
        output.sum().backward()
        results.append((output.detach(), x.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_switch_and_block_compile_to_one_graph() -> None:
    run_on_ranks(2, compile_a_switch_and_a_block)


def check_gather(group: Group) -> None:
    """Check the adjoint of gather: a rank's gradient is the sum over ranks of the gradients of its part."""
    frames, patch_frames = 7, 2
    sharding = TokenSharding(group, 4, 5, patch_frames)
    whole = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(
        group.size, 2, frames, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    mine = sharding.split(whole, dim=1).clone().requires_grad_()
    gathered = sharding.gather(mine, 1, frames)
    torch.testing.assert_close(gathered, whole)
    (gathered * weights[group.rank]).sum().backward()
    torch.testing.assert_close(mine.grad, sharding.split(weights.sum(0), dim=1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_and_its_adjoint(ranks: int) -> None:
    run_on_ranks(ranks, check_gather)
