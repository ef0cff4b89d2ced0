"""Runs of train.py that save memory, from the first step to a sample."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stdit.lora.files import base_hash, read_adapter
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import sample_videos
from tests.test_train import do
from tests.training.tiny import tiny_settings

FULL = (
    *("--optimizer.name", "adamw", "--trainer.precision", "bf16", "--model.hidden_size", "64"),
    *("--memory.weights", "bf16", "--memory.optimizer_state", "8bit", "--memory.fused_backward"),
    *("--memory.activations", "recompute", "--ema.decay", "0", "--trainer.steps", "4"),
)
LORA = (
    "--lora.rank",
    "2",
    "--optimizer.name",
    "adamw",
    "--trainer.precision",
    "bf16",
    "--trainer.steps",
    "4",
)
PROMPTS = ("--validation.prompts", "[a red square]", "--validation.num_inference_steps", "1")
LAST = "step-00000004"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name} {name}": tensor
        for file in sorted(checkpoint.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def check_resumes(flags: list[str], outputs: Path) -> None:
    """A run that stopped after two steps ends as one that did not."""
    assert do([*flags, "--name", "straight"]) == 0
    assert do([*flags, "--name", "resumed", "--trainer.steps", "2"]) == 0
    assert do([*flags, "--name", "resumed"]) == 0
    one, other = (tensors(outputs / name / "checkpoints" / LAST) for name in ("straight", "resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sample(run: Path) -> torch.Tensor:
    pipe, _ = load_pipeline(run)
    ((_, frames, _),) = sample_videos(pipe, [Request("a red square", 0)])
    return torch.from_numpy(frames)


def test_a_run_that_saves_all_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags, outputs = [*tiny_settings(tmp_path), *FULL, *PROMPTS], tmp_path / "outputs"
    check_resumes(flags, outputs)
    run = outputs / "straight"
    stored = tensors(run / "checkpoints" / LAST)
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("model ")} == {torch.bfloat16}
    assert (
        any(name.endswith(".codes") for name in stored) and not (run / "checkpoints" / LAST / "ema").exists()
    )
    for source in (run / "pipeline", run / "checkpoints" / LAST):
        assert sample(source).shape == (4, 8, 8, 3)
    assert "no averaged weights" not in caplog.text, "there were to be none"
    assert do([*flags, "--name", "next", "--init_from", str(run), "--memory.weights", "fp32"]) == 0


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.slow
def test_an_adapter_on_rounded_weights(dtype: str, tmp_path: Path) -> None:
    flags, outputs = tiny_settings(tmp_path), tmp_path / "outputs"
    assert do([*flags, "--trainer.steps", "2", "--name", "base"]) == 0
    adapter = [*flags, *LORA, *PROMPTS, "--init_from", str(outputs / "base"), "--lora.base_dtype", dtype]
    check_resumes(adapter, outputs)
    run = outputs / "straight"
    base, _ = load_pipeline(outputs / "base")
    assert read_adapter(run / "lora").base_hash == base_hash(base.transformer), (
        "that of the weights as they were"
    )
    assert sample(run).shape == (4, 8, 8, 3)
