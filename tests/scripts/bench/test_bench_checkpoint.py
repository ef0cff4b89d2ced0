"""The benchmark of checkpoints, on a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import checkpoint as bench_checkpoint


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "scratch", tmp_path / "checkpoint.json"
    flags = [
        "--hidden_size",
        "16",
        "--depth",
        "1",
        "--saves",
        "1",
        "--folder",
        str(folder),
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_checkpoint.py", *flags])
    bench_checkpoint.main()
    assert "s that training stops" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert (
        figures["bytes"] > 16 * figures["parameters"] > 0
    )  # weights, average, two moments, and numbers of steps
    assert figures["pause_seconds"] > 0 and figures["at_once_seconds"] > 0
    assert not list(folder.iterdir())
