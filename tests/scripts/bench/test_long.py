"""The benchmark of one very long video: processes compute what one does, and it reports memory and traffic."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import long, sequence
from tests import warm

TINY = "--frames 5 --height 3 --width 7 --hidden_size 16 --ranks 2 --check --precision fp64".split()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--blocks", "S T S L"), marks=pytest.mark.slow),
        ("--blocks", "S T J", "--grid", "1x2"),
    ],
)
def test_two_processes_compute_what_one_does(
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sequence.subprocess, "Popen", start_warm)
    monkeypatch.setattr(long.signal, "signal", lambda *_: None)
    monkeypatch.setattr(long, "INTERVAL", 0.0)
    output = tmp_path / "long.json"
    monkeypatch.setattr(sys, "argv", ["long.py", *TINY, *options, "--output", str(output)])
    assert long.main() == 0
    printed = capsys.readouterr().out
    assert "105 tokens (5 frames), 2 rank(s)" in printed and "  as in one process" in printed
    written = json.loads(output.read_text())
    assert written["settings"]["model"]["depth"] == {"S T S L": 2, "S T J": 3}[options[1]]
    (result,) = written["results"]
    assert result["grid"] == ([1, 2] if "--grid" in options else [2, 1])
    assert result["tokens"] == 105 and result["sent_bytes"] > 0
    assert set(result["seconds"]) == {"forward", "backward", "update"}
    assert len(result["peak_pss"]) == len(result["step_pss"]) == len(result["step_rss"]) == 2
    assert result["peak_pss_sum"] > max(result["peak_pss"]) > 0
    assert set(result["differences"]) == {"output", "loss", "gradient", "weight"}


def start_warm(command: list[str], env: dict[str, str], stderr: Any) -> warm.Python:
    """Start a rank by `warm.Python`, with the arguments of `subprocess.Popen`."""
    return warm.Python(command[1:], env)


def test_a_difference_is_seen() -> None:
    expected = {
        "loss": torch.ones(1),
        "gradient a": torch.tensor([1.0, 1e-9]).double(),
        "weight a": torch.ones(2),
    }
    found = {name: value.clone() for name, value in expected.items()}
    found["weight a"][1] += 1  # its gradient is too small
    result = long.compare(found, expected, "fp64")
    assert result["equal"] and result["weights_left_out"] == 1
    found["gradient a"][1] *= 2
    result = long.compare(found, expected, "fp64")
    assert not result["equal"] and result["differences"]["gradient"]["difference"] == pytest.approx(1e-9)
    found["gradient b"] = torch.zeros(1)
    assert long.compare(found, expected, "fp32")["differences"]["gradient"]["tensor"] == "b"
    found["loss"][0] = torch.nan
    assert long.compare(found, expected, "fp32")["differences"]["loss"]["difference"] == torch.inf


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--grid 2", "--grid 2: must be TIMExSPACE, such as 2x2, or auto"),
        ("--grid 2x3", "--grid 2x3: has 2 x 3 = 6 ranks, but --ranks is 4"),
        ("--frames 0", "argument --frames: 0: must be at least 1"),
        ("--blocks STX", "'X' is no kind of block"),
        ("--check --ranks 1", "use --ranks 2 or more"),
        ("--scaling --frames 5", "--scaling --ranks 4 --frames 5: both are halved"),
        ("--scaling --grid 4x1", "--scaling --grid 4x1: each number of ranks needs its own grid"),
    ],
)
def test_bad_flags_are_errors(
    options: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["long.py", *options.split()])
    with pytest.raises((long.UserError, SystemExit)) as raised:
        long.settings_of(long.parse_args())
    assert error in str(raised.value) + capsys.readouterr().err


def test_a_bad_flag_ends_the_command() -> None:
    done = warm.run(["scripts/bench/long.py", "--grid", "3x1"])
    assert done.returncode == 2 and "error: --grid 3x1" in done.stderr and "Traceback" not in done.stderr


def test_lengths_are_halved_with_the_ranks() -> None:
    assert long.lengths(4, 64) == [(1, 16), (2, 32), (4, 64)]
    assert long.lengths(8, 64) == [(2, 16), (4, 32), (8, 64)]
    assert long.lengths(2, 6) == [(1, 3), (2, 6)]
