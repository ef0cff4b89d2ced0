"""scripts/bench/sampling.py on the model that comes with stdit."""

import json
from pathlib import Path

import pytest

from scripts.bench import sampling
from tests import warm


@pytest.mark.slow
def test_methods_are_compared_on_the_same_videos(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    flags = ["--videos", "1", "--exact", "4", "--output", str(output)]
    methods = ["euler 3", "euler 3", "unipc 3"]
    found = warm.run(["scripts/bench/sampling.py", *flags, "--methods", *methods])
    assert found.returncode == 0, found.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert [row["calls"] for row in rows] == [6, 6, 6]
    assert [row["psnr"] for row in rows[:2]] == [100, 100] and rows[0]["ssim"] == 1
    assert all(0 < row["psnr_exact"] < 60 and row["seconds"] > 0 and row["sent_mb"] == 0 for row in rows)
    assert rows[2]["psnr"] < 60 and rows[0]["ratio"] == 1
    lines = found.stdout.splitlines()
    assert lines[0].split()[:3] == ["method", "calls", "seconds"] and len(lines) == 1 + len(methods)


@pytest.mark.parametrize(
    "method", ["unipc", "unipc x", "ddim 4", "cache x", "pab 2;4", "nothing", "student fast"]
)
def test_a_method_that_there_is_not(method: str) -> None:
    with pytest.raises(sampling.UserError, match=f"--methods '{method}': must be a solver and its steps"):
        sampling.settings_of(method, 30)


def test_methods_may_be_joined() -> None:
    settings = {"num_inference_steps": 12, "solver": "dpm++", "cache": 0.03, "pab": [1, 2, 3]}
    assert sampling.settings_of("student dpm++ 12 cache 0.03 pab 1,2,3", 30) == settings
    assert sampling.kind_of("student dpm++ 12 cache fast") == "student dpm++ cache"
    assert sampling.settings_of("few-step euler 4", 30)["num_inference_steps"] == 4
    assert sampling.kind_of("few-step euler 4") == "few-step euler"


@pytest.mark.parametrize(
    ("method", "flag"), [("student", "--student"), ("few-step euler 4", "--few_step_student")]
)
def test_a_student_that_is_not_given(method: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sampling.py", "--methods", method])
    with pytest.raises(sampling.UserError, match=f"which one: add {flag} RUN"):
        sampling.parse_args()
