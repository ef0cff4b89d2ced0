"""``--fit GIB`` and ``--dry_run memory``: which ways to save memory a run has, and which is chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stdit.errors import UserError
from stdit.parallel.sequence.planner import GIB, ParallelDims
from stdit.training.build import build_inputs
from stdit.training.config import parse_train
from stdit.training.fit import MemoryChoice, fitted, memory_choices
from stdit.training.lineage import Resumed
from stdit.training.memory_estimate import MemoryEstimate
from stdit.training.report import report_of
from tests.training.tiny import tiny_settings

ADAMW = ("--optimizer.name", "adamw", "--model.hidden_size", "64", "--model.depth", "40")
BF16 = (*ADAMW, "--trainer.precision", "bf16")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return tiny_settings(tmp_path)


def inputs(argv: list[str]) -> Any:
    return build_inputs(parse_train(argv), dry_run=True)


def values(choices: list[MemoryChoice], name: str) -> set[Any]:
    return {choice.settings[name] for choice in choices}


def test_the_choices_of_a_run(settings: list[str]) -> None:
    choices = memory_choices(inputs([*settings, *BF16]), 1)
    assert len(choices) == 2 * 2 * 3 * 2
    assert str(choices[0]) == "all is kept in fp32" and choices[0].time == 1
    assert [choice.time for choice in choices] == sorted(choice.time for choice in choices)
    assert choices[0].size == max(choice.size for choice in choices)
    for choice in choices:
        estimate = MemoryEstimate(inputs([*settings, *BF16])).of(choice.config)
        assert estimate.total(ParallelDims(1, 1)) == choice.size
    muon = memory_choices(inputs(settings), 1)
    assert values(muon, "memory.weights") == values(muon, "memory.optimizer_state") == {"fp32"}
    two = memory_choices(inputs([*settings, *BF16, "--parallel.sp", "2"]), 2)
    assert values(two, "memory.fused_backward") == {False}
    given = memory_choices(inputs([*settings, *BF16, "--memory.optimizer_state", "4bit"]), 1)
    assert values(given, "memory.optimizer_state") == {"4bit"}
    sharded = memory_choices(inputs([*settings, *BF16, "--parallel.shard_parameters"]), 1)
    assert len(sharded) == 2, "activations alone"


def test_the_fastest_that_fits_is_chosen(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    choices = memory_choices(inputs([*settings, *BF16]), 1)
    for wanted in (choices[0].size, (choices[0].size + choices[-1].size) // 2, min(c.size for c in choices)):
        found = fitted(inputs([*settings, *BF16, "--fit", str(wanted / GIB)]), 1)
        expected = next(choice for choice in choices if choice.size <= wanted)
        assert found.config.memory == expected.config.memory and found.config.fit is None
        assert capsys.readouterr().out.endswith(f"times the time: {expected}\n")
    plain = inputs([*settings, *BF16])
    assert fitted(plain, 1) is plain


def test_sequence_parallel_runs_are_fitted_as_they_would_be_started(settings: list[str]) -> None:
    two = (
        min(choice.size for choice in memory_choices(inputs([*settings, *BF16, "--parallel.sp", "2"]), 2))
        / GIB
    )
    flags = [*settings, *BF16, "--fit", str(two + 1e-4), "--parallel.sp"]
    for processes, sp in ((1, "2"), (2, "2"), (2, "auto")):
        fitted(inputs([*flags, sp]), processes)
    with pytest.raises(UserError, match="parallel.sp = 2"):
        fitted(inputs([*flags, "2"]), 3)
    config = parse_train([*flags, "auto"])
    assert config.memory_gib == config.fit


def test_nothing_fits(settings: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"fit = 0.01: nothing fits: .*GiB more. To need less: train an adapter"
    ):
        fitted(inputs([*settings, *ADAMW, "--fit", "0.01"]), 1)
    for wrong in ("0", "-1", ".nan"):
        with pytest.raises(UserError, match="fit = .*: must be a number of GiB above 0"):
            parse_train([*settings, "--fit", wrong])


def test_gradients_are_kept_where_a_batch_is_split(settings: list[str]) -> None:
    plain = inputs([*settings, *BF16])
    for splits, fused in ((1, {False, True}), (2, {False})):
        resumed = Resumed(Path("step-1"), {"batch_splits": splits}, [])
        found = memory_choices(replace(plain, resumed=resumed), 1)
        assert values(found, "memory.fused_backward") == fused


def test_the_report_compares_them(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*settings, *BF16, "--dry_run", "memory"]
    with pytest.raises(UserError, match="nothing fits"):
        report_of(parse_train([*flags, "--fit", "0.01"]), 1)
    shown = capsys.readouterr().out.splitlines()
    start = shown.index("memory GiB   time  settings")
    assert shown[start + 1].endswith("  1.00  all is kept in fp32")
    assert any("--memory.activations recompute --memory.weights bf16" in line for line in shown[start:])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora.base_dtype", "int8"], "lora.base_dtype = int8: rounds weights that are not trained"),
        (
            ["--memory.weights", "bf16"],
            "memory.weights = bf16: needs bf16 arithmetic: add trainer.precision bf16",
        ),
        (
            ["--memory.optimizer_state", "8bit", "--optimizer.name", "muon"],
            "memory.optimizer_state = 8bit and optimizer.name = muon",
        ),
        (
            ["--parallel.shard_parameters", "--memory.fused_backward"],
            "memory.fused_backward = True and parallel.shard_parameters",
        ),
        (
            ["--memory.fused_backward", "--trainer.block_norms_every", "1"],
            "memory.fused_backward and trainer.block_norms_every = 1",
        ),
        (
            ["--init_from", "x", "--lora.rank", "2", "--memory.weights", "bf16_master"],
            "the weights of an adapter are few",
        ),
        (
            ["--init_from", "x", "--lora.rank", "2", "--lora.base_dtype", "nf4", "--lora.dora"],
            "lora.dora and lora.base_dtype = nf4",
        ),
        (
            [
                *("--init_from", "x", "--lora.rank", "2", "--lora.base_dtype", "int8"),
                *("--parallel.shard_parameters", "--trainer.precision", "bf16"),
            ],
            "lora.base_dtype = int8 and parallel.shard_parameters",
        ),
    ],
)
def test_what_does_not_go_together(settings: list[str], flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_train([*settings, "--optimizer.name", "adamw", *flags])


def test_torchao_is_asked_for_before_anything_loads(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stdit.training.memory_config.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao: pip install"):
        parse_train([*settings, *ADAMW, "--memory.optimizer_state", "8bit"])
