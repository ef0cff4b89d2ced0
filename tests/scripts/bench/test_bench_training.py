"""The comparison of whole steps, on a tiny run."""

import json
import signal
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from scripts.bench import training as bench_training
from stdit.errors import UserError
from tests.training.tiny import tiny_settings


def test_sides_start_alike_and_take_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "found.json"
    sides = ["ema.decay 0.5", "optimizer.lr 1e-2 trainer.precision bf16"]
    argv = [
        *tiny_settings(tmp_path),
        "--steps",
        "3",
        "--warmup",
        "1",
        "--window",
        "2",
        "--output",
        str(output),
    ]
    argv += [part for side in sides for part in ("--side", side)]
    monkeypatch.setattr(sys, "argv", ["training.py", *argv])
    AcceleratorState._reset_state(True)
    bench_training.main()
    found = json.loads(output.read_text())
    assert list(found) == ["as set", *sides]
    losses = {side: values["loss"] for side, values in found.items()}
    assert losses["as set"] == losses[sides[0]]
    assert losses["as set"][0] == pytest.approx(losses[sides[1]][0], rel=0.05)
    assert losses["as set"][1:] != losses[sides[1]][1:]
    assert all(len(values["seconds"]) == 4 and min(values["seconds"]) > 0 for values in found.values())
    assert "1.00x (1.00 to 1.00)" in capsys.readouterr().out
    assert not list((tmp_path / "outputs").glob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps = 0"),
        (["--warmup", "-1"], "warmup = -1"),
        (["--side", "model.depth 3"], "side 'model.depth 3': model.depth must begin with trainer."),
        (["--side", "trainer.num_threads 1"], "trainer.num_threads is the same for all sides"),
        (["--side", "trainer.compile"], "must be pairs of a key and a value"),
        (["--side", "ema.decay 0", "--side", "ema.decay 0"], "side 'ema.decay 0' is given twice"),
        (["--output", "."], "output . is a folder"),
        (["--output", "/dev/null/found.json"], "output /dev/null cannot be written"),
        (["--side", "trainer.compil true"], "trainer.compil"),
    ],
)
def test_bad_settings_are_named(flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--data.manifest", "clips.csv", *flags])
    with pytest.raises(UserError, match=message):
        bench_training.main()


def test_an_interrupt_ends_it_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It must not report on the steps until then."""
    monkeypatch.setattr(sys, "argv", ["training.py", *tiny_settings(tmp_path), "--steps", "2"])
    monkeypatch.setattr("stdit.training.trainer.Trainer.step", lambda *_: signal.raise_signal(signal.SIGINT))
    AcceleratorState._reset_state(True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_training.main()
    finally:
        signal.signal(signal.SIGINT, before)
