"""The benchmark of sequence parallelism: it starts its ranks, and they send what the formulas say."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import warm

TINY = [
    "--hidden_size",
    "16",
    "--num_heads",
    "2",
    "--depth",
    "1",
    "--frames",
    "4",
    "--height",
    "4",
    "--width",
    "8",
]


def bench(*argv: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["scripts/bench/sequence.py", *TINY, "--steps", "1", "--warmup", "1", *argv])


@pytest.mark.slow
def test_bytes_are_those_of_the_formulas(tmp_path: Path) -> None:
    methods = ["dsp", "dsp-overlap", "ring"]
    done = bench("--ranks", "1", "2", "--methods", *methods, "--output", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [row["method"] for row in one["rows"]] == ["dsp"]
    assert [row["method"] for row in two["rows"]] == methods
    for row in (*one["rows"], *two["rows"]):
        assert row["formula"]["exact"]
        for name in ("forward", "backward"):
            assert row["plain"][name]["bytes"] == row["formula"][name], (row["method"], name)
        assert row["checkpointing"]["forward"]["bytes"] == row["formula"]["forward"]
        assert row["checkpointing"]["backward"]["bytes"] == row["formula"]["checkpointing"]
        assert row["seconds"] > 0 and row["compute_seconds"] > 0
    assert two["rows"][2]["plain"]["forward"]["bytes"] > 0
    assert 0.1 < one["overhead"] < 10
    for method in methods:
        assert f"\n{method} " in done.stdout
    assert "overhead of DSP's path on one rank" in done.stdout


@pytest.mark.slow
def test_the_error_of_a_rank_is_shown() -> None:
    done = bench("--ranks", "2", "--methods", "megatron", "--num_heads", "1")
    assert done.returncode == 2
    assert "the model has 1 heads" in done.stderr and "Traceback" not in done.stderr


def test_a_bad_rate_is_an_error() -> None:
    done = bench("--rate", "1gbit", "fast")
    assert done.returncode == 2
    assert "--rate fast: must be a whole number of mbit or gbit" in done.stderr
