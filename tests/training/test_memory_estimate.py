"""The estimated memory of a run, and the choice of sp that follows."""

import json
from pathlib import Path

import pytest

from stdit.errors import UserError
from stdit.parallel.sequence.planner import GIB, ParallelDims
from stdit.parallel.sequence.stages import grids
from stdit.training.build import build_components, build_inputs
from stdit.training.config import parse_train
from stdit.training.experiment import experiment_key
from stdit.training.memory_estimate import MemoryEstimate
from stdit.training.report import report
from stdit.training.weight_memory import WeightCounts
from tests.training.tiny import tiny_settings


def state(estimate: MemoryEstimate, split: ParallelDims) -> int:
    return sum(estimate.counts.bytes(estimate.inputs.config, split.processes, False).values())


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    buckets = [dict(num_frames=4, height=8, width=8, fps=8, batch_size=2)]
    flags = {
        "data.buckets": json.dumps(buckets),
        "model.patch_size": "[1, 1, 1]",
        "trainer.micro_batch_size": "1",
    }
    return [*tiny_settings(tmp_path), *(part for key, value in flags.items() for part in (f"--{key}", value))]


def estimate_of(argv: list[str]) -> MemoryEstimate:
    return MemoryEstimate(build_inputs(parse_train(argv), dry_run=True))


@pytest.mark.parametrize("targets", ["attention", "blocks", "temporal"])
def test_an_adapter_of_rank_16_needs_little_for_gradients_and_optimizer(targets: str) -> None:
    """In STDiT-XL/2 at most 2% of what training all weights needs."""
    preset = ["--config", "models/XL-2", "--data.manifest", "clips.csv"]
    adapter = ["--init_from", "outputs/xl", "--lora.rank", "16", "--lora.targets", targets]
    found = []
    for config in (parse_train(preset), parse_train([*preset, *adapter])):
        held = WeightCounts.of(config).bytes(config, 1, False)
        found.append(held["gradients"] + held["optimizer"])
    assert 0 < found[1] <= 0.02 * found[0]


def test_memory_falls_with_sp(settings: list[str]) -> None:
    estimate = estimate_of(settings)
    one, two, four = (estimate.memory(ParallelDims(4, sp)) for sp in (1, 2, 4))
    assert one["activations"] == 2 * two["activations"] == 4 * four["activations"]
    adamw = estimate_of([*settings, "--optimizer.name", "adamw"])
    assert (
        state(adamw, ParallelDims(4, 1)) == 20 * estimate.counts.trained > state(estimate, ParallelDims(4, 1))
    )
    sharded = estimate_of([*settings, "--parallel.shard_parameters", "true"])
    whole = state(estimate, ParallelDims(1, 1))
    assert state(sharded, ParallelDims(4, 2)) == pytest.approx(whole / 4, abs=20)
    assert state(sharded, ParallelDims(1, 1)) == whole
    recomputing = estimate_of([*settings, "--memory.activations", "recompute"]).memory(ParallelDims(4, 1))
    assert recomputing["activations"] < one["activations"]
    bf16 = estimate_of([*settings, "--trainer.precision", "bf16"]).memory(ParallelDims(4, 1))
    assert bf16["activations"] - 2 * estimate.counts.trained < one["activations"]


def test_sharing_a_whole_share_of_the_batch_saves_nothing(settings: list[str]) -> None:
    """Twice as many ranks share twice as many clips."""
    estimate = estimate_of([*settings, "--trainer.micro_batch_size", "null"])
    assert estimate.total(ParallelDims(2, 1)) == estimate.total(ParallelDims(2, 2))


def test_choose_sp_follows_memory_and_batches(settings: list[str]) -> None:
    estimate = estimate_of(settings)
    assert estimate.valid_sp(4) == [2, 4], "a batch of 2 cannot be split into 4"
    two, four = (estimate.total(ParallelDims(4, sp)) for sp in (2, 4))
    assert two > four
    for memory, expected in (
        (two, (2, True)),
        (two - 1, (4, True)),
        (four, (4, True)),
        (four - 1, (4, False)),
    ):
        assert estimate.choose_sp(4, memory)[::2] == expected
    assert estimate.choose_sp(1, 0).sp == 1


def test_the_report_compares_values_of_sp(settings: list[str]) -> None:
    estimate = estimate_of(settings)
    memory = estimate.total(ParallelDims(2, 2))
    shown = report(estimate.inputs, 1, memory)
    assert "parallel.sp = auto, 2 processes: 2, the smallest of 1, 2 that fits" in shown
    assert "parallel.sp = auto, 8 processes: 4, the smallest of 4, 8 that fits" in shown
    rows = [line.split() for line in shown.splitlines() if line[:11].strip().isdigit()]
    assert [row[:3] for row in rows] == [
        [str(n) for n in (processes, sp, processes // sp)]
        for processes, degrees in ((1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (8, [1, 2, 4, 8]))
        for sp in degrees
        for _ in grids(sp)
    ]
    assert " ".join(rows[2][3:8]) == "[2, 1] 2 64 1.00"
    assert " ".join(rows[4][3:]) == "[1, 1] cannot split a batch of 2"
    assert [" ".join(row[3:5]) for row in rows[-4:]] == ["[8, 1]", "[4, 2]", "[2, 4]", "[1, 8]"]
    marked = [row[:2] for row in rows if row[-1] == "*"]
    assert marked == [row[:2] for row in rows if row[3:5] == ["[1,", row[1] + "]"] and row[1] != "1"]
    started = report(estimate.inputs, 2, memory)
    assert {line[:11].strip() for line in started.splitlines() if line[:11].strip().isdigit()} == {"2"}


@pytest.mark.parametrize(
    "flags, processes, message",
    [
        (["--parallel.grid", "[8, 1]"], 1, "in some blocks, ranks 4, 5, 6, 7 of each 8 will idle"),
        (["--parallel.grid", "[8, 1]"], 8, "fewer ranks or longer or larger videos waste less"),
        (["--parallel.sp", "8"], 8, "at 8 fps: ["),
        (["--parallel.sp", "2"], 1, "MiB a process, of 2 (an estimate)"),
        (["--parallel.sp", "auto"], 4, "MiB a process, of 4 (an estimate)"),
        (["--model.depth", "10000"], 1, "MiB (an estimate): weights"),
        (["--model.hidden_size", "10000000", "--model.num_heads", "4"], 1, "; more than the available 1,024"),
    ],
)
def test_lines_of_the_report(settings: list[str], flags: list[str], processes: int, message: str) -> None:
    assert message in report(estimate_of([*settings, *flags]).inputs, processes, GIB)


def test_the_report_refuses_what_training_would(settings: list[str]) -> None:
    with pytest.raises(UserError, match="parallel.sp = 3, but 4 processes were started"):
        report(estimate_of([*settings, "--parallel.sp", "3"]).inputs, 4, GIB)


@pytest.mark.parametrize(
    "flags", [["--model.depth", "100000"], ["--model.hidden_size", "10000000", "--model.num_heads", "4"]]
)
def test_a_model_beyond_memory_is_refused_before_it_is_built(settings: list[str], flags: list[str]) -> None:
    name, value = flags[0][2:], flags[1]
    with pytest.raises(
        UserError, match=f"{name} = {value} .*parameters, of which a process holds .*lower them"
    ):
        build_components(parse_train([*settings, *flags]), None, processes=1, memory=GIB)


def test_a_run_may_resume_with_another_sp(settings: list[str]) -> None:
    keys = [
        experiment_key(parse_train([*settings, *flags]))
        for flags in ([], ["--parallel.sp", "auto", "--parallel.memory_gib", "3"], ["--parallel.sp", "2"])
    ]
    assert keys[0] == keys[1] == keys[2]


def test_a_budget_of_tokens_sizes_the_batches(settings: list[str]) -> None:
    buckets = [dict(num_frames=4, height=8, width=8, fps=8, batch_size=1, max_tokens=1100)]
    estimate = estimate_of([*settings, "--data.buckets", json.dumps(buckets)])
    (bucket, load), *_ = estimate.loads.items()
    assert load.frames * load.patches == bucket.tokens == 256 and load.clips == bucket.batch_size == 4
    assert estimate.valid_sp(8) == [2, 4, 8]
    text = report(estimate.inputs, 1, 8 * GIB)
    assert "256 tokens a clip, 1,024 a step" in text
    header, row = text.splitlines()[2:4]
    assert header.split()[-2:] == ["tokens", "max_tokens"] and row.split()[-2:] == ["1024", "1100"]
