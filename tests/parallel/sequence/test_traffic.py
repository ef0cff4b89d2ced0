"""What a rank sends, by the formulas, against what is counted at the collectives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load
from stdit.models.stdit import STDiT
from stdit.parallel.config import ParallelConfig
from stdit.parallel.processes.mesh import build_mesh
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import Grid
from stdit.parallel.sequence.planner import ParallelDims, Saved, Workload
from stdit.parallel.sequence.stages import grids
from stdit.parallel.sequence.traffic import estimate_traffic
from tests.parallel.ranks import run_on_ranks
from tests.parallel.sequence.test_sharding import BASE, make_batch, make_model, run

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((5, 5, 6), (4, 4, 8), (1, 6, 6), (2, 2, 2))
"""Latent frames, rows and columns: odd, even, an image, fewer patches than ranks."""
MODELS: dict[str, dict[str, Any]] = {
    "alternate": {},
    "paired": {"blocks": "S T T S"},
    "patches of two frames": {"patch_size": (2, 2, 2)},
    "joint": {"blocks": "S T J"},
    "linear": {"blocks": "S L"},
    "linear, causal": {"blocks": "S T L J", "depth": 2, "linear_causal": True},
    "convolution": {"blocks": "T S L", "mlp_conv": True},
    "joint, convolution": {"blocks": "S J T", "mlp_conv": True},
}
WAYS = [(False, F32, 1), (True, F32, 1), (False, BF16, 3), (True, BF16, 1)]
"""Checkpointing, precision, chunks."""
CASES = [(SHAPES[0], way) for way in WAYS] + list(zip(SHAPES[1:], WAYS[1:], strict=True))


def check_steps(whole: Group, names: tuple[str, ...]) -> None:
    for name in names:
        model = make_model(F32, **MODELS[name])
        for grid in grids(whole.size):
            for shape, way in CASES:
                check_step(model, MODELS[name], replace(whole, grid=grid), shape, *way)


def check_step(
    model: STDiT,
    settings: dict[str, Any],
    whole: Group,
    shape: tuple[int, int, int],
    checkpointing: bool,
    dtype: torch.dtype,
    chunks: int,
) -> None:
    group = replace(whole, chunks=chunks)
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    group.traffic.clear()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        run(model, model.token_sharding(group, *shape, 3), *make_batch(*shape, 3, False, F32))
    saved: Saved = "recompute" if checkpointing else "keep"
    config = STDiTConfig(**{**BASE, **settings})
    load = batch_load(config, shape, clips=3, element_size=dtype.itemsize, saved=saved)
    dims = ParallelDims(group.size, group.size, chunks, group.grid)
    expected = estimate_traffic(load, dims, group.rank)
    what = f"{settings}, {shape}, {group.grid}, {saved}, {dtype}, {chunks} chunks, rank {group.rank}"
    assert group.traffic.bytes.total() == expected.forward + expected.backward, what
    assert group.traffic.calls.total() == expected.calls, what


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 6))])
def test_traffic_is_that_counted(ranks: int) -> None:
    run_on_ranks(ranks, check_steps, tuple(MODELS))


def test_traffic_of_four_ranks_is_that_counted() -> None:
    run_on_ranks(4, check_steps, ("linear, causal", "joint, convolution"))


def check_parts_of_a_batch(_: Group) -> None:
    """Two halves of the batch, in micro-batches of two clips."""
    mesh = build_mesh(ParallelConfig(sp=2), torch.device("cpu"))
    model, shape, clips = make_model(F32), (5, 5, 6), 5
    for rows, _ in mesh.micro_batches(clips, 2):
        batch = make_batch(*shape, len(mesh.sample_range(clips)[rows]), False, F32)
        run(model, model.token_sharding(mesh.sp, *shape, len(batch[0])), *batch)
    load = batch_load(STDiTConfig(**BASE), shape, clips, micro_batch_size=2)
    dims = ParallelDims(4, 2, speeds=mesh.sp.speeds)
    expected = estimate_traffic(load, dims, mesh.rank)
    assert mesh.sp.traffic.bytes.total() == expected.forward + expected.backward
    assert mesh.sp.traffic.calls.total() == expected.calls


def test_traffic_of_parts_of_a_batch() -> None:
    run_on_ranks(4, check_parts_of_a_batch)


LOAD = Workload(clips=4, frames=6, patches=10, width=8, kinds="STST", head_size=4, columns=5, out_features=5)


def test_bytes_by_hand() -> None:
    """3 ranks have 2 frames each, and 4, 3 and 3 patches; three switches carry the width 8, the last 5 outputs."""
    to_space, to_time = 2 * 2 * (10 - 4), 2 * 4 * (6 - 2)  # values of 2 clips, per unit of width
    found = estimate_traffic(LOAD, ParallelDims(6, 3, grid=Grid(3, 1)), rank=0)
    assert found.forward == 4 * (2 * 8 * to_space + (8 + 5) * to_time)
    assert found.backward == 4 * (2 * 8 * to_time + (8 + 5) * to_space)
    assert found.calls == 2 * 4
    assert estimate_traffic(LOAD, ParallelDims(6, 1), rank=5) == (0, 0, 0, 0)


def sent(load: Workload, grid: Grid) -> int:
    """Return the bytes of all ranks, forward and backward."""
    dims = ParallelDims(grid.size, grid.size, grid=grid)
    return sum(sum(estimate_traffic(load, dims, rank)[:2]) for rank in range(grid.size))


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_sends_as_much_for_any_length(causal: bool) -> None:
    """Of blocks in one layout; causal in time: at an equal number of frames."""
    found = set()
    for patches in (16, 256, 4096):
        load = replace(LOAD, frames=64, patches=patches, kinds="L", out_features=0, causal=causal)
        found.add(sent(load, Grid(4, 1)))
    assert len(found) == 1 and found != {0}


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("kinds", ["ST", "STTS", "SSST", "STJ", "SJ", "J"])
def test_no_grid_sends_more_than_usp_alone(ranks: int, kinds: str) -> None:
    """USP of all tokens sends q, k, v and the output of each block for heads: 4 M/N (N-1)/N forward, and back."""
    for frames in (5, 8, 16):
        load = replace(LOAD, clips=1, frames=frames, patches=240, width=64, head_size=8, kinds=kinds * 2)
        load = replace(load, out_features=0)  # of the blocks alone
        usp = 4 * 2 * len(load.kinds) * frames * 240 * 64 * 4 * (ranks - 1) // ranks
        for grid in grids(ranks):
            assert sent(load, grid) <= usp, grid
