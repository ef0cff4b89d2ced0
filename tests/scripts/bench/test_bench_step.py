"""The benchmark of one pass, on a size that takes no time."""

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import step as bench_step
from scripts.bench.step import CASES, Size, measure
from stdit.errors import UserError
from tests import warm

TINY = Size(hidden_size=16, depth=1, num_heads=2, frames=2, side=4, tokens=3, text_width=8)


def test_the_arithmetic_of_a_pass_is_counted() -> None:
    results = {
        name: measure(TINY, "fp32", None, device="cpu", steps=1, compiled=False, **options)
        for name, options in CASES.items()
    }
    forward, both = results["forward"]["flops"], results["forward + backward"]["flops"]
    assert 2.8 < both / forward < 3.2
    assert results["checkpointing"]["flops"] == both  # what is computed again is not counted
    assert all(found["seconds"] > 0 and 0 < found["of_matmul"] < 1 for found in results.values())


@pytest.mark.slow
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "step.json"
    monkeypatch.setitem(bench_step.SIZES, "small", TINY)
    monkeypatch.setattr(bench_step, "CASES", {"forward": {"backward": False}})
    monkeypatch.setattr(bench_step, "get_context", lambda method: warm.context())
    monkeypatch.setattr(
        sys, "argv", ["bench_step.py", "--sizes", "small", "--steps", "1", "--output", str(output)]
    )
    bench_step.main()
    assert "forward" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]
    assert [found["side"] for found in results] == ["eager", "kept", "flash", "medium"]
    assert all(found["size"] == "small" and found["seconds"] > 0 for found in results)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "0"], "steps = 0"),
        (["--threads", "0"], "threads = 0"),
        (["--device", "cuda:77"], "not available"),
        (["--beside", "nowhere.py"], "no such file"),
    ],
)
def test_bad_settings_are_named(monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *flags])
    with pytest.raises(UserError, match=message):
        bench_step.main()


BESIDE = """
import torch
from scripts.bench.step import build as ours

def build(size, conditioning, device):
    if conditioning:
        raise NotImplementedError
    model, inputs = ours(size, conditioning, device)
    hidden = inputs["hidden_states"]
    return torch.nn.Linear(hidden.shape[-1], 1), {"input": hidden}
"""


def test_another_model_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "other.py"
    file.write_text(BESIDE)
    settings = {"device": "cpu", "steps": 1, "beside": file}
    found = measure(TINY, "fp32", None, **settings)
    assert found is not None and found["seconds"] > 0
    assert measure(TINY, "fp32", None, conditioning=True, **settings) is None
    assert measure(TINY, "fp32", None, checkpointing=True, **settings) is None
