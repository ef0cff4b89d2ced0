"""How many ranks share a video, and the memory that it takes."""

from typing import Any

import pytest

from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.sequence.planner import GIB, ParallelDims
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.requests import Request
from stdit.pipelines.workload import SamplingWorkload
from tests.pipelines.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


def workload(pipe: Any, count: int, cfg: int = 1, batch_size: int = 1, **settings: Any) -> SamplingWorkload:
    own = Request("a", 0).settings.resolved(pipe.config) | settings
    config = SampleConfig(parallel=SamplingParallelConfig(sp="auto", cfg=cfg), batch_size=batch_size)
    return SamplingWorkload(pipe, [own] * count, config)


@pytest.mark.parametrize(
    "count, processes, cfg, frames, expected",
    [
        (8, 4, 1, 4, 1),
        (4, 4, 1, 4, 1),
        (3, 4, 1, 4, 2),  # two pairs of ranks
        (1, 4, 1, 4, 4),
        (1, 4, 2, 4, 2),
        (1, 4, 1, 1, 4),  # of one frame each rank has some patches
    ],
)
def test_videos_are_spread_over_ranks_first(
    pipe: Any, count: int, processes: int, cfg: int, frames: int, expected: int
) -> None:
    choice = workload(pipe, count, cfg, num_frames=frames).choose_sp(processes, GIB)
    assert (choice.sp, choice.fits) == (expected, True)


def test_little_memory_makes_more_ranks_share(pipe: Any) -> None:
    many = workload(pipe, 8, num_frames=4, height=64, width=64)
    needed = {sp: many.memory(ParallelDims(4, sp)) for sp in (1, 2, 4)}
    assert needed[1] > needed[2] > needed[4]
    for memory, expected in ((needed[1], (1, True)), (needed[2], (2, True)), (needed[4] - 1, (4, False))):
        assert many.choose_sp(4, memory)[::2] == expected


def test_guidance_on_two_ranks_takes_less_memory(pipe: Any) -> None:
    split = ParallelDims(2, 1)
    together, apart = (workload(pipe, 2, cfg, height=64, width=64).memory(split) for cfg in (1, 2))
    assert together > apart
    assert workload(pipe, 2, guidance_scale=1.0, height=64, width=64).memory(split) == apart


def test_the_grid_is_described_and_idle_ranks_give_a_warning(pipe: Any) -> None:
    small = workload(pipe, 1, num_frames=2)
    assert small.grid_lines(1, 4) == []
    grid, line = small.grid_lines(4, 4)
    assert grid == "parallel.grid of 2x8x8: [4, 1], balance 0.67; blocks 2 S in time, 2 T in space"
    assert (
        "[4, 1], but a video of 2x8x8 has 2 frames of 4 tokens: in some blocks, ranks 2, 3 of each 4" in line
    )
    assert "fewer ranks or longer or larger videos" in line
    small.config.parallel.latency_us = 0.01
    assert len(small.grid_lines(4, 4)) == 1, "exchanges that take no time let another grid be faster"
    _, line = workload(pipe, 2, num_frames=2, height=2, width=2).grid_lines(4, 4)
    assert "a video of 2x2x2 has 2 frames of 1 token: in some blocks, ranks" in line and "will idle" in line
