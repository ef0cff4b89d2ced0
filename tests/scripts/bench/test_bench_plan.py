"""The benchmark of the plan, on few clips."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import plan as bench_plan
from stdit.data.manifest import index


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(index, "MIN_ROWS", 1000)
    monkeypatch.setattr(bench_plan, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(bench_plan, "SECONDS", 3.0)
    output = tmp_path / "plan.json"
    argv = ["bench_plan.py", "--clips", "1500", "--step", "700", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    bench_plan.main()
    printed = capsys.readouterr().out
    assert "start: 1,490 clips in 24 buckets" in printed and "resume: 1,490 clips" in printed
    figures = json.loads(output.read_text())
    assert figures["resume"]["mib"] >= 0
    for found in (figures["start"], figures["resume"]):
        whole = found["seconds"].pop("in all, before that batch")
        found["seconds"].pop("read the first batch")
        assert whole[0] == pytest.approx(sum(wall for wall, _ in found["seconds"].values()))


class InThisProcess:
    """A pool of no processes: what it is given runs at once."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function, *args):  # type: ignore[no-untyped-def]
        value = function(*args)
        return type("Future", (), {"result": lambda self: value})()
