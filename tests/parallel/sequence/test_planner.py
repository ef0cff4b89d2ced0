"""The planner's estimates against counted memory, and what it chooses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from stdit.errors import UserError
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, count_on_meta, parameter_count
from stdit.models.stdit import STDiT
from stdit.parallel.config import ParallelConfig
from stdit.parallel.processes.mesh import parallel_dims
from stdit.parallel.sequence.layouts import Grid
from stdit.parallel.sequence.planner import (
    ParallelDims,
    Workload,
    activation_bytes,
    balance,
    choose_sp,
    describe_grid,
    divisors,
    format_gib,
    idle_warning,
)
from stdit.parallel.sequence.stages import Speeds
from tests.parallel.sequence.test_sharding import BASE, make_batch, make_model

GIB = 2**30
F32, BF16 = torch.float32, torch.bfloat16
LOAD = Workload(clips=4, frames=6, patches=10, width=8, kinds="STST", head_size=4, columns=5, out_features=5)


DSP_OF_4 = ParallelDims(4, 4, grid=Grid(4, 1))


@pytest.mark.parametrize(
    "load, split, expected",
    [
        (LOAD, ParallelDims(1, 1), 1.0),
        (LOAD, ParallelDims(2, 2, grid=Grid(2, 1)), 1.0),
        (LOAD, ParallelDims(8, 2, grid=Grid(2, 1)), 1.0),
        (LOAD, ParallelDims(3, 1), 4 / 6),  # 2, 1 and 1 clips
        (replace(LOAD, frames=1, patches=12), DSP_OF_4, (1 / 4 + 1 / 4) / (1 + 1 / 4)),
        (replace(LOAD, frames=5, patches=12), DSP_OF_4, 2 * (5 / 4) / (2 + 5 / 4)),
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


FIVE_FRAMES = Workload(
    clips=16, frames=5, patches=405, width=1152, kinds="ST" * 28, head_size=72, columns=27, out_features=32
)
"""Clips of 17 frames at 240p in STDiT-XL/2, in which eight ranks outnumber the frames."""


def test_grids_keep_ranks_busy_that_outnumber_the_frames() -> None:
    """DSP alone leaves three of eight ranks without a frame in spatial blocks."""
    found = {
        time: balance(FIVE_FRAMES, ParallelDims(8, 8, grid=Grid(time, 8 // time)), "S") for time in (8, 2, 1)
    }
    assert found == pytest.approx({8: 5 / 8, 2: 2.5 / 3 * (405 / 4) / 102, 1: 405 / 8 / 51})
    chosen = ParallelDims(8, 8)
    assert chosen.grid_of(FIVE_FRAMES) == Grid(1, 8)
    assert describe_grid(FIVE_FRAMES, chosen) == "[1, 8], balance 0.99; blocks 28 S in grid, 28 T in space"
    few_heads = replace(FIVE_FRAMES, head_size=1152 // 6)
    line = describe_grid(few_heads, replace(chosen, grid=Grid(1, 8)))
    assert "blocks 28 S in grid (6 heads for 8 ranks: Ulysses in 4, and a ring of 2), 28 T in space" in line
    assert not idle_warning("a clip", FIVE_FRAMES, chosen)
    (warning,) = idle_warning("a clip", FIVE_FRAMES, replace(chosen, grid=Grid(8, 1)))
    assert "a clip has 5 frames of 405 tokens: in some blocks, ranks 5, 6, 7 of each 8 will idle" in warning
    assert "--parallel.grid '[1, 8]' or longer or larger videos waste less" in warning


def test_slow_links_make_the_planner_send_less() -> None:
    load = replace(FIVE_FRAMES, clips=1, frames=6, width=64, head_size=32)
    fast, slow = (ParallelDims(4, 4, speeds=Speeds(flops, 0)).grid_of(load) for flops in (10, 1e6))
    assert fast != Grid(4, 1) == slow
    latent = ParallelDims(4, 4, speeds=Speeds(10, 1e9))
    assert latent.grid_of(load) == Grid(4, 1), "which has the fewest exchanges"


def test_the_table_of_the_page() -> None:
    page = Path("stdit/parallel/README.md").read_text(encoding="utf-8")
    lines = page.split("| ranks N | frames T |")[1].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    assert len(rows) > 9
    for N, T, S, clips, heads, *expected in rows:
        load = replace(
            FIVE_FRAMES, clips=int(clips), frames=int(T), patches=int(S), head_size=1152 // int(heads)
        )
        found = []
        for gbit in (3200, 400, 25):
            config = ParallelConfig(link_gbit=gbit)
            found.append(str(parallel_dims(config, int(N), int(N), on_cpu=False).grid_of(load)))
        assert found == expected, (N, T, S, clips, heads)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cross_attention": "spatial", "mlp_conv": True},
        {"depth": 1},
        {"depth": 3, "blocks": "S T J"},
        {"depth": 4, "blocks": "L T L", "cross_attention": "spatial", "mlp_conv": True},
    ],
)
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
    "kept, dtype, blocks",
    [
        ("keep", F32, "S T"),
        ("keep", BF16, "S T"),
        ("recompute", F32, "S T"),
        ("recompute", BF16, "S T"),
        ("nothing", F32, "S T"),
        ("keep", F32, "S L"),
        ("keep", BF16, "S L"),
        ("keep", F32, "J"),
    ],
)
def test_activation_bytes_are_close_to_those_counted(kept: Any, dtype: torch.dtype, blocks: str) -> None:
    """Compare with the peak bytes of a pass of 2 clips; under autocast, autograd saves the rounded weights, too."""
    settings = {"depth": 4, "hidden_size": 32, "blocks": blocks}
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
    split, width = ParallelDims(6, 3, grid=Grid(3, 1)), 2 * 8  # of 2 clips
    in_all_blocks, in_a_block = 2 * (2 * 10 + 4 * 6), 4 * 6
    assert activation_bytes(LOAD, split) == width * 112 * in_all_blocks
    checkpointing, sampling = replace(LOAD, saved="recompute"), replace(LOAD, saved="nothing")
    assert activation_bytes(checkpointing, split) == width * (4 * in_all_blocks + 168 * in_a_block)
    assert activation_bytes(sampling, split) == width * 48 * in_a_block
    assert activation_bytes(replace(LOAD, micro_batch_size=1), split) * 2 == activation_bytes(LOAD, split)
