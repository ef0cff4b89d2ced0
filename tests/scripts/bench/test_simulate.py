"""The simulation of a cluster: its times by hand, its command, and how it compares with measured steps."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import simulate
from scripts.bench.simulate import Flops, Machine, averaging_seconds
from stdit.errors import UserError
from stdit.parallel.sequence.layouts import Grid
from stdit.parallel.sequence.planner import ParallelDims, Workload

MACHINE = Machine(tflops=100, node=8, node_gbit=800, network_gbit=80, latency_us=10)
LOAD = Workload(
    clips=1,
    frames=16,
    patches=64,
    width=8,
    kinds="ST",
    head_size=4,
    columns=8,
    out_features=4,
    element_size=2,
)
FLOPS = Flops({"S": 4 * 10**12, "T": 2 * 10**12}, 10**12)


def dims(grid: Grid) -> ParallelDims:
    return ParallelDims(grid.size, grid.size, grid=grid)


def test_times_by_hand() -> None:
    """Of 8 ranks each has 2 frames of 64 patches, and sends 7/8 of its tokens, and then of the 4 outputs."""
    found = simulate.simulate(LOAD, FLOPS, dims(Grid(8, 1)), MACHINE)
    assert found.compute == pytest.approx(7e12 / 8 / 100e12)
    sent = 2 * 2 * 64 * 7 / 8 * (8 + 4) * 2  # forward and backward, in bytes
    assert found.exchange == pytest.approx(8 * sent / 800e9 + 4 * 10e-6)


def test_what_goes_to_other_nodes_takes_longer() -> None:
    grid = Grid(16, 1)
    found = simulate.simulate(LOAD, FLOPS, dims(grid), MACHINE).exchange
    sent = 2 * 64 * 15 / 16 * (8 + 4) * 2
    assert found == pytest.approx(8 * sent * 8 / 15 / 80e9 + 4 * 10e-6), "8 of 15 others are elsewhere"
    alone = simulate.simulate(LOAD, FLOPS, dims(grid), replace(MACHINE, node=16)).exchange
    assert alone == pytest.approx(8 * sent / 800e9 + 4 * 10e-6)


def test_checkpointing_and_uneven_shares_take_longer() -> None:
    plain = simulate.simulate(LOAD, FLOPS, dims(Grid(8, 1)), MACHINE).compute
    again = simulate.simulate(replace(LOAD, saved="recompute"), FLOPS, dims(Grid(8, 1)), MACHINE).compute
    assert again == pytest.approx(plain + 2e12 / 8 / 100e12)
    uneven = simulate.simulate(replace(LOAD, frames=9), FLOPS, dims(Grid(8, 1)), MACHINE).compute
    assert uneven == pytest.approx((5e12 * 2 / 9 + 2e12 / 8) / 100e12)


def test_averaging_by_hand() -> None:
    bits = 32 * 10**6
    assert averaging_seconds(10**6, 1, MACHINE) == 0
    assert averaging_seconds(10**6, 8, MACHINE) == pytest.approx(2 * bits * 7 / 8 / 800e9)
    assert averaging_seconds(10**6, 16, MACHINE) == pytest.approx(
        2 * bits * 7 / 8 / 800e9 + 2 * bits / 8 * 1 / 2 / 80e9
    )


def command(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate.py", *argv])
    simulate.main()


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    size = ["--frames", "5", "--height", "8", "--width", "8", "--gpus", "8", "16", "--sp", "8"]
    command(monkeypatch, "--model", "tiny", *size, "--all_grids", "--output", str(output))
    figures = json.loads(output.read_text())["figures"]
    assert [(one["gpus"], one["dp"]) for one in figures] == [(8, 1)] * 4 + [(16, 2)] * 4
    assert [one["grid"] for one in figures[:4]] == ["[8, 1]", "[4, 2]", "[2, 4]", "[1, 8]"]
    assert sum(bool(one["chosen"]) for one in figures) == 2
    for one in figures:
        assert one["step"] == pytest.approx(one["compute"] + one["exchange"] + one["gradients"])
        assert 0 < one["of_ideal"] < 1 and one["megabytes"] > 0
    assert "of ideal" in capsys.readouterr().out


def test_predictions_are_compared_with_measured_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exchanges that take no time a step takes as long as its computation, from which the speed is taken."""
    model = {"hidden_size": 16, "num_heads": 2, "depth": 1}
    settings: dict[str, Any] = {"model": model, "blocks": "S T", "height": 4, "width": 4, "batch": 1}
    rows = [
        {"method": method, "frames": 4, "seconds": 0.5, "compute_seconds": 0.5}
        for method in ("dsp", "ulysses", "grid 2x1", "grid auto")
    ]
    result = {
        "ranks": 2,
        "link": "1gbit",
        "mbit_per_s": 1e9,
        "latency_us": 1e-6,
        "rows": rows,
        "speeds": [1, 1, 4],
    }
    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps(
            {"settings": {**settings, "checkpointing": False, "precision": "fp32"}, "results": [result]}
        )
    )
    command(monkeypatch, "--check", str(path))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["1gbit", "2", "dsp", "500.0", "500.0", "1.00"],
        ["1gbit", "2", "grid", "2x1", "500.0", "500.0", "1.00"],
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "XXL"], "--model XXL: there is no such preset: choose one of 3B-2, B"),
        (["--tflops", "0"], "--tflops 0: must be positive"),
        (["--network_gbit", "nan"], "--network_gbit nan: must be positive"),
        (["--latency_us", "-1"], "--latency_us -1: must be 0 or more"),
        (["--gpus", "8", "12", "--sp", "5"], "--sp 5: divides none of --gpus 8 12"),
        (["--check", "missing.json"], "--check missing.json: cannot be read .No such file"),
    ],
)
def test_bad_flags_are_errors(monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(monkeypatch, *argv)
