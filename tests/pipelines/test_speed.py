"""What sample.py says about the arithmetic of a CPU, and about torch.compile."""

import re
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit.models.stdit import STDiT
from stdit.pipelines import speed
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.sampling import sample_to_files
from stdit.pipelines.video_io import read_frames
from tests.pipelines.tiny import tiny_pipeline, write_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rate", "dtype", "device", "said"),
    [
        (
            4.0,
            "bf16",
            "cpu",
            "dtype = bf16: products of matrices take 0.25 of the time of fp32 on this CPU (",
        ),
        (0.5, "bf16", "cpu", "take 2.00 of the time of fp32"),
        (0.5, "fp16", "cpu", "fp32 is faster, and takes twice the memory"),
        (4.0, "fp32", "cpu", ""),
        (4.0, "bf16", "cuda", ""),
    ],
)
def test_what_is_said_about_a_dtype(
    rate: float, dtype: str, device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "matmul_rate", lambda _, kind: 1.0 if kind == torch.float32 else rate)
    found = speed.describe_dtype(dtype, torch.device(device))
    assert said in found and bool(found) == bool(said) and ("faster" in found) == (0 < rate < 1)


@pytest.mark.parametrize(("capable", "names"), [(["amx_bf16"], ["AMX"]), ([], []), (["avx512_fp16"], [])])
def test_instructions_are_those_that_torch_reports(
    capable: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capable, True), raising=False)
    assert speed._instructions("bf16") == names


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_makes_the_same_videos_and_says_what_it_costs(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_blocks = partialmethod(STDiT.compile_blocks, backend=backend)
    monkeypatch.setattr(STDiT, "compile_blocks", compile_blocks)
    run = write_run(tmp_path / "run", tiny_pipeline(tmp_path))
    videos = {}
    for compiled in (False, True):
        config = SampleConfig(
            checkpoint=str(run),
            prompt=["a red circle"],
            output=str(tmp_path / str(compiled)),
            format="mp4",
            compile=compiled,
        )
        file = next(path for path in sample_to_files(config) if path.suffix == ".mp4")
        videos[compiled] = read_frames(file).astype(int)
    assert np.abs(videos[True] - videos[False]).max() <= 2
    said = r"torch.compile: [\d.]+ s to start; a step takes [\d.e-]+ s instead of [\d.e-]+ s: (it pays|leave)"
    assert re.search(said, capsys.readouterr().out)
