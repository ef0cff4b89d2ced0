"""The planner's estimates against counted traffic and memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, count_on_meta, parameter_count
from stdit.models.stdit import STDiT
from stdit.parallel.config import ParallelConfig
from stdit.parallel.processes.mesh import build_mesh
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.planner import (
    ParallelDims,
    Workload,
    activation_bytes,
    balance,
    choose_sp,
    divisors,
    estimate_traffic,
    format_gib,
)
from stdit.parallel.sequence.sharding import block_shard_axes
from tests.parallel.ranks import run_on_ranks
from tests.parallel.sequence.test_sharding import BASE, make_batch, make_model, run

GIB = 2**30
F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "even": ((4, 4, 8), 4, "alternate", False, F32, 1),
    "odd": ((5, 5, 6), 3, "paired", True, F32, 1),
    "odd, patches of two frames": ((5, 6, 6), 3, "alternate", True, BF16, 1),
    "in chunks": ((5, 5, 6), 2, "alternate", False, F32, 3),
    "one frame": ((1, 6, 6), 2, "alternate", True, F32, 1),
    "fewer frames than ranks": ((3, 5, 7), 3, "paired", False, BF16, 1),
    "fewer frames than ranks, in chunks": ((2, 6, 6), 5, "paired", False, F32, 2),
    "fewer patches than ranks": ((3, 2, 2), 2, "alternate", False, BF16, 1),
}
"""Latent frames, rows and columns; clips; order of blocks; checkpointing; dtype; chunks."""


def check_traffic(_: Group) -> None:
    """Run a step of each case with sp 2 and 4, in micro-batches of two clips."""
    for sp in (2, 4):
        mesh = build_mesh(ParallelConfig(sp=sp), torch.device("cpu"))
        assert mesh.sp.size == sp
        for name, (shape, clips, order, checkpointing, dtype, chunks) in CASES.items():
            patch = (2, 2, 2) if "two frames" in name else (1, 2, 2)
            settings = {"depth": 3, "block_order": order, "patch_size": patch}
            model = make_model(F32, **settings)
            if checkpointing:
                model.enable_gradient_checkpointing()
            group = replace(mesh.sp, chunks=chunks)
            group.traffic.clear()
            for rows, _ in mesh.micro_batches(clips, 2):
                batch = make_batch(*shape, len(mesh.sample_range(clips)[rows]), False, F32)
                with torch.autocast("cpu", BF16, enabled=dtype == BF16):
                    run(model, model.token_sharding(group, *shape), *batch)
            load = batch_load(
                STDiTConfig(**{**BASE, **settings}),
                shape,
                clips,
                element_size=dtype.itemsize,
                micro_batch_size=2,
            )
            expected = estimate_traffic(load, ParallelDims(mesh.world_size, sp, chunks), mesh.rank)
            what = f"{name}, {sp} ranks, rank {mesh.rank}"
            assert group.traffic.bytes["all_to_all"] == expected.forward + expected.backward, what
            assert group.traffic.calls["all_to_all"] == expected.calls, what


def test_traffic_is_that_counted() -> None:
    run_on_ranks(4, check_traffic)


LOAD = Workload(
    clips=4, frames=6, patches=10, width=8, shard_axes=tuple(block_shard_axes(2, "alternate")), out_features=5
)


def test_bytes_by_hand() -> None:
    """3 ranks have 2 frames each, and 4, 3 and 3 patches; three switches carry the width 8, the last 5 outputs."""
    to_space, to_time = 2 * 2 * (10 - 4), 2 * 4 * (6 - 2)  # values of 2 clips, per unit of width
    found = estimate_traffic(LOAD, ParallelDims(6, 3), rank=0)
    assert found.forward == 4 * (2 * 8 * to_space + (8 + 5) * to_time)
    assert found.backward == 4 * (2 * 8 * to_time + (8 + 5) * to_space)
    assert found.calls == 2 * 4
    assert estimate_traffic(LOAD, ParallelDims(6, 1), rank=5) == (0, 0, 0)


@pytest.mark.parametrize(
    "load, split, expected",
    [
        (LOAD, ParallelDims(1, 1), 1.0),
        (LOAD, ParallelDims(2, 2), 1.0),
        (LOAD, ParallelDims(8, 2), 1.0),
        (LOAD, ParallelDims(3, 1), 4 / 6),  # 2, 1 and 1 clips
        (replace(LOAD, frames=1, patches=12), ParallelDims(4, 4), (1 / 4 + 1 / 4) / (1 + 1 / 4)),
        (replace(LOAD, frames=5, patches=12), ParallelDims(4, 4), 2 * (5 / 4) / (2 + 5 / 4)),
    ],
)
def test_balance_is_the_mean_over_the_busiest(load: Workload, split: ParallelDims, expected: float) -> None:
    assert balance(load, split) == pytest.approx(expected)


@pytest.mark.parametrize(
    "size, expected",
    [(GIB // 1000, "0.001"), (12.34 * GIB, "12.3"), (99.99 * GIB, "100"), (12345 * GIB, "12,345")],
)
def test_format_gib(size: int, expected: str) -> None:
    assert format_gib(size) == expected


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(7) == [1, 7]


def test_choose_sp_takes_the_smallest_that_fits_or_the_one_that_needs_least() -> None:
    needs = {1: 40 * GIB, 2: 21 * GIB, 4: 12 * GIB, 8: 12 * GIB}
    assert choose_sp(needs, 80 * GIB)[::2] == (1, True)
    assert choose_sp(needs, 24 * GIB)[::2] == (2, True)
    fitting, least = choose_sp(needs, 12 * GIB), choose_sp(needs, 11 * GIB)
    assert str(fitting) == "4, the smallest of 1, 2, 4, 8 that fits: about 12 of 12 GiB per process"
    assert str(least) == "4, which needs least, and none of 1, 2, 4, 8 fits: about 12 of 11 GiB per process"
    assert (fitting.fits, least.fits) == (True, False)


@pytest.mark.parametrize("settings", [{}, {"cross_attention": "spatial", "mlp_conv": True}, {"depth": 1}])
def test_weights_are_counted_without_building_the_model(settings: dict[str, Any]) -> None:
    settings = {**BASE, **settings}
    assert count_on_meta(STDiTConfig(**settings)) == parameter_count(STDiT(**settings))


@pytest.mark.parametrize("settings", [{"depth": 10**6}, {"hidden_size": 10**7}])
def test_weights_of_absurd_models_are_counted(settings: dict[str, Any]) -> None:
    assert count_on_meta(STDiTConfig(**settings)) > 10**13


def test_weights_beyond_counting() -> None:
    with pytest.raises(UserError, match="model.mlp_ratio = 1e"):
        count_on_meta(STDiTConfig(mlp_ratio=1e13))


@pytest.mark.parametrize(
    "kept, dtype", [("keep", F32), ("keep", BF16), ("recompute", F32), ("recompute", BF16), ("nothing", F32)]
)
def test_activation_bytes_are_close_to_those_counted(kept: Any, dtype: torch.dtype) -> None:
    """Compare with the peak bytes of a pass of 2 clips; under autocast, autograd saves the rounded weights, too."""
    settings = {"depth": 4, "hidden_size": 32}
    model = make_model(F32, **settings)
    if kept == "recompute":
        model.enable_gradient_checkpointing()
    x, _, t, _, condition = make_batch(4, 32, 32, 2, False, F32)
    if kept == "nothing":
        del condition["drop_caption"]  # the tracker fails on a slice of a weight without gradients
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker, torch.set_grad_enabled(kept != "nothing"):
        with torch.autocast("cpu", BF16, enabled=dtype == BF16, cache_enabled=False):
            output = model(x, 1000 * t, **condition).sample
        if kept != "nothing":
            output.float().square().mean().backward()
    counted = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[x.device].items()}
    config = STDiTConfig(**{**BASE, **settings})
    load = batch_load(config, x.shape[2:], len(x), element_size=dtype.itemsize, saved=kept)
    rounded = 2 * parameter_count(model) if (kept, dtype) == ("keep", BF16) else 0
    found = counted["_MemRefType.ACT"] + counted["_MemRefType.TEMP"] - rounded
    assert activation_bytes(load, ParallelDims(1, 1)) == pytest.approx(found, rel=0.1)


def test_activations_by_hand() -> None:
    """The first of 3 ranks has 2 of 6 frames of 10 patches, and 4 patches of 6 frames."""
    split, width = ParallelDims(6, 3), 2 * 8  # of 2 clips
    in_all_blocks, in_a_block = 2 * (2 * 10 + 4 * 6), 4 * 6
    assert activation_bytes(LOAD, split) == width * 112 * in_all_blocks
    checkpointing, sampling = replace(LOAD, saved="recompute"), replace(LOAD, saved="nothing")
    assert activation_bytes(checkpointing, split) == width * (4 * in_all_blocks + 168 * in_a_block)
    assert activation_bytes(sampling, split) == width * 48 * in_a_block
    assert activation_bytes(replace(LOAD, micro_batch_size=1), split) * 2 == activation_bytes(LOAD, split)
