"""How many ranks share a video, and the model calls, bytes and memory that it takes."""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.codecs import CodecConfig, build_codec
from stdit.codecs.config import DecodingConfig, Precision
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.mesh import build_mesh
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.planner import GIB, ParallelDims
from stdit.pipelines.config import SampleConfig, VideoSettings
from stdit.pipelines.output_cache import NEEDED, History
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.precision import cast
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import sample_videos
from stdit.pipelines.segments import Segments
from stdit.pipelines.workload import SamplingWorkload
from tests.codecs.tiny import save_tiny_vae
from tests.parallel.ranks import run_on_ranks
from tests.pipelines.tiny import tiny_model, tiny_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


def workload(pipe: Any, count: int, cfg: int = 1, batch_size: int = 1, **settings: Any) -> SamplingWorkload:
    requests = [Request("a", seed, VideoSettings(**settings)) for seed in range(count)]
    config = SampleConfig(parallel=SamplingParallelConfig(sp="auto", cfg=cfg), batch_size=batch_size)
    return SamplingWorkload(pipe, requests, config)


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
    needed = {sp: many.total(ParallelDims(4, sp)) for sp in (1, 2, 4)}
    assert needed[1] > needed[2] > needed[4]
    for memory, expected in ((needed[1], (1, True)), (needed[2], (2, True)), (needed[4] - 1, (4, False))):
        assert many.choose_sp(4, memory)[::2] == expected


def test_guidance_on_two_ranks_takes_less_memory(pipe: Any) -> None:
    split = ParallelDims(2, 1)
    together, apart = (workload(pipe, 2, cfg, height=64, width=64).total(split) for cfg in (1, 2))
    assert together > apart
    assert workload(pipe, 2, guidance_scale=1.0, height=64, width=64).total(split) == apart


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


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "heun": {"solver": "heun"},
    "heun, linear": {"solver": "heun", "guidance_schedule": "linear"},
    "dpm++, oscillating": {"solver": "dpm++", "guidance_schedule": "oscillating"},
    "unipc, interval": {
        "solver": "unipc",
        "guidance_schedule": "interval",
        "guidance_interval": (0.3, 0.8),
        "num_inference_steps": 7,
    },
    "an interval without steps": {"guidance_schedule": "interval", "guidance_interval": (0.001, 0.002)},
    "rescaled": {"guidance_rescale": 0.5, "guidance_scale": 4.0},
    "refined": {"refine_pairs": 2},
    "refined, guidance there alone": {"refine_pairs": 2, "guidance_scale": 1.0},
    "refined, guidance before alone": {"refine_pairs": 2, "refine_guidance_scale": 1.0},
    "broadcast": {"pab": [2, 2, 3], "num_inference_steps": 8, "pab_timesteps": (100.0, 930.0)},
    "broadcast, oscillating, refined": {
        "pab": [2, 3, 3, 2],
        "num_inference_steps": 12,
        "pab_timesteps": (50.0, 950.0),
        "guidance_schedule": "oscillating",
        "refine_pairs": 1,
    },
    "a cache that skips nothing": {"cache": 1e-9, "num_inference_steps": 6, "guidance_rescale": 0.5},
}


class Counted:
    """Counts the rows that a model gets."""

    def __init__(self, pipe: STDiTPipeline) -> None:
        self.rows: list[int] = []
        self.hook = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: self.rows.append(len(kwargs["hidden_states"])), with_kwargs=True
        )

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_those_counted(pipe: Any, name: str) -> None:
    stated = workload(pipe, 2, batch_size=2, **CALLS[name])
    with Counted(pipe) as rows:
        found = list(sample_videos(pipe, stated.requests))
    _, most = stated.schedule(stated.videos[0]).calls()
    assert [one.calls for one in found] == [most, most] and sum(rows) == 2 * most.run


@pytest.mark.parametrize("name", ["plain", "heun", "refined"])
def test_calls_of_segments_are_those_counted(pipe: Any, name: str) -> None:
    request = Request("a", 0, VideoSettings(**CALLS[name]), segments=Segments(3))
    stated = SamplingWorkload(pipe, [request], SampleConfig())
    (videos,) = stated.videos
    (found,) = sample_videos(pipe, [request])
    assert found.calls.run == videos.segments.count * stated.schedule(videos).calls()[1].run


@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_a_model_that_takes_the_scale_is_called_once_a_step(tmp_path: Path, scale: float) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.transformer = tiny_model(guidance_range=(1.0, 4.0))
    stated = workload(pipe, 1, guidance_scale=scale, refine_pairs=1, num_inference_steps=5)
    with Counted(pipe) as rows:
        (found,) = sample_videos(pipe, stated.requests)
    assert stated.schedule(stated.videos[0]).calls()[1].run == found.calls.run == sum(rows) == 5 + 2


@pytest.mark.parametrize("threshold", [0.02, 0.1, None])
@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "interval", "oscillating"])
def test_calls_with_a_cache_are_within_bounds(
    pipe: Any, threshold: float | None, solver: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if extrapolation is always exact, as far as it is known: then the bound is reached."""
    if threshold is None:
        monkeypatch.setattr(History, "error", lambda self, _: torch.where(self.count < NEEDED, torch.inf, 0))
    settings = {"cache": threshold or 0.5, "solver": solver, "guidance_schedule": schedule, "refine_pairs": 1}
    if schedule == "interval":
        settings["guidance_interval"] = (0.2, 0.7)
    stated = workload(pipe, 1, num_inference_steps=16, **settings)
    least, most = stated.schedule(stated.videos[0]).calls()
    (found,) = sample_videos(pipe, stated.requests)
    assert least.run <= found.calls.run <= most.run
    assert found.calls.run + found.calls.skipped == most.run == least.run + least.skipped
    if threshold is None:
        assert found.calls == least


def test_a_cache_begins_anew_when_the_scale_changes_that_a_model_takes(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.transformer = tiny_model(guidance_range=(1.0, 4.0))
    settings = {"guidance_schedule": "interval", "guidance_interval": (0.3, 0.7), "cache": 0.9}
    stated = workload(pipe, 1, num_inference_steps=20, **settings)
    least, _ = stated.schedule(stated.videos[0]).calls()
    (found,) = sample_videos(pipe, stated.requests)
    assert 3 + 3 + 3 < least.run <= found.calls.run


def count_bytes(
    group: Group, grid: tuple[int, int], cfg: int, folder: Path, model: dict[str, Any], dtype: Precision
) -> None:
    parallel = SamplingParallelConfig(grid=grid, cfg=cfg)
    mesh = build_mesh(parallel, torch.device("cpu"))
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.transformer = tiny_model(pipe.codec.channels, **model)
    cast(pipe.transformer, dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.codec.enable_tiling("auto", GIB)  # as sample.py does; ranks need not agree on a size
    for name in CALLS:
        for segments in (1, 2):
            size = {"num_frames": 5, "height": 12, "width": 8}
            requests = [
                Request("a", seed, VideoSettings(**{**size, **CALLS[name]}), segments=Segments(segments))
                for seed in range(2)
            ]
            stated = SamplingWorkload(pipe, requests, SampleConfig(parallel=parallel))
            mesh.sp.traffic.clear()
            mesh.cfg.traffic.clear()
            found = list(sample_videos(pipe, requests, mesh=mesh))
            (videos,) = stated.videos
            split = stated.split(mesh.world_size, mesh.sp.size)
            sent = stated.sent(videos, split, mesh.sp.rank)
            counted = mesh.sp.traffic.bytes.total() + mesh.cfg.traffic.bytes.total()
            assert counted == 2 * sent.total, f"{name}, {segments} segments, {grid}, cfg {cfg}"
            if mesh.is_main:
                _, most = stated.schedule(videos).calls()
                assert {one.calls.run for one in found} == {segments * most.run}
    request = Request("a", 0, VideoSettings(**CALLS["broadcast"], guidance_scale=1.0))
    stated = SamplingWorkload(pipe, [request], SampleConfig(parallel=parallel))
    (videos,) = stated.videos
    sent = stated.sent(videos, stated.split(mesh.world_size, mesh.sp.size), mesh.sp.rank)
    mesh.sp.traffic.clear()
    totals = [0]

    def after_step(*_: Any) -> dict[str, torch.Tensor]:
        totals.append(mesh.sp.traffic.bytes.total())
        return {}

    generator = torch.Generator().manual_seed(0)
    pipe("a", generator=generator, callback_on_step_end=after_step, **asdict(request.settings))
    assert [after - before for before, after in pairwise(totals)] == sent.steps

    tiled = SampleConfig(parallel=parallel, codec=DecodingConfig((32, 128, 128)))
    size = {"num_frames": 34, "height": 136, "width": 8}
    request = Request("a", 0, VideoSettings(**size, num_inference_steps=1))
    stated = SamplingWorkload(pipe, [request], tiled)
    (videos,) = stated.videos
    split = stated.split(mesh.world_size, mesh.sp.size)
    assert not stated.tiles(videos, split).whole
    pipe.codec.enable_tiling(tiled.codec.tile, GIB)
    mesh.sp.traffic.clear()
    mesh.cfg.traffic.clear()
    list(sample_videos(pipe, [request], mesh=mesh))
    counted = mesh.sp.traffic.bytes.total() + mesh.cfg.traffic.bytes.total()
    if mesh.cfg.rank == 0:
        assert counted == stated.sent(videos, split, mesh.sp.rank).total, "in tiles"


@pytest.mark.parametrize(
    ("grid", "cfg", "codec", "model", "dtype"),
    [
        ((2, 1), 1, "pixel", {}, "fp32"),
        ((1, 1), 2, "pixel", {}, "fp32"),
        ((1, 2), 1, "AutoencoderKLWan", {}, "bf16"),
        pytest.param((2, 1), 2, "AutoencoderKLWan", {}, "bf16", marks=pytest.mark.slow),
        pytest.param((2, 2), 1, "AutoencoderKLWan", {"mlp_conv": True}, "fp32", marks=pytest.mark.slow),
        pytest.param((3, 1), 1, "pixel", {"blocks": "STJL"}, "fp32", marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_counted(
    tmp_path: Path, grid: tuple[int, int], cfg: int, codec: str, model: dict[str, Any], dtype: Precision
) -> None:
    vae = None
    if codec != "pixel":
        vae = build_codec(CodecConfig(name=codec, path=str(save_tiny_vae(codec, tmp_path / "vae"))))
    tiny_pipeline(tmp_path, vae).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(grid[0] * grid[1] * cfg, count_bytes, grid, cfg, tmp_path / "pipeline", model, dtype)
