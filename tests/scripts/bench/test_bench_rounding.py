"""The benchmark of rounded weights, on the model that comes with stdit."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import rounding


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rounding.json"
    flags = ["--videos", "1", "--steps", "1", "--prompt", "a red ball rises", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["rounding.py", *flags])
    rounding.main()
    assert "rms from bf16" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert 0 == figures["bf16"]["rms_bf16"] < figures["int8"]["rms_bf16"] < 0.02 < figures["nf4"]["rms_bf16"]
    psnr = [figures[dtype]["psnr_all"] for dtype in ("nf4", "int8", "bf16")]
    assert 25 < psnr[0] < psnr[1] < psnr[2]
